"""What a user may set on an optimizer or a parameter group: its types, its checks, and how it is stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch

from optim8 import _native, rules
from optim8.rules import Hyper, Rule
from optim8.state import symbols
from optim8.step import orthogonal
from optim8.step.weight_options import MASTER_BITS, PLAIN_WEIGHTS, has_plain_weights, narrow_only

MIN_8BIT_SIZE = 4096

# Types of arguments. Numbers may also be numpy's, and pairs numpy arrays; they are stored as floats and tuples.
Number: TypeAlias = float | torch.Tensor
Betas: TypeAlias = Sequence[Number] | str
Bits: TypeAlias = Literal[8, 16, 32]
Rounding: TypeAlias = Literal["dithered", "nearest"]
BITS, ROUNDINGS = get_args(Bits), get_args(Rounding)

# Set by group; filled in where a checkpoint of another optimizer lacks them.
EXTRA_DEFAULTS: dict[str, Any] = {
    "min_8bit_size": MIN_8BIT_SIZE,
    "optim_bits": 8,
    "rounding": "dithered",
    **PLAIN_WEIGHTS,
}


def overridable() -> dict[str, list[Hyper]]:
    """The options that one parameter may override: the hyper-parameters of all rules, which may mean several things by
    one name (two betas, or three), and EXTRA_DEFAULTS."""
    known: dict[str, list[Hyper]] = {}
    for rule in rules.every().values():
        for hyper in rule.hypers:
            known.setdefault(hyper.name, []).append(hyper)
    return {**known, **{name: [] for name in EXTRA_DEFAULTS}}


def _number(owner: str, name: str, value: Any, least: float, below: float = math.inf) -> float | torch.Tensor:
    """The value as a float; a tensor stays one, since its owner may change it in place."""
    if type(value) is float and least <= value < below:
        return value  # every step comes here
    one = value
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(f"{owner}: {name} must have one element when it is a tensor, got {value.numel()}.")
        if value.device.type != "cpu" or symbols.is_symbol(value):
            return value  # looking would wait for the device, or show nothing
        one = value.item()
    elif isinstance(value, np.ndarray) and value.size == 1:
        one = value.item()
    if isinstance(one, bool) or not isinstance(one, Real):
        hint = " Write it as a number; in YAML, 1e-4 is text and 1.0e-4 a number." if isinstance(one, str) else ""
        raise TypeError(f"{owner}: {name} must be a number, got {value!r}.{hint}")
    if not least <= float(one) < below:
        end = " and finite" if below == math.inf else f" and below {below:g}"
        raise ValueError(f"{owner}: {name} must be at least {least:g}{end}, got {value!r}.")
    return value if isinstance(value, torch.Tensor) else float(one)


def _tuple(owner: str, hyper: Hyper, value: Any) -> tuple[float | torch.Tensor, ...]:
    """A tuple of numbers: any sequence of as many, or a string such as "(0.9, 0.999)" (as bitsandbytes)."""
    count = len(hyper.default) if isinstance(hyper.default, tuple) else 0
    several = value
    if isinstance(value, str):
        try:
            several = [float(part) for part in value.strip().strip("()[]").split(",")]
        except ValueError:
            several = None
    if isinstance(several, np.ndarray | torch.Tensor) and several.ndim != 1:
        several = None
    if not isinstance(several, (tuple, Sequence, np.ndarray, torch.Tensor)) or len(several) != count:
        what = "a pair of numbers" if count == 2 else f"{count} numbers"
        raise ValueError(f'{owner}: {hyper.name} must be {what}, or like "{hyper.default}", got {value!r}.')
    return tuple(_number(owner, f"{hyper.name}[{i}]", each, hyper.least, hyper.below) for i, each in enumerate(several))


def _optional(owner: str, hyper: Hyper, value: Any) -> float | torch.Tensor | None:
    if value is None:
        return None
    number = _number(owner, hyper.name, value, hyper.least, hyper.below)
    if not float(number) > 0:
        raise ValueError(f"{owner}: {hyper.name} must be above 0, or None, got {value!r}.")
    return number


def _flag(owner: str, hyper: Hyper, value: Any) -> bool:
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise TypeError(f"{owner}: {hyper.name} must be True or False, got {value!r}.")


def _plain(owner: str, hyper: Hyper, value: Any) -> Any:
    """The value of a hyper-parameter as it is stored.

    Raises:
        ValueError, TypeError: it is out of range, or of another kind.
    """
    if hyper.is_flag:
        return _flag(owner, hyper, value)
    if hyper.is_tuple:
        return _tuple(owner, hyper, value)
    if not hyper.is_number:
        return _optional(owner, hyper, value)
    return _number(owner, hyper.name, value, hyper.least, hyper.below)


def _plain_for_any(owner: str, hypers: Sequence[Hyper], value: Any) -> Any:
    """The same by the first of several hyper-parameters that takes the value; a step asks that of its rule."""
    refusal: ValueError | TypeError | None = None
    for hyper in hypers:
        try:
            return _plain(owner, hyper, value)
        except (ValueError, TypeError) as error:
            refusal = refusal or error
    raise refusal or ValueError(f"{owner}: no rule has this option.")


def _whole(value: Any) -> int | None:
    """The value as an int where it is a whole number of any type, else None."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or not isinstance(value, Real) or float(value) % 1 != 0:
        return None
    return int(float(value))


def normalize_group(owner: str, rule: Rule, group: dict[str, Any]) -> None:
    """Check the options of a parameter group, and store its numbers as plain ones, whatever library they came from:
    floats, ints, and betas as a tuple. Tensors stay tensors.

    Raises:
        ValueError, TypeError: the first option that cannot be honoured; options before it may be stored already.
    """
    _normalize_options(owner, rule, group)
    conflict = _native.cpu().conflict(rule.name, group)
    if conflict is not None:
        raise ValueError(f"{owner}: {conflict}")


def _normalize_options(owner: str, rule: Rule, group: dict[str, Any]) -> None:
    """Do what normalize_group does, except to check for options that do not go together."""
    for hyper in rule.hypers:
        value, least, below = group[hyper.name], hyper.least, hyper.below
        if type(value) is float and hyper.is_number and least <= value < below:
            continue  # every step comes here
        if (
            type(value) is tuple
            and isinstance(hyper.default, tuple)
            and len(value) == len(hyper.default)
            and all(type(each) is float and least <= each < below for each in value)
        ):
            continue
        group[hyper.name] = _plain(owner, hyper, value)
    if "ns_coefficients" in group:
        orthogonal.normalize_options(owner, group)
    if group.get("differentiable"):
        raise ValueError(
            f"{owner}: differentiable=True is not supported: quantized state has no gradient. "
            "Use differentiable=False, or the torch.optim optimizer for these parameters."
        )
    if group.get("fused") and group.get("foreach"):
        raise ValueError(f"{owner}: fused and foreach cannot both be True. Leave both out: a step is always one call.")
    _normalize_precision(owner, group)


def _normalize_precision(owner: str, group: dict[str, Any]) -> None:
    """Check and store the options of EXTRA_DEFAULTS."""
    size, bits, master = map(_whole, (group["min_8bit_size"], group["optim_bits"], group["master_bits"]))
    if size is None or size < 0:
        got = group["min_8bit_size"]
        raise ValueError(f"{owner}: min_8bit_size must be a whole number of values, 0 or more, got {got!r}.")
    if bits not in BITS:
        raise ValueError(f"{owner}: optim_bits must be 8, 16 or 32, got {group['optim_bits']!r}.")
    if master not in MASTER_BITS:
        raise ValueError(f"{owner}: master_bits must be 16, 24 or 32, got {group['master_bits']!r}.")
    for name in ("rounding", "param_rounding"):
        if group[name] not in ROUNDINGS:
            raise ValueError(f"{owner}: {name} must be {' or '.join(map(repr, ROUNDINGS))}, got {group[name]!r}.")
    group["min_8bit_size"], group["optim_bits"], group["master_bits"] = size, bits, master


def normalize_changes(owner: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Options of `overridable`, checked and stored as in a group.

    Raises:
        ValueError, TypeError: an option cannot be honoured.
    """
    plain, known = {**EXTRA_DEFAULTS, **changes}, overridable()
    for name in changes:
        if known[name]:
            plain[name] = _plain_for_any(owner, known[name], changes[name])
    _normalize_precision(owner, plain)
    return {name: plain[name] for name in changes}


def to_save(value: Any) -> Any:
    """A value of a group as it is saved: numpy's scalars, which torch.load(weights_only=True) refuses, as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in (list, tuple):
        return type(value)(map(to_save, value))
    if type(value) is dict:
        return {key: to_save(item) for key, item in value.items()}
    return value


def name_of(group: dict[str, Any], index: int) -> str:
    """A parameter of a group, for messages: "parameter 3", or with its name where the optimizer was given names."""
    names = group.get("param_names") or ()
    return f"parameter {index} {names[index]!r}" if index < len(names) else f"parameter {index}"


def check_params(owner: str, group_index: int, group: dict[str, Any]) -> None:
    """Raise ValueError where a parameter of a group can never be stepped; each step checks what can still
    change.

    A frozen parameter may be of any kind, such as the integer weights of a quantized model: it gets no gradient.
    """
    places: dict[int, int] = {}
    for index, param in enumerate(group["params"]):
        first = places.setdefault(id(param), index)
        if first != index:
            raise ValueError(
                f"{owner}: {name_of(group, index)} of group {group_index} is {name_of(group, first)} again; it would "
                "be stepped twice. Pass each once, as `model.parameters()` or `list(dict.fromkeys(params))` does."
            )
        if not param.requires_grad:
            continue
        if param.layout != torch.strided or param.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            kind = str(param.dtype) if param.layout == torch.strided else str(param.layout)
            raise ValueError(
                f"{owner}: {name_of(group, index)} of group {group_index} must be dense and float32, bfloat16 or "
                f"float16, got {kind.removeprefix('torch.')} {tuple(param.shape)}. Convert it, or leave it out."
            )
        if param.dtype == torch.float32 and not has_plain_weights(group):
            where = f"{owner}: {name_of(group, index)} of group {group_index}"
            raise ValueError(narrow_only(where, group, tuple(param.shape)))


def bits_of_new_state(options: dict[str, Any], param: torch.Tensor) -> int:
    """The bits of new state of `param`, 8, 16 or 32, under these options, which are its group's or its own."""
    bits: int = options["optim_bits"]
    return bits if param.numel() >= options["min_8bit_size"] else 32


def counts_on_device(options: dict[str, Any]) -> bool:
    """Whether the device counts the steps of parameters with these options, where it is no CPU."""
    lr = options["lr"]
    return bool(options.get("capturable")) or (isinstance(lr, torch.Tensor) and lr.device.type != "cpu")


def step_options(
    owner: str, rule: Rule, group: dict[str, Any], scale: torch.Tensor | None, found_inf: torch.Tensor | None
) -> Any:
    """The options of a group as a native step takes them; what lives on a device stays there.

    Args:
        scale, found_inf: of a GradScaler, or None.

    Raises:
        ValueError, TypeError: an option cannot be honoured.
    """
    _normalize_options(owner, rule, group)  # a user or a scheduler may have edited it
    if group.get("capturable") and any(param.device.type == "cpu" for param in group["params"]):
        raise ValueError(f"{owner}: capturable=True needs CUDA parameters, got one on cpu. Use capturable=False.")
    lr = group["lr"]
    on_device = isinstance(lr, torch.Tensor) and lr.device.type != "cpu"
    if on_device:
        for index, param in enumerate(group["params"]):
            if param.device != lr.device:
                raise ValueError(
                    f"{owner}: lr on {lr.device} needs all parameters of its group there, got "
                    f"{name_of(group, index)} on {param.device}. Use a number, or a group for each device."
                )
        if lr.dtype != torch.float32:
            raise ValueError(f"{owner}: lr on {lr.device} must be float32, got {lr.dtype}. Use lr.float().")
    amp_on_device = found_inf is not None and found_inf.device.type != "cpu"
    if amp_on_device and any(param.device.type == "cpu" for param in group["params"]):
        raise ValueError(f"{owner}: a GradScaler on {found_inf.device} needs parameters there, got one on cpu.")  # type: ignore[union-attr]
    return _native.cpu().StepOptions(
        owner,
        rule.name,
        group,
        maximize=bool(group["maximize"]),
        gradient_scale=1.0 if scale is None or scale.device.type != "cpu" else 1.0 / float(scale),
        count_on_device=counts_on_device(group) or amp_on_device,
        device_lr=lr.data_ptr() if on_device else 0,
        dithered=group["rounding"] == "dithered",
        master_bits=group["master_bits"],
        dithered_param=group["param_rounding"] == "dithered",
    )
