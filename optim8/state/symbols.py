"""Tensors that stand for values of a program that is recorded, or for shapes alone: FakeTensors and a tracer's proxies.

Their state must be of their kind. A plain tensor has memory, and so has its state, whatever mode is on.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch.utils._python_dispatch import _disable_current_modes

_KEYS = torch._C._TorchDispatchModeKey


def fake_mode_of(tensor: torch.Tensor) -> Any:
    """The FakeTensorMode of a tensor that has a shape and no values; None for any other."""
    return getattr(tensor, "fake_mode", None)


def proxy_mode() -> Any:
    """The mode of make_fx that records what runs now, or None."""
    return torch._C._get_dispatch_mode(_KEYS.PROXY)


def needs_no_memory() -> bool:
    """Whether a mode is on that runs operations for shapes or for a record, and not (only) for their values."""
    return any(torch._C._get_dispatch_mode(key) is not None for key in (_KEYS.FAKE, _KEYS.PROXY, _KEYS.FUNCTIONAL))


def is_one_graph() -> bool:
    """Whether what torch.compile compiles now must be one graph (fullgraph=True). Only code that it follows asks."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    compiler = InstructionTranslator.current_tx()
    return bool(getattr(compiler, "one_graph", True) or getattr(compiler, "error_on_graph_break", False))


# As torch.compiler.assume_constant_result does, which would import the compiler here.
is_one_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_symbol(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a FakeTensor, or an input or a result of the program that make_fx records. Its state is made
    by operations that the modes see. Others are constants to a program, and so is their state."""
    if fake_mode_of(tensor) is not None:
        return True
    mode = proxy_mode()
    if mode is None:
        return False
    from torch.fx.experimental.proxy_tensor import get_proxy_slot

    return get_proxy_slot(tensor, mode.tracer, None) is not None


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor has memory and nothing of its own that replaces torch's operations, or is a FakeTensor."""
    kind = type(tensor)
    return kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__ or fake_mode_of(tensor) is not None


def obstacle_of_memory() -> str:
    """Why a tensor with memory cannot be in an operation under the modes that are on; "": it can."""
    mode = torch._C._get_dispatch_mode(_KEYS.FAKE)
    if mode is None or mode.allow_non_fake_inputs:
        return ""
    return (
        "its parameters have memory, and under a FakeTensorMode each must be a FakeTensor. Make model and optimizer "
        "under that mode, or step outside of it."
    )


def modes_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Around the making of state of a parameter: no mode for one with memory, whatever modes are on; `mode_of` for any
    other."""
    return mode_of(tensor) if is_symbol(tensor) else _disable_current_modes()


def mode_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Around an operation of a tensor: of a FakeTensor its mode, where that is left by now."""
    mode = fake_mode_of(tensor)
    is_entered = mode is None or torch._C._get_dispatch_mode(_KEYS.FAKE) is mode
    return nullcontext() if is_entered else cast("AbstractContextManager[Any]", mode)


def beside(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The other tensor as one of the kind of the first: a FakeTensor where that is one."""
    mode = fake_mode_of(tensor)
    return other if mode is None or fake_mode_of(other) is not None else cast("torch.Tensor", mode.from_tensor(other))
