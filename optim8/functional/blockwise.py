"""Blockwise 8-bit quantization: each block of values is divided by its largest magnitude, each quotient stored as the
index of the nearest of 256 table values."""

from __future__ import annotations

from typing import cast

import torch

from optim8 import codec
from optim8.functional import _check
from optim8.functional.codebooks import shared_code
from optim8.functional.quant_state import QuantState


def quantize_blockwise(
    A: torch.Tensor,
    code: torch.Tensor | None = None,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> tuple[torch.Tensor, QuantState]:
    """Quantize a tensor to 8-bit codes, in blocks of `blocksize` values (row after row; the last may be shorter).

    Args:
        A: float32, bfloat16 or float16, any shape and strides.
        code: float32 [256], sorted; None is the signed dynamic code (`create_dynamic_map`). That it is sorted is
            checked on the CPU only: on a GPU that would wait for the device.
        absmax: float32 [ceil(n / blocksize)] to fill (also with `nested`); None allocates it.
        out: uint8 of A's shape to fill; None allocates it.
        blocksize: at least 1; on CUDA a power of two from 32 to 4096.
        nested: quantize absmax as well, after its mean is subtracted.

    Returns:
        the codes (uint8 of A's shape, contiguous) and the state that `dequantize_blockwise` needs.

    A value takes the code of the nearest table value, in float32 arithmetic. absmax is taken over the finite values of
    the block; NaN is stored as the code of 0, an infinity as the last code of its sign. Gradients do not flow.

    Raises:
        TypeError: an argument is no dense tensor, or blocksize no int.
        ValueError: wrong dtype, shape, device, block size or table.

    Source: Dettmers et al. 2021, arXiv 2110.02861.

    Examples:
        >>> import torch
        >>> from optim8 import functional as F
        >>> codes, state = F.quantize_blockwise(torch.tensor([-1.0, 0.0, 0.3, 1.0]), blocksize=64)
        >>> codes
        tensor([  0, 127, 205, 255], dtype=torch.uint8)
        >>> F.dequantize_blockwise(codes, state)
        tensor([-0.9930,  0.0000,  0.3039,  1.0000])
    """
    who = "quantize_blockwise"
    _check.floats(who, "A", A)
    _check.blocksize_8bit(who, blocksize, A.device)
    code = _read_code(who, code, A)
    scales = _check.absmax(who, absmax, A.numel(), blocksize, A.device, fill=True)
    codes = _check.buffer(who, "out", out, torch.uint8, A.shape, A.device)
    if _check.through_op(A):
        new_codes, new_scales = torch.ops.optim8.quantize_blockwise(A, code, blocksize)
        codes, scales = _check.into(out, new_codes), _check.into(absmax, new_scales)
    else:
        codec.encode(who, _check.plain(A), code, _native_block(blocksize, A.numel()), codes, scales)
    state = QuantState(scales, code=code, blocksize=blocksize, dtype=A.dtype)
    return codes, nest_absmax(state, blocksize) if nested else state


def dequantize_blockwise(
    A: torch.Tensor,
    quant_state: QuantState | None = None,
    absmax: torch.Tensor | None = None,
    code: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> torch.Tensor:
    """The values of 8-bit codes: table value times the block's absmax, in float32, rounded once.

    Args:
        A: uint8 codes, any shape and strides.
        quant_state: as `quantize_blockwise` returns it; absmax, code and blocksize then come from it.
        absmax: float32 [ceil(n / blocksize)]; needed without quant_state, and ignored with it.
        code: float32 [256]; None is the signed dynamic code. Ignored with quant_state.
        out: of A's shape, to fill: of the state's dtype; without a state float32, bfloat16 or float16.
        blocksize: at least 1; on CUDA a power of two from 32 to 4096. Ignored with quant_state.
        nested: True needs a nested quant_state; a nested quant_state needs no `nested`.

    Returns:
        tensor of A's shape, of `quant_state.dtype`; float32 without a state.

    Raises:
        TypeError: an argument is no dense tensor.
        ValueError: neither quant_state nor absmax; wrong dtype, shape, device, block size or table.

    Examples:
        >>> import torch
        >>> from optim8 import functional as F
        >>> F.dequantize_blockwise(torch.tensor([0, 127, 255], dtype=torch.uint8), absmax=torch.tensor([2.0]))
        tensor([-1.9859,  0.0000,  2.0000])
    """
    who = "dequantize_blockwise"
    _check.tensor(who, "A", A, (torch.uint8,))
    dtype = torch.float32
    if quant_state is not None:
        absmax, code, blocksize, dtype = _read_state(who, quant_state, nested)
    elif absmax is None:
        raise ValueError(f"{who}: needs quant_state or absmax, got neither. Pass the state of quantize_blockwise.")
    elif nested:
        raise ValueError(f"{who}: nested=True needs a nested quant_state, got absmax alone. Pass quant_state.")
    _check.blocksize_8bit(who, blocksize, A.device)
    code = _read_code(who, code, A)
    absmax = _check.absmax(who, absmax, A.numel(), blocksize, A.device)
    if out is not None and quant_state is None:
        dtype = _check.floats(who, "out", out).dtype
    values = _check.buffer(who, "out", out, dtype, A.shape, A.device)
    if _check.through_op(A):
        return _check.into(out, torch.ops.optim8.dequantize_blockwise(A, absmax, code, blocksize, dtype))
    codec.decode(who, _check.plain(A), absmax, code, _native_block(blocksize, A.numel()), values)
    return values


def nest_absmax(state: QuantState, blocksize: int) -> QuantState:
    """The state with absmax quantized in blocks of `blocksize` after its mean is subtracted."""
    offset = _mean(state.absmax)
    codes, state2 = quantize_blockwise(state.absmax - offset, blocksize=blocksize)
    return QuantState(
        codes,
        shape=state.shape,
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=state.dtype,
        offset=offset,
        state2=state2,
    )


def _mean(absmax: torch.Tensor) -> torch.Tensor:
    """The mean of float32 magnitudes: the same bits on every device, and in whatever order torch's threads add.

    Sums of integers have no order: each value is split in two of 31 bits, in units of 2^-31 and 2^-62 of the largest.
    """
    if absmax.numel() == 0:
        return absmax.new_zeros(())
    top = absmax.max().double().clamp_min(2.0**-149)
    scaled = absmax.double().div_(top).mul_(2.0**31)
    high = scaled.round()
    low = scaled.sub_(high).mul_(2.0**31).round_()
    units = high.long().sum().double() + low.long().sum().double() * 2.0**-31
    return (units / absmax.numel() * 2.0**-31 * top).float()


def plain_absmax(who: str, state: QuantState) -> torch.Tensor:
    """absmax as float32, decoded where it is nested."""
    if state.state2 is None:
        return state.absmax
    if need_state(who, "quant_state.state2", state.state2)[0].nested:
        raise ValueError(f"{who}: quant_state.state2 must not be nested itself. Pass a state of quantize_*.")
    offset = _check.floats(who, "quant_state.offset", state.offset)
    _check.entries(who, "quant_state.offset", offset, 1, "the mean of absmax", "Pass a state of quantize_*.")
    absmax = dequantize_blockwise(state.absmax, state.state2)
    _check.on_device(who, "quant_state.offset", offset, absmax.device, "absmax")
    return absmax + offset.float().view(())


def need_state(who: str, name: str, state: object) -> tuple[QuantState, torch.dtype]:
    """The state, and the dtype of its values. One of bitsandbytes will do: it has the same attributes."""
    if (type(state).__module__, type(state).__name__) == ("bitsandbytes.functional", "QuantState"):
        state = cast("QuantState", state)
    elif not isinstance(state, QuantState):
        raise TypeError(f"{who}: {name} must be an optim8.functional.QuantState, got {type(state).__name__}.")
    if state.dtype is None or state.dtype not in _check.FLOATS:
        raise ValueError(f"{who}: {name}.dtype must be float32, bfloat16 or float16, got {state.dtype}.")
    return state, state.dtype


def _read_state(who: str, quant_state: QuantState, nested: bool) -> tuple[torch.Tensor, torch.Tensor, int, torch.dtype]:
    """absmax, table, block size and dtype of an 8-bit state, after a check that they are there."""
    state, dtype = need_state(who, "quant_state", quant_state)
    if nested and not state.nested:
        raise ValueError(f"{who}: nested=True needs a nested quant_state, got one without state2. Pass nested=False.")
    if state.code is None or state.blocksize is None:
        raise ValueError(f"{who}: quant_state must have a code (256 values) and a blocksize, got {state!r}.")
    return plain_absmax(who, state), state.code, state.blocksize, dtype


def _native_block(blocksize: int, size: int) -> int:
    """The same blocks, by a number with which native arithmetic does not overflow."""
    return min(blocksize, max(size, 1))


def _read_code(who: str, code: torch.Tensor | None, A: torch.Tensor) -> torch.Tensor:
    if code is None:
        return shared_code("dynamic", A)
    code = _check.tensor(who, "code", code, (torch.float32,))
    _check.on_device(who, "code", code, A.device)
    _check.entries(who, "code", code, 256, "one for each code", "Pad a shorter one, as create_*_map do.")
    return _check.plain(code)
