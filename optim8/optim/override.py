"""The ways to name what an override is for."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.utils.weak import TensorWeakRef

from optim8.step import arguments, hypers
from optim8.step.overrides import Find, Groups, OverrideHandle, add


def override(
    target: torch.nn.Module | torch.Tensor | str, /, *, module: torch.nn.Module | None = None, **changes: Any
) -> OverrideHandle:
    """Give some parameters options of their own, before or after their optimizer is made.

    Args:
        target: a parameter; a module, for all parameters in it; or a shell pattern, such as "*.embed.*", for names.
            `*` also matches dots. Names are those of optimizers made from `named_parameters()`.
        module: only with a pattern, which then matches the names of `module.named_parameters()`, for any optimizer.
        **changes: hyper-parameters of the optimizer's rule (`lr`, `betas`, `eps`, `weight_decay`, `momentum`, ...),
            `optim_bits`, `min_8bit_size`, as for a parameter group.

    Returns:
        a handle: `handle.remove()` ends the override, as does the end of `with override(...):`.

    Schedulers do not move an overridden `lr`. Later overrides win, option by option. The optimizer's next `step`,
    `precision` or `state_dict` brings state that exists already to the new precision: it widens codes exactly, or
    quantizes. A state dict holds no overrides. They stay with the tensor: a copy of a parameter has none. Where a
    model's parameters are replaced later (as fully_shard does), override the module or a pattern.

    If no optimizer has the trainable parameters of an override, the first step of any optimizer warns.

    Raises:
        TypeError: the target is none of these, or `module` is no module.
        ValueError: an option is unknown or its value not possible; the target has no parameters. For a pattern
            that matches no name of any optimizer, the first optimizer that would use it raises the error.

    Examples:
        >>> import torch, optim8
        >>> model = torch.nn.Sequential(torch.nn.Embedding(100, 64), torch.nn.Linear(64, 100))
        >>> optimizer = optim8.AdamW8bit(model.parameters())
        >>> handle = optim8.override(model[0], optim_bits=32, lr=1e-4)
        >>> [optimizer.precision(p) for p in model.parameters()]
        ['32bit', '8bit', '32bit']
    """
    who = "override"
    changes = checked(who, changes)
    if module is not None and not isinstance(target, str):
        raise TypeError(f"{who}: module= belongs to a pattern, got a {type(target).__name__} as target. Leave it out.")
    if isinstance(target, torch.Tensor):
        return add(changes, of_tensor(who, target))
    if isinstance(target, torch.nn.Module):
        if next(target.parameters(), None) is None:
            raise ValueError(f"{who}: the module has no parameters: {type(target).__name__}. Name one that has some.")
        return add(changes, _of_module(target, lambda _: True))
    if not isinstance(target, str):
        raise TypeError(f"{who}: target must be a parameter, a module or a pattern, got {type(target).__name__}.")
    if module is None:
        return add(changes, _of_names(target), target)
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"{who}: module must be a torch.nn.Module, got {type(module).__name__}.")
    if not any(fnmatchcase(name, target) for name, _ in module.named_parameters(remove_duplicate=False)):
        names = ", ".join(name for name, _ in module.named_parameters())
        raise ValueError(f"{who}: {target!r} matches no parameter of the module, which has: {names or 'none'}.")
    return add(changes, _of_module(module, lambda name: fnmatchcase(name, target)))


def override_module_parameter(
    who: str, module: torch.nn.Module, name: str, changes: dict[str, Any], *, idle: bool = True
) -> OverrideHandle:
    """Override the parameter that a module has under a name, whichever tensor an optimizer finds there."""
    if not isinstance(module, torch.nn.Module) or not isinstance(getattr(module, name, None), torch.Tensor):
        raise ValueError(f"{who}: a {type(module).__name__} has no parameter {name!r}.")
    return add(checked(who, changes), _of_module(module, lambda found: found == name), idle=idle)


def checked(who: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Check the options of an override, and leave out those of bitsandbytes that change nothing."""
    known = hypers.overridable()
    changes = arguments.without_neutral(who, changes)
    if not changes:
        raise ValueError(f"{who}: name at least one option: {', '.join(known)}.")
    for name in changes:
        if name not in known:
            close = arguments.did_you_mean(name, known)
            raise ValueError(f"{who}: {name!r} cannot be overridden.{close} Options are {', '.join(known)}.")
    return hypers.normalize_changes(who, changes)


def of_tensor(who: str, param: torch.Tensor) -> Find:
    """Find one parameter, as long as it is there. Any tensor that an optimizer takes may be one.

    Raises:
        ValueError: no optimizer takes it.
    """
    if not param.is_leaf and not param.retains_grad:
        raise ValueError(
            f"{who}: the tensor must be a parameter, got a result {tuple(param.shape)} that no optimizer can have. "
            "Pass the parameter itself."
        )
    ref, shape, seen = TensorWeakRef(param), tuple(param.shape), False
    sure = isinstance(param, torch.nn.Parameter) or param.requires_grad

    def find(groups: Groups) -> dict[int, torch.Tensor] | None:
        nonlocal seen
        alive = ref()
        if alive is None:
            if not seen and not sure:
                warnings.warn(
                    f"{who}: the tensor {shape} that was meant is gone, and no optimizer had it. Pass the parameter "
                    "itself; param.data and param.detach() are other tensors.",
                    stacklevel=2,
                )
            return None
        seen = seen or any(alive is candidate for group in groups for candidate in group["params"])
        return {id(alive): alive}

    return find


def _of_module(module: torch.nn.Module, wants: Callable[[str], bool]) -> Find:
    ref = weakref.ref(module)

    def find(_: Groups) -> dict[int, torch.Tensor] | None:
        alive = ref()
        if alive is None:
            return None
        return {id(param): param for name, param in alive.named_parameters(remove_duplicate=False) if wants(name)}

    return find


def _of_names(pattern: str) -> Find:
    def find(groups: Groups) -> dict[int, torch.Tensor] | None:
        named = [pair for group in groups for pair in zip(group.get("param_names", ()), group["params"])]
        return {id(param): param for name, param in named if fnmatchcase(name, pattern)}

    return find
