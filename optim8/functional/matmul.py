"""Products of any number of rows with a packed 4-bit weight, which they unpack a tile at a time."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from optim8 import _native
from optim8.functional import _check
from optim8.functional.blockwise import dequantize_blockwise, plain_absmax
from optim8.functional.codebooks import shared_code
from optim8.functional.packed import (
    STORAGES,
    byte_count,
    check_matrix,
    check_packed,
    check_type,
    read_state,
    stored_bytes,
)
from optim8.functional.quant_state import QuantState

# Values of the weight to unpack at a time: on the CPU few enough to stay in its caches until the product.
_TILE_VALUES = {"cpu": 1 << 19, "cuda": 1 << 24}
_NESTED_BLOCKSIZE = 256


def matmul_4bit(
    A: torch.Tensor,
    B: torch.Tensor,
    quant_state: QuantState,
    out: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Any number of rows times a packed 4-bit weight, `A @ weight.T + bias`, with gradients for A and bias.

    Args:
        A: float32, bfloat16 or float16 [..., K].
        B: the packed codes of a weight [N, K], as `quantize_4bit` returns them, or their transpose; any storage dtype.
            A weight [K, N] that is not square works too, with a DeprecationWarning.
        quant_state: the state of the weight, nested or not.
        out: A's dtype, [..., N], to fill, where no gradient is needed; None allocates it.
        bias: float32, bfloat16 or float16 [N]; None for none.

    Returns:
        tensor [..., N] of A's dtype. A single row of A has the result of `gemv_4bit`. torch multiplies more rows, with
        the weight rounded to A's dtype, so the last bits depend on torch, the processor and the number of threads.

    The forward and the backward pass each unpack a tile at a time: at most 512 Ki values of the weight (on CUDA 16 Mi)
    or one row of it, and one block more. The product with a single row of A unpacks nothing. The gradient of a 16-bit A
    is summed over tiles in float32.

    Raises:
        TypeError: an argument is no dense tensor.
        ValueError: wrong dtype, shape or device; a packed tensor of the wrong length; `out` where gradients are needed.

    Examples:
        >>> import torch
        >>> from optim8 import functional as F
        >>> packed, state = F.quantize_4bit(torch.eye(2, 64), quant_type="nf4")
        >>> A = torch.arange(128.0).view(2, 64).requires_grad_()
        >>> product = F.matmul_4bit(A, packed, state, bias=torch.tensor([0.5, 0.0]))
        >>> product.detach()
        tensor([[ 0.5000,  1.0000],
                [64.5000, 65.0000]])
        >>> product.sum().backward()
        >>> A.grad[:, :3]
        tensor([[1., 1., 0.],
                [1., 1., 0.]])
    """
    who = "matmul_4bit"
    shape, _, blocksize, quant_type = read_state(who, "quant_state", quant_state)
    check_matrix(who, "quant_state.shape", shape)
    columns_first = isinstance(A, torch.Tensor) and A.dim() > 0 and A.shape[-1] == shape[0] != shape[1]
    _check_left(who, A, shape, 0 if columns_first else 1)
    rows = shape[1] if columns_first else shape[0]
    if bias is not None:
        _check.floats(who, "bias", bias)
        _check.entries(who, "bias", bias, rows, "one for each row of the weight", "Pass bias=None for none.")
    with_gradient = torch.is_grad_enabled() and (A.requires_grad or (bias is not None and bias.requires_grad))
    if with_gradient and out is not None:
        raise ValueError(f"{who}: out must be None where gradients are needed. Pass out=None, or use torch.no_grad().")
    if out is not None:
        _check.buffer(who, "out", out, A.dtype, (*A.shape[:-1], rows), A.device)
    state2 = quant_state.state2
    nested: tuple[torch.Tensor | None, ...] = (None, None, None)
    if state2 is not None and state2.blocksize == _NESTED_BLOCKSIZE:
        absmax, nested = state2.absmax, (quant_state.absmax, state2.code, quant_state.offset)
    else:
        absmax = plain_absmax(who, quant_state)
    through_op = with_gradient or _check.through_op(A)
    if columns_first:
        _warn_of_columns_first(who, shape)
        transposed = torch.ops.optim8.gemm_4bit_transposed if through_op else gemm_4bit_transposed
        result = transposed(A, B, shape, absmax, blocksize, quant_type, *nested)
        return _check.into(out, result if bias is None else result + bias.to(A.dtype))
    multiply = torch.ops.optim8.gemm_4bit if through_op else gemm_4bit
    return _check.into(out, multiply(A, B, shape, absmax, blocksize, quant_type, bias, *nested))


def gemm_4bit(
    A: torch.Tensor,
    B: torch.Tensor,
    shapeB: Sequence[int],
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    bias: torch.Tensor | None = None,
    absmax_8bit: torch.Tensor | None = None,
    absmax_code: torch.Tensor | None = None,
    absmax_offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """`matmul_4bit` with the parts of a state. For nested scales, `absmax_8bit` has their codes, `absmax` one float32
    for 256 codes, `absmax_code` the 256 values of the table, and `absmax_offset` what is added to every scale."""
    who = "gemm_4bit"
    nested = (absmax_8bit, absmax_code, absmax_offset)
    weight = _Weight.of_parts(who, A, 1, B, shapeB, absmax, blocksize, quant_type, nested)
    if bias is not None:
        bias = _check.plain(_check.floats(who, "bias", bias)).view(-1)
        _check.on_device(who, "bias", bias, A.device)
        _check.entries(who, "bias", bias, shapeB[0], "one for each row of the weight", "Pass bias=None for none.")
    left = _check.plain(A).view(_check.product(A.shape[:-1]), shapeB[1])
    if left.shape[0] == 1:
        result = weight.times_row(left, bias)
    else:
        bias = None if bias is None else bias.to(A.dtype)
        result = left.new_empty(left.shape[0], shapeB[0])
        for rows, tile in weight.tiles(A.dtype):
            result[:, rows] = torch.nn.functional.linear(left, tile, None if bias is None else bias[rows])
    return result.view(*A.shape[:-1], shapeB[0])


def gemm_4bit_transposed(
    A: torch.Tensor,
    B: torch.Tensor,
    shapeB: Sequence[int],
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    absmax_8bit: torch.Tensor | None = None,
    absmax_code: torch.Tensor | None = None,
    absmax_offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """`A @ weight` for A [..., N]: the gradient of the left side of `gemm_4bit`."""
    nested = (absmax_8bit, absmax_code, absmax_offset)
    weight = _Weight.of_parts("gemm_4bit_transposed", A, 0, B, shapeB, absmax, blocksize, quant_type, nested)
    left = _check.plain(A).view(_check.product(A.shape[:-1]), shapeB[0])
    sums = torch.zeros(left.shape[0], shapeB[1], dtype=torch.float32, device=A.device)
    for rows, tile in weight.tiles(A.dtype):
        if A.dtype == torch.float32:
            sums.addmm_(left[:, rows], tile)
        else:
            sums += left[:, rows] @ tile
    return sums.to(A.dtype).view(*A.shape[:-1], shapeB[1])


@dataclass(frozen=True)
class _Weight:
    """A packed weight [rows, columns] whose parts fit together."""

    who: str
    packed: torch.Tensor  # bytes
    rows: int
    columns: int
    absmax: torch.Tensor
    blocksize: int
    quant_type: str
    nested: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None  # codes of the scales, their table, their offset

    @classmethod
    def of_parts(
        cls,
        who: str,
        A: torch.Tensor,
        side: int,
        B: torch.Tensor,
        shape: Sequence[int],
        absmax: torch.Tensor,
        blocksize: int,
        quant_type: str,
        nested: tuple[torch.Tensor | None, ...],
    ) -> _Weight:
        """The weight for a product with A, which must have as many columns as the weight's extent `side` says."""
        check_matrix(who, "shapeB", shape)
        _check_left(who, A, shape, side)
        size = _check.product(shape)
        _check.tensor(who, "B", B, STORAGES)
        _check.on_device(who, "B", B, A.device)
        check_packed(who, "B", B, size)
        check_type(who, quant_type)
        blocks = _check.blocks(size, _check.blocksize_4bit(who, blocksize))
        parts = None
        if nested[0] is not None:
            why = f"{size} values / blocksize {blocksize}, rounded up"
            codes = _check_part(who, "absmax_8bit", nested[0], (torch.uint8,), blocks, why, A)
            code = _check_part(who, "absmax_code", nested[1], (torch.float32,), 256, "one for each code", A)
            offset = _check_part(who, "absmax_offset", nested[2], _check.FLOATS, 1, "the mean of the scales", A)
            parts = (codes, code, offset.float().view(()))
            absmax = _check.absmax(who, absmax, blocks, _NESTED_BLOCKSIZE, A.device)
        else:
            absmax = _check.absmax(who, absmax, size, blocksize, A.device)
        return cls(who, stored_bytes(B, size), shape[0], shape[1], absmax.view(-1), blocksize, quant_type, parts)

    def scales(self, begin: int, end: int) -> torch.Tensor:
        """absmax of the blocks from `begin` to `end`."""
        if self.nested is None:
            return self.absmax[begin:end]
        codes, code, offset = self.nested
        nest = begin // _NESTED_BLOCKSIZE
        absmax = self.absmax[nest : _check.blocks(end, _NESTED_BLOCKSIZE)]
        at = nest * _NESTED_BLOCKSIZE
        decoded = dequantize_blockwise(codes[at:end], None, absmax, code, blocksize=_NESTED_BLOCKSIZE)
        return decoded.add_(offset)[begin - at :]

    def times_row(self, row: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """One row times the weight, the result of `gemv_4bit`; with a bias, the sum is rounded once."""
        absmax = self.scales(0, _check.blocks(self.rows * self.columns, self.blocksize))
        code = shared_code(self.quant_type, row)
        result = row.new_empty(1, self.rows, dtype=row.dtype if bias is None else torch.float32)
        module = _native.module_for(row.device, self.who)
        module.gemv_4bit(row, self.packed, absmax, code, self.blocksize, result, _native.threads())
        return result if bias is None else result.add_(bias).to(row.dtype)

    def tiles(self, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        """Tiles of rows, as values of `dtype`; all tiles use the same memory."""
        device = self.packed.device
        module = _native.module_for(device, self.who)
        together = max(1, _TILE_VALUES[device.type] // max(1, self.columns))
        values = torch.empty(min(self.rows, together) * self.columns + self.blocksize, dtype=dtype, device=device)
        for begin in range(0, self.rows, together):
            end = min(self.rows, begin + together)
            # Blocks run on from row to row, so unpacking starts at the start of the block in which the tile begins.
            block = begin * self.columns // self.blocksize
            at, stop = block * self.blocksize, end * self.columns
            absmax = self.scales(block, _check.blocks(stop, self.blocksize))
            some, unpacked = self.packed[at // 2 : byte_count(stop)], values[: stop - at]
            module.dequantize_4bit(some, absmax, self.quant_type, self.blocksize, unpacked, _native.threads())
            yield slice(begin, end), unpacked[begin * self.columns - at :].view(end - begin, self.columns)


def _warn_of_columns_first(who: str, shape: Sequence[int]) -> None:
    if torch.compiler.is_dynamo_compiling():
        return
    warnings.warn(
        f"{who}: the weight of shape {tuple(shape)} is taken as [K, N], since A has {shape[0]} columns; "
        "a square one is always taken as [N, K]. Re-quantize from the weight in that order.",
        DeprecationWarning,
        stacklevel=3,
    )


def _check_left(who: str, A: torch.Tensor, shape: Sequence[int], side: int) -> None:
    _check.floats(who, "A", A)
    if A.dim() == 0 or A.shape[-1] != shape[side]:
        raise ValueError(
            f"{who}: A must be [..., {shape[side]}] for a weight of shape {tuple(shape)}, got shape {tuple(A.shape)}. "
            f"The product is A @ weight{'.T' if side else ''}."
        )


def _check_part(
    who: str, name: str, value: object, dtypes: Sequence[torch.dtype], count: int, why: str, A: torch.Tensor
) -> torch.Tensor:
    checked = _check.tensor(who, name, value, dtypes)
    _check.on_device(who, name, checked, A.device)
    _check.entries(who, name, checked, count, why, "Pass that of the weight's state.")
    return _check.plain(checked).view(-1)
