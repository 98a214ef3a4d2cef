"""Checks of arguments, before any memory is read or written. Every message says who, what was needed, what came, what
to do."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BLOCKSIZES_4BIT = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _words(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " or " + names[-1]


def tensor(who: str, name: str, value: Any, dtypes: Sequence[torch.dtype], advice: str = "") -> torch.Tensor:
    """Check that `value` is a dense tensor of one of the dtypes. TypeError where it is no dense tensor, ValueError for
    another dtype."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{who}: {name} must be a torch.Tensor, got {type(value).__name__}.")
    if value.layout is not torch.strided:
        raise TypeError(f"{who}: {name} must be a dense tensor, got layout {value.layout}. Call .to_dense() first.")
    if value.dtype not in dtypes:
        needed = _words([name_of(dtype) for dtype in dtypes])
        raise ValueError(f"{who}: {name} must be {needed}, got {name_of(value.dtype)}. {advice or 'Convert it first.'}")
    return value


def floats(who: str, name: str, value: Any) -> torch.Tensor:
    return tensor(who, name, value, FLOATS, "Convert it with .float() first.")


def on_device(who: str, name: str, value: torch.Tensor, device: torch.device, of: str = "A") -> None:
    if value.device != device:
        raise ValueError(f"{who}: {name} must be on {device}, as {of} is, got {value.device}. Move one of them.")


def device(who: str, value: Any) -> torch.device:
    try:
        return torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{who}: device must be one of torch's, got {value!r}. Pass 'cpu' or 'cuda'.") from error


def entries(who: str, name: str, value: torch.Tensor, count: int, why: str, advice: str) -> None:
    if value.numel() != count:
        raise ValueError(f"{who}: {name} must have {count} entries ({why}), got {value.numel()}. {advice}")


def blocksize_4bit(who: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{who}: blocksize must be an int, got {type(value).__name__}. Use one of {BLOCKSIZES_4BIT}.")
    if value not in BLOCKSIZES_4BIT:
        raise ValueError(f"{who}: blocksize must be one of {BLOCKSIZES_4BIT}, got {value}.")
    return value


def blocksize_8bit(who: str, value: Any, device: torch.device) -> int:
    """Check a block size against what the device's kernels for 8-bit codes take."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{who}: blocksize must be an int, got {type(value).__name__}. Use 256, for example.")
    if value < 1:
        raise ValueError(f"{who}: blocksize must be at least 1, got {value}.")
    if device.type == "cuda" and value not in BLOCKSIZES_4BIT:
        raise ValueError(
            f"{who}: blocksize must be a power of two from 32 to 4096 for CUDA tensors, got {value}. "
            "Tensors on the CPU take any."
        )
    return value


def blocks(size: int, blocksize: int) -> int:
    return -(-size // blocksize)


def product(extents: Iterable[int]) -> int:
    """The number of values of a shape, also of a symbolic one: torch.compile does not take math.prod for it."""
    size = 1
    for extent in extents:
        size = size * extent
    return size


def is_extent(value: Any) -> bool:
    """Whether a shape may have this entry: an int, or what tracers have instead for sizes that vary."""
    if torch._C._get_tracing_state() is not None and isinstance(value, torch.Tensor):
        return True
    return isinstance(value, (int, torch.SymInt)) and value >= 0


def absmax(who: str, value: Any, size: int, blocksize: int, device: torch.device, fill: bool = False) -> torch.Tensor:
    """One float32 for each block, to read, or (`fill`) to write the result to; None then allocates it."""
    count = blocks(size, blocksize)
    if fill and value is None:
        return torch.empty(count, dtype=torch.float32, device=device)
    advice = "Pass absmax=None to allocate it." if fill else "Pass the absmax that belongs to these codes."
    value = tensor(who, "absmax", value, (torch.float32,), advice)
    on_device(who, "absmax", value, device)
    entries(who, "absmax", value, count, f"{size} values / blocksize {blocksize}, rounded up", advice)
    return _writable(who, "absmax", value, advice) if fill else plain(value)


def _writable(who: str, name: str, value: torch.Tensor, advice: str) -> torch.Tensor:
    if not value.is_contiguous():
        raise ValueError(f"{who}: {name} must be contiguous, got strides {value.stride()}. {advice}")
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{who}: {name} must not require gradients. Pass {name}.detach().")
    return value


def buffer(
    who: str, name: str, value: Any, dtype: torch.dtype, shape: Sequence[int], device: torch.device, advice: str = ""
) -> torch.Tensor:
    """`value` where it can hold the result, a new tensor where it is None."""
    if value is None:
        return torch.empty(shape, dtype=dtype, device=device)
    advice = advice or f"Pass {name}=None to allocate it."
    value = tensor(who, name, value, (dtype,), advice)
    on_device(who, name, value, device)
    if value.shape != torch.Size(shape):
        raise ValueError(f"{who}: {name} must have shape {tuple(shape)}, got {tuple(value.shape)}. {advice}")
    return _writable(who, name, value, advice)


def memory(who: str, name: str, value: torch.Tensor) -> None:
    """Refuse a tensor whose storage was resized to nothing: torch's own operations would read it all the same."""
    if value.numel() and value.data_ptr() == 0:
        raise ValueError(f"{who}: {name} must have memory, got {tuple(value.shape)} without any. Materialize it first.")


def into(buffer: torch.Tensor | None, result: torch.Tensor) -> torch.Tensor:
    """`result`, copied to `buffer` where there is one."""
    return result if buffer is None else buffer.copy_(result)


def plain(value: torch.Tensor) -> torch.Tensor:
    """The values row after row in memory, detached from autograd; a copy where their order is another."""
    return value.detach().contiguous().resolve_neg()


class _Kernel(threading.local):
    """Whether this thread is inside the kernel of an operator."""

    running = False


kernel = _Kernel()


def is_traced(value: torch.Tensor) -> bool:
    """Whether a tensor has a dispatch of its own, as a tracer's tensors do, which have no memory."""
    kind = type(value)
    return kind is not torch.Tensor and kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def through_op(value: torch.Tensor) -> bool:
    """Whether the registered operator must stand in for the native call, which torch does not see: wherever torch
    records operations (torch.compile, torch.export, torch.jit.trace, make_fx and other dispatch modes), transforms them
    (torch.func), or computes shapes alone (meta tensors)."""
    if torch.compiler.is_dynamo_compiling():
        return True
    if kernel.running:
        return False
    return (
        torch.compiler.is_compiling()
        or is_traced(value)
        or value.is_meta
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._is_functional_tensor(value)
    )
