"""The memory of forward and backward, from a training step that is traced without data and without memory."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Loss = Callable[[nn.Module], torch.Tensor]

_WHO = "optim8.memory.plan"
# What torch raises where a shape, or the course of the program, depends on values that a trace does not have.
_NEEDS_DATA = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedFakeTensorException,
    fake_tensor.UnsupportedOperatorException,
)


def check_loss(loss: Any, source: Any, is_sharded: bool) -> None:
    """Refuse a `loss` of `plan` that cannot be traced with what the plan is of."""
    if not callable(loss):
        raise TypeError(
            f"{_WHO}: loss must be a function of the module, as in lambda model: model(inputs).mean(), got "
            f"{type(loss).__name__}."
        )
    if not isinstance(source, nn.Module):
        raise TypeError(
            f"{_WHO}: loss needs a module to compute with, got {type(source).__name__}. Pass the module; it may be on "
            "the meta device."
        )
    recurrent = [name or type(part).__name__ for name, part in source.named_modules() if isinstance(part, nn.RNNBase)]
    if recurrent:
        raise ValueError(
            f"{_WHO}: activations of recurrent layers are not planned, since their kernels keep buffers that a trace "
            f"has no shape for; got {', '.join(recurrent)}. Leave loss out."
        )
    if is_sharded:
        raise ValueError(
            f"{_WHO}: activations beside sharded parameters are not planned, since a layer is gathered while it runs. "
            "Leave loss out, or plan one device."
        )


def activation_bytes(module: nn.Module, loss: Loss, dtype: torch.dtype | None) -> int:
    """What a forward and a backward take at their peak, beyond parameters, buffers and gradients.

    The step runs on a copy of the module whose tensors have shapes and no memory, with the operators of the CPU. Every
    storage that an operator returns counts from then until nothing holds it any more, as the allocator would see it:
    tensors saved for the backward, temporary ones, gradients while they come. What an operator takes and gives back
    within itself does not count.

    Args:
        module: on any device; nothing of it changes.
        loss: computes the loss of one step with the module that it is given, and its inputs, on the CPU.
        dtype: of all floating parameters; None for their own.

    Raises:
        TypeError, ValueError: `loss` gives no loss of that module, or cannot be traced; the message says why.
    """
    with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad():
        twin, given = _without_memory(module, dtype)
        storages = _Storages(given)
        try:
            with storages:
                value = loss(twin)
                _check(value)
                value.backward()  # type: ignore[no-untyped-call]
        except _NEEDS_DATA as error:
            raise ValueError(
                f"{_WHO}: loss must not depend on the values of tensors, and an operator asked for them: {error}. "
                "Leave loss out, or pass one without that operator."
            ) from error
        gradients = [p.grad for p in twin.parameters() if p.grad is not None]
        if not gradients:
            raise ValueError(
                f"{_WHO}: loss must compute with the module that it is given, and gave no parameter of it a gradient. "
                "Use its argument, as in loss=lambda model: model(inputs).mean()."
            )
        # A planned training has its gradients beside that; where the peak is before the last of them, less is beyond.
        return max(0, storages.peak - sum(gradient.nbytes for gradient in gradients))


def _check(value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"{_WHO}: loss must give a tensor of one value, got {type(value).__name__}. Of a result with several parts "
            "return the loss, as in loss=lambda model: model(**batch).loss."
        )
    if value.numel() != 1 or not value.requires_grad:
        raise ValueError(
            f"{_WHO}: loss must give a tensor of one value that requires a gradient, got shape {list(value.shape)} and "
            f"requires_grad={value.requires_grad}. Reduce it, and compute it with the module that loss is given."
        )


def _without_memory(module: nn.Module, dtype: torch.dtype | None) -> tuple[nn.Module, Sequence[torch.Tensor]]:
    """A copy of the module with tensors that have no memory, and these tensors. Called where FakeTensorMode is on."""
    twins: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        is_parameter = isinstance(tensor, nn.Parameter)
        kind = dtype if dtype is not None and is_parameter and tensor.is_floating_point() else tensor.dtype
        twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=kind, device="cpu")
        twins[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if is_parameter else twin
    given = list(twins.values())
    return copy.deepcopy(module, twins), given


class _Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operators return, while something holds them.

    Attributes:
        peak: the most bytes at any moment.
    """

    def __init__(self, given: Sequence[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._now = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in given}  # which are no activations

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, nn.Parameter) and not isinstance(leaf, fake_tensor.FakeTensor):
                raise ValueError(
                    f"{_WHO}: loss must compute with the module that it is given, and used a parameter of shape "
                    f"{list(leaf.shape)} of another. Use its argument, as in loss=lambda model: model(inputs).mean()."
                )
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._hold(leaf.untyped_storage())
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:  # a view, or a result in place
            return
        self._known.add(key)
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._release, key, size).atexit = False

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size
