"""4-bit quantization, NF4 and FP4: two codes to a byte, one absmax to a block; and the product with such a weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from optim8 import _native
from optim8.functional import _check
from optim8.functional.blockwise import nest_absmax, plain_absmax
from optim8.functional.codebooks import shared_code
from optim8.functional.packed import (
    STORAGES,
    as_bytes,
    byte_count,
    check_matrix,
    check_packed,
    check_type,
    packed_shape,
    read_state,
    stored_bytes,
)
from optim8.functional.quant_state import QuantState

_DEFAULT_BLOCKSIZE = 64
_NESTED_BLOCKSIZE = 256


def quantize_4bit(
    A: torch.Tensor,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = 64,
    compress_statistics: bool = False,
    quant_type: str = "fp4",
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[torch.Tensor, QuantState]:
    """Quantize a tensor to 4-bit codes, in blocks of `blocksize` values (row after row; the last may be shorter).

    Args:
        A: float32, bfloat16 or float16, any shape and strides.
        absmax: float32 [ceil(n / blocksize)] to fill (also with `compress_statistics`); None allocates it.
        out: a tensor like the packed result, to fill; None allocates it.
        blocksize: 32, 64, 128, 256, 512, 1024, 2048 or 4096; None is 64.
        compress_statistics: quantize absmax to 8 bits in blocks of 256, after its mean is subtracted.
        quant_type: "fp4" or "nf4".
        quant_storage: the dtype of the packed tensor, which views the bytes.

    Returns:
        the packed codes and the state that `dequantize_4bit` needs. The codes are ceil(n / 2) bytes, with the first
        value in the high nibble, as `quant_storage` of shape [items, 1]; zero bytes fill the last item.

    A value takes the code of the nearest table value; a quotient half-way between two takes the lower one. absmax is
    taken over the finite values of the block; NaN is stored as the code of 0, an infinity as the largest of its sign.
    Gradients do not flow.

    Raises:
        TypeError: an argument is no dense tensor, or blocksize no int.
        ValueError: wrong dtype, shape, device, block size, type or storage.

    Source: Dettmers et al. 2023 (QLoRA), arXiv 2305.14314.

    Examples:
        >>> import torch
        >>> from optim8 import functional as F
        >>> packed, state = F.quantize_4bit(torch.tensor([-2.0, 0.0, 1.2, 2.0]), quant_type="nf4")
        >>> [hex(byte) for byte in packed.flatten()]
        ['0x7', '0xdf']
        >>> F.dequantize_4bit(packed, state)
        tensor([-2.0000,  0.0000,  1.1252,  2.0000])
    """
    who = "quantize_4bit"
    _check.floats(who, "A", A)
    blocksize = _check.blocksize_4bit(who, _DEFAULT_BLOCKSIZE if blocksize is None else blocksize)
    check_type(who, quant_type)
    if quant_storage not in STORAGES:
        raise ValueError(f"{who}: quant_storage must be an integer or float dtype, got {quant_storage}. Use uint8.")
    scales = _check.absmax(who, absmax, A.numel(), blocksize, A.device, fill=True)
    packed = _check.buffer(who, "out", out, quant_storage, packed_shape(A.numel(), quant_storage), A.device)
    if _check.through_op(A):
        new_packed, new_scales = torch.ops.optim8.quantize_4bit(A, blocksize, quant_type, quant_storage)
        packed, scales = _check.into(out, new_packed), _check.into(absmax, new_scales)
    else:
        stored = as_bytes(packed)
        used = byte_count(A.numel())
        stored[used:].zero_()
        module = _native.module_for(A.device, who)
        values = _check.plain(A)
        module.quantize_4bit(values, quant_type, blocksize, stored[:used], scales, _native.threads())
    code = shared_code(quant_type, A)
    state = QuantState(scales, A.shape, code, blocksize, quant_type, A.dtype)
    return packed, nest_absmax(state, _NESTED_BLOCKSIZE) if compress_statistics else state


def dequantize_4bit(
    A: torch.Tensor,
    quant_state: QuantState | None = None,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = 64,
    quant_type: str = "fp4",
) -> torch.Tensor:
    """The values of packed 4-bit codes: table value times absmax, in float32, rounded once.

    Args:
        A: the packed codes of `quantize_4bit`, of any storage dtype. From their transpose, [1, items], comes
            the transpose of the values, as linear layers of the field expect.
        quant_state: as `quantize_4bit` returns it; absmax, blocksize and quant_type then come from it.
        absmax: float32 [ceil(n / blocksize)]; needed without quant_state, and ignored with it.
        out: to fill: of the state's shape and dtype. Needed without quant_state: float32, bfloat16 or float16, of the
            shape of the values.
        blocksize: 32, 64, 128, 256, 512, 1024, 2048 or 4096; None is 64. Ignored with quant_state.
        quant_type: "fp4" or "nf4". Ignored with quant_state.

    Returns:
        tensor of the state's shape and dtype; `out` where it is given.

    Raises:
        TypeError: an argument is no dense tensor.
        ValueError: neither quant_state nor both absmax and out; a packed tensor of the wrong length; wrong dtype,
            shape, device, block size or type.

    Examples:
        >>> import torch
        >>> from optim8 import functional as F
        >>> packed = torch.tensor([[0x3B]], dtype=torch.uint8)
        >>> F.dequantize_4bit(packed, absmax=torch.tensor([2.0]), out=torch.empty(2), quant_type="fp4")
        tensor([ 2., -2.])
    """
    who = "dequantize_4bit"
    _check.tensor(who, "A", A, STORAGES)
    if quant_state is not None:
        shape, dtype, blocksize, quant_type = read_state(who, "quant_state", quant_state)
        absmax = plain_absmax(who, quant_state)
    elif absmax is None or out is None:
        raise ValueError(f"{who}: needs quant_state, or both absmax and out. Pass the state of quantize_4bit.")
    else:
        dtype = _check.floats(who, "out", out).dtype
        shape = out.shape
    blocksize = _check.blocksize_4bit(who, _DEFAULT_BLOCKSIZE if blocksize is None else blocksize)
    check_type(who, quant_type)
    check_packed(who, "A", A, _check.product(shape))
    absmax = _check.absmax(who, absmax, _check.product(shape), blocksize, A.device)
    values = _check.buffer(who, "out", out, dtype, shape, A.device)
    if _check.through_op(A):
        new = torch.ops.optim8.dequantize_4bit(A, absmax, blocksize, quant_type, shape, dtype)
        values = _check.into(out, new)
    else:
        module = _native.module_for(A.device, who)
        module.dequantize_4bit(
            stored_bytes(A, _check.product(shape)), absmax, quant_type, blocksize, values, _native.threads()
        )
    is_transposed = A.dim() == 2 and A.shape[0] == 1 and A.shape[1] > 1
    return values.t() if is_transposed and out is None and values.dim() == 2 else values


def quantize_nf4(
    A: torch.Tensor,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = 64,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[torch.Tensor, QuantState]:
    """`quantize_4bit` with quant_type="nf4"."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "nf4", quant_storage)


def quantize_fp4(
    A: torch.Tensor,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = 64,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[torch.Tensor, QuantState]:
    """`quantize_4bit` with quant_type="fp4"."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "fp4", quant_storage)


def dequantize_nf4(
    A: torch.Tensor,
    quant_state: QuantState | None = None,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = 64,
) -> torch.Tensor:
    """`dequantize_4bit` with quant_type="nf4" (a quant_state has its own)."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "nf4")


def dequantize_fp4(
    A: torch.Tensor,
    quant_state: QuantState | None = None,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = 64,
) -> torch.Tensor:
    """`dequantize_4bit` with quant_type="fp4" (a quant_state has its own)."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "fp4")


def gemv_4bit(
    A: torch.Tensor,
    B: torch.Tensor,
    out: torch.Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
    state: QuantState | None = None,
) -> torch.Tensor:
    """One row times a packed 4-bit weight, `A @ weight.T`, without unpacking the weight to memory.

    Args:
        A: float32, bfloat16 or float16 of shape [..., K] with K values in all.
        B: the packed codes of a weight [N, K], as `quantize_4bit` returns them, or their transpose; any storage dtype.
        out: A's dtype, of shape [..., N], to fill; None allocates it.
        transposed_A, transposed_B: only False; pass the row and the packed weight themselves.
        state: the state of the weight; required.

    Returns:
        tensor [..., N] of A's dtype. The sum is in float32, in the same order for any number of threads and any
        instruction set, and rounded once. Gradients do not flow. It is nearer to the exact product than torch's
        matmul with the unpacked weight, which is rounded to A's dtype first: for a bfloat16 row and a weight [1024,
        1024] the error of torch's is 1.4 times as large (root mean square).

    Raises:
        TypeError: an argument is no dense tensor.
        ValueError: no state; wrong dtype, shape or device; a packed tensor of the wrong length; transposed_* is True.

    Examples:
        >>> import torch
        >>> from optim8 import functional as F
        >>> packed, state = F.quantize_4bit(torch.eye(2, 64), quant_type="nf4")
        >>> F.gemv_4bit(torch.arange(64.0)[None], packed, state=state)
        tensor([[0., 1.]])
    """
    who = "gemv_4bit"
    if state is None:
        raise ValueError(f"{who}: state must be the state of the packed weight, got None. Pass that of quantize_4bit.")
    if transposed_A or transposed_B:
        raise ValueError(f"{who}: transposed_A and transposed_B must be False. Pass row and weight as they are.")
    _check.floats(who, "A", A)
    _check.tensor(who, "B", B, STORAGES)
    shape, _, blocksize, quant_type = read_state(who, "state", state)
    check_matrix(who, "state.shape", shape)
    absmax = _check.absmax(who, plain_absmax(who, state), _check.product(shape), blocksize, A.device)
    code = shared_code(quant_type, A)
    if not _check.through_op(A):
        return packed_product(who, A, B, shape, absmax, code, blocksize, out)
    _check_row(who, A, shape)
    check_packed(who, "B", B, _check.product(shape))
    _check.buffer(who, "out", out, A.dtype, (*A.shape[:-1], shape[0]), A.device)
    return _check.into(out, torch.ops.optim8.gemv_4bit(A, B, shape, absmax, code, blocksize))


def packed_product(
    who: str,
    A: torch.Tensor,
    B: torch.Tensor,
    shape: Sequence[int],
    absmax: torch.Tensor,
    code: torch.Tensor,
    blocksize: int,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """`gemv_4bit` with any table of 16 values."""
    _check_row(who, A, shape)
    _check.on_device(who, "B", B, A.device)
    check_packed(who, "B", B, _check.product(shape))
    result = _check.buffer(who, "out", out, A.dtype, (*A.shape[:-1], shape[0]), A.device)
    module = _native.module_for(A.device, who)
    stored = stored_bytes(B, _check.product(shape))
    module.gemv_4bit(_check.plain(A), stored, absmax, code, blocksize, result, _native.threads())
    return result


def _check_row(who: str, A: torch.Tensor, shape: Sequence[int]) -> None:
    if A.dim() == 0 or A.shape[-1] != shape[1] or A.numel() != shape[1]:
        raise ValueError(
            f"{who}: A must be one row of {shape[1]} values, as the weight has columns, got shape {tuple(A.shape)}. "
            "Use matmul_4bit for more rows."
        )
