"""Products of matrices that int8.py quantizes: the exact integer product, and its scaling back to floats."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import product

import torch

from optim8 import _native
from optim8.functional import _check
from optim8.functional.int8 import check_matrix, check_stats, row_count

# int8_scaled_mm computes some rows of the product at a time, with at most this many bytes of int32.
_PANEL_BYTES = 1 << 20


def int8_linear_matmul(
    A: torch.Tensor, B: torch.Tensor, out: torch.Tensor | None = None, dtype: torch.dtype = torch.int32
) -> torch.Tensor:
    """The exact integer product `A @ B.T`.

    Args:
        A: int8 [..., K].
        B: int8 [N, K].
        out: int32 [..., N] to fill; None allocates it.
        dtype: only torch.int32.

    Returns:
        int32 [..., N]. A sum always fits for K up to 131071; beyond, one that does not wraps around, as int32 does.

    Raises:
        TypeError: an argument is no dense tensor.
        ValueError: wrong dtype, shape or device.

    Examples:
        >>> import torch
        >>> from optim8 import functional as F
        >>> F.int8_linear_matmul(torch.tensor([[1, 2]], dtype=torch.int8), torch.tensor([[3, 4], [5, 6]]).char())
        tensor([[11, 17]], dtype=torch.int32)
    """
    who = "int8_linear_matmul"
    check_matrix(who, "A", A, (torch.int8,))
    _check_weight(who, A, B)
    if dtype != torch.int32:
        raise ValueError(f"{who}: dtype must be torch.int32, got {dtype}. Convert the result.")
    shape = (*A.shape[:-1], B.shape[0])
    sums = _check.buffer(who, "out", out, dtype, shape, A.device) if out is not None else None
    if _check.through_op(A):
        return _check.into(out, torch.ops.optim8.int8_linear_matmul(A, B))
    return _product(A.reshape(row_count(A), A.shape[-1]), B, sums, shape)


def int8_mm_dequant(
    A: torch.Tensor,
    row_stats: torch.Tensor,
    col_stats: torch.Tensor,
    out: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`A * row_stats * col_stats / 127^2 + bias`: the values of the integer product of two quantized matrices.

    Args:
        A: int32 [..., N], from `int8_linear_matmul`.
        row_stats: float32, one for each row of A.
        col_stats: float32 [N].
        out: float16 of A's shape to fill; None allocates it.
        bias: float16, bfloat16 or float32 [N].

    Returns:
        float16 of A's shape.

    Raises:
        TypeError: an argument is no dense tensor.
        ValueError: wrong dtype, shape or device.

    Examples:
        >>> import torch
        >>> from optim8 import functional as F
        >>> F.int8_mm_dequant(torch.tensor([[127 * 127]], dtype=torch.int32), torch.tensor([2.0]), torch.tensor([3.0]))
        tensor([[6.]], dtype=torch.float16)
    """
    return scale_back("int8_mm_dequant", A, row_stats, col_stats, out, bias, torch.float16)


def int8_scaled_mm(
    A: torch.Tensor,
    B: torch.Tensor,
    row_stats: torch.Tensor,
    col_stats: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float16,
) -> torch.Tensor:
    """`int8_linear_matmul` and `int8_mm_dequant` in one pass; at most 1 MiB of int32 sums is held at a time.

    Args:
        A: int8 [..., K].
        B: int8 [N, K].
        row_stats: float32, one for each row of A.
        col_stats: float32 [N].
        bias: float16, bfloat16 or float32 [N].
        dtype: of the result: float16, bfloat16 or float32.

    Returns:
        tensor [..., N] of `dtype`.

    Raises:
        TypeError: an argument is no dense tensor.
        ValueError: wrong dtype, shape or device.

    Examples:
        >>> import torch
        >>> from optim8 import functional as F
        >>> A, B = torch.randn(4, 64), torch.randn(8, 64)
        >>> (qa, sa, _), (qb, sb, _) = F.int8_vectorwise_quant(A), F.int8_vectorwise_quant(B)
        >>> bool((F.int8_scaled_mm(qa, qb, sa, sb, dtype=torch.float32) - A @ B.T).abs().max() < 0.5)
        True
    """
    who = "int8_scaled_mm"
    check_matrix(who, "A", A, (torch.int8,))
    _check_weight(who, A, B)
    row_stats = check_stats(who, "row_stats", row_stats, row_count(A), "rows", A)
    col_stats = check_stats(who, "col_stats", col_stats, B.shape[0], "rows of B", A)
    bias = _check_bias(who, bias, B.shape[0], A)
    if dtype not in _check.FLOATS:
        raise ValueError(f"{who}: dtype must be float32, bfloat16 or float16, got {dtype}.")
    if _check.through_op(A):
        return torch.ops.optim8.int8_scaled_mm(A, B, row_stats, col_stats, bias, dtype)  # type: ignore[no-any-return]
    out = torch.empty((row_count(A), B.shape[0]), dtype=dtype, device=A.device)
    module = _native.module_for(A.device, who)
    left = A.reshape(row_count(A), A.shape[-1])
    panel = max(1, _PANEL_BYTES // (4 * max(1, B.shape[0])))
    for at in range(0, left.shape[0], panel):
        some = slice(at, at + panel)
        sums = _product(left[some], B, None, (left[some].shape[0], B.shape[0]))
        module.int8_mm_dequant(sums, row_stats[some], col_stats, bias, out[some], _native.threads())
    return out.view(*A.shape[:-1], B.shape[0])


def scale_back(
    who: str,
    A: torch.Tensor,
    row_stats: torch.Tensor,
    col_stats: torch.Tensor,
    out: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`int8_mm_dequant` to any float dtype."""
    check_matrix(who, "A", A, (torch.int32,))
    row_stats = check_stats(who, "row_stats", row_stats, row_count(A), "rows", A)
    col_stats = check_stats(who, "col_stats", col_stats, A.shape[-1], "columns", A)
    bias = _check_bias(who, bias, A.shape[-1], A)
    if dtype not in _check.FLOATS:
        raise ValueError(f"{who}: dtype must be float32, bfloat16 or float16, got {dtype}.")
    values = _check.buffer(who, "out", out, dtype, A.shape, A.device)
    if _check.through_op(A):
        return _check.into(out, torch.ops.optim8.int8_mm_dequant(A, row_stats, col_stats, dtype, bias))
    module = _native.module_for(A.device, who)
    module.int8_mm_dequant(_check.plain(A), row_stats, col_stats, bias, values, _native.threads())
    return values


def _product(A: torch.Tensor, B: torch.Tensor, out: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor:
    """int32 `A @ B.T` for a matrix A, as `shape`."""
    _check.memory("int8_linear_matmul", "A", A)
    _check.memory("int8_linear_matmul", "B", B)
    A, B = _check.plain(A), _check.plain(B)
    out = torch.empty(shape, dtype=torch.int32, device=A.device) if out is None else out
    if _torch_serves(A.device.type, A.shape[0], A.shape[1], B.shape[0]):
        torch._int_mm(A, B.t(), out=out.view(A.shape[0], B.shape[0]))
    else:
        module = _native.module_for(A.device, "int8_linear_matmul")
        module.int8_linear_matmul(A, B, out, _native.threads())
    return out


def _torch_serves(device: str, rows: int, inner: int, columns: int) -> bool:
    """Whether torch's int8 product is to be used: with a GPU's tensor cores for the shapes that it takes there, on a
    CPU where it is right and has instructions for it."""
    if device == "cuda":
        return hasattr(torch, "_int_mm") and rows > 16 and inner > 0 and inner % 8 == columns % 8 == 0 < columns
    return _has_int8_instructions() and _torch_is_exact(rows == 1, inner == 1, columns == 1)


@cache
def _has_int8_instructions() -> bool:
    """Whether this processor multiplies and adds bytes in one instruction. An x86 before Ice Lake and Zen 4 does not;
    torch's product, whose speed rests on that, is then left for ours."""
    known: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch do not tell
    return known.get("architecture") != "x86_64" or any(
        known.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8")
    )


@cache
def _torch_is_exact(one_row: bool, one_inner: bool, one_column: bool) -> bool:
    """Whether torch's int8 product is right on this processor for matrices of this layout; tried once for each layout.

    Where an extent is 1, a matrix has the strides of its transpose; torch 2.13 then writes nothing for some shapes.
    Without VNNI instructions it adds in 16 bits, which saturate.
    """
    if not hasattr(torch, "_int_mm"):
        return False
    several = (2, 67)
    extents = ((1,) if one else several for one in (one_row, one_inner, one_column))
    for rows, inner, columns, left, right in product(*extents, *[(-128, 127)] * 2):
        a = torch.full((rows, inner), left, dtype=torch.int8, device="cpu")
        b = torch.full((columns, inner), right, dtype=torch.int8, device="cpu")
        sums = torch.full((rows, columns), -1, dtype=torch.int32, device="cpu")
        torch._int_mm(a, b.t(), out=sums)
        if not bool((sums == inner * left * right).all()):
            return False
    return True


def _check_weight(who: str, A: torch.Tensor, B: torch.Tensor) -> None:
    _check.tensor(who, "B", B, (torch.int8,))
    _check.on_device(who, "B", B, A.device)
    if B.dim() != 2 or B.shape[1] != A.shape[-1]:
        raise ValueError(
            f"{who}: B must be a matrix with {A.shape[-1]} columns, as A has, got shape {tuple(B.shape)}. "
            "The product is A @ B.T."
        )


def _check_bias(who: str, bias: torch.Tensor | None, count: int, A: torch.Tensor) -> torch.Tensor | None:
    if bias is None:
        return None
    bias = _check.floats(who, "bias", bias)
    _check.on_device(who, "bias", bias, A.device)
    _check.entries(who, "bias", bias, count, "one for each column", "Pass bias=None for none.")
    return _check.plain(bias).float().view(-1)
