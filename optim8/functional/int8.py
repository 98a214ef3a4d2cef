"""LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339): rows of a matrix as int8 with one absmax each, apart from
columns with outliers, and the exact integer product of two such matrices."""

from __future__ import annotations

from functools import cache
from itertools import product
from math import inf

import torch

from optim8 import _native
from optim8.functional import _check

# int8_scaled_mm computes some rows of the product at a time, with at most this many bytes of int32.
_PANEL_BYTES = 1 << 20


def int8_vectorwise_quant(
    A: torch.Tensor, threshold: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantize each row to int8: round(127 x / absmax of the row), ties to even.

    Args:
        A: float16, bfloat16 or float32 [..., columns]; not changed.
        threshold: above 0, a column with any |x| >= threshold is an outlier column: the absmax of a row leaves those
            entries out, and every entry of the column is stored as 0. 0.0: no outliers.

    Returns:
        int8 of A's shape; absmax of the rows, float32 [rows] (rows: the product of all leading extents); indices of
        outlier columns, int32, rising, or None where threshold is 0.

    absmax is taken over finite values; NaN is stored as 0, an infinity as 127 of its sign (an infinity reaches any
    threshold). Gradients do not flow. With a threshold, the call waits for a CUDA device, because the number of
    outlier columns depends on the values.

    Raises:
        TypeError: A is no dense tensor.
        ValueError: wrong dtype, no dimension, negative or non-finite threshold.

    Example:
        >>> import torch
        >>> from optim8 import functional as F
        >>> codes, stats, columns = F.int8_vectorwise_quant(torch.tensor([[1.0, -2.0, 0.5], [0.0, 9.0, 3.0]]), 6.0)
        >>> codes
        tensor([[ 64,   0,  32],
                [  0,   0, 127]], dtype=torch.int8)
        >>> stats, columns
        (tensor([2., 3.]), tensor([1], dtype=torch.int32))
    """
    who = "int8_vectorwise_quant"
    _check_matrix(who, "A", A, _check.FLOATS)
    threshold = _check_threshold(who, threshold)
    if _check.through_op(A):
        return torch.ops.optim8.int8_vectorwise_quant(A, threshold)  # type: ignore[no-any-return]
    codes = torch.empty(A.shape, dtype=torch.int8, device=A.device)
    stats = torch.empty(_rows(A), dtype=torch.float32, device=A.device)
    flags = torch.empty(A.shape[-1], dtype=torch.uint8, device=A.device) if threshold > 0 else None
    module = _native.module_for(A.device, who)
    module.int8_vectorwise_quant(_check.plain(A), threshold, codes, stats, flags, _native.threads())
    return codes, stats, None if flags is None else flags.nonzero().view(-1).to(torch.int32)


def int8_vectorwise_dequant(A: torch.Tensor, stats: torch.Tensor) -> torch.Tensor:
    """`A * stats / 127`, row by row.

    Args:
        A: int8 [..., columns].
        stats: float32, one for each row.

    Returns:
        float32 of A's shape.

    Raises:
        TypeError: an argument is no dense tensor.
        ValueError: wrong dtype, number of stats or device.

    Example:
        >>> import torch
        >>> from optim8 import functional as F
        >>> F.int8_vectorwise_dequant(torch.tensor([[127, -127]], dtype=torch.int8), torch.tensor([2.0]))
        tensor([[ 2., -2.]])
    """
    who = "int8_vectorwise_dequant"
    _check_matrix(who, "A", A, (torch.int8,))
    stats = _check_stats(who, "stats", stats, _rows(A), "rows", A)
    if _check.through_op(A):
        return torch.ops.optim8.int8_vectorwise_dequant(A, stats)  # type: ignore[no-any-return]
    out = torch.empty(A.shape, dtype=torch.float32, device=A.device)
    _native.module_for(A.device, who).int8_vectorwise_dequant(_check.plain(A), stats, out, _native.threads())
    return out


def int8_double_quant(
    A: torch.Tensor,
    col_stats: torch.Tensor | None = None,
    row_stats: torch.Tensor | None = None,
    out_col: torch.Tensor | None = None,
    out_row: torch.Tensor | None = None,
    threshold: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantize to int8 twice: each row by its absmax (`int8_vectorwise_quant`), and each column by its absmax.

    Args:
        A: float16, bfloat16 or float32 [..., columns]; not changed.
        col_stats, row_stats: float32 [columns] and [rows] to fill; None allocates them.
        out_col, out_row: int8 of A's shape to fill; None allocates them.
        threshold: as for `int8_vectorwise_quant`. In the column codes only the entries that reach it are 0,
            and only they are left out of the absmax.

    Returns:
        row codes, column codes, row stats, column stats, outlier columns (int32, or None where threshold is 0).

    Raises:
        TypeError: an argument is no dense tensor.
        ValueError: wrong dtype, shape or device, negative or non-finite threshold.

    Example:
        >>> import torch
        >>> from optim8 import functional as F
        >>> rows, columns, row_stats, col_stats, _ = F.int8_double_quant(torch.tensor([[1.0, 2.0], [4.0, -2.0]]))
        >>> columns
        tensor([[  32,  127],
                [ 127, -127]], dtype=torch.int8)
        >>> col_stats
        tensor([4., 2.])
    """
    who = "int8_double_quant"
    _check_matrix(who, "A", A, _check.FLOATS)
    threshold = _check_threshold(who, threshold)
    shapes = (A.shape, A.shape, (_rows(A),), (A.shape[-1],))
    names = ("out_row", "out_col", "row_stats", "col_stats")
    given = (out_row, out_col, row_stats, col_stats)
    dtypes = (torch.int8, torch.int8, torch.float32, torch.float32)
    rows, columns, of_rows, of_columns = [
        _check.buffer(who, name, value, dtype, shape, A.device)
        for name, value, dtype, shape in zip(names, given, dtypes, shapes)
    ]
    if _check.through_op(A):
        *new, outliers = torch.ops.optim8.int8_double_quant(A, threshold)
        rows, columns, of_rows, of_columns = [_check.into(buffer, value) for buffer, value in zip(given, new)]
        return rows, columns, of_rows, of_columns, outliers
    flags = torch.empty(A.shape[-1], dtype=torch.uint8, device=A.device) if threshold > 0 else None
    module = _native.module_for(A.device, who)
    values = _check.plain(A)
    module.int8_vectorwise_quant(values, threshold, rows, of_rows, flags, _native.threads())
    module.int8_columnwise_quant(values, threshold, columns, of_columns, _native.threads())
    return rows, columns, of_rows, of_columns, None if flags is None else flags.nonzero().view(-1).to(torch.int32)


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

    Example:
        >>> import torch
        >>> from optim8 import functional as F
        >>> F.int8_linear_matmul(torch.tensor([[1, 2]], dtype=torch.int8), torch.tensor([[3, 4], [5, 6]]).char())
        tensor([[11, 17]], dtype=torch.int32)
    """
    who = "int8_linear_matmul"
    _check_matrix(who, "A", A, (torch.int8,))
    _check_weight(who, A, B)
    if dtype != torch.int32:
        raise ValueError(f"{who}: dtype must be torch.int32, got {dtype}. Convert the result.")
    shape = (*A.shape[:-1], B.shape[0])
    sums = _check.buffer(who, "out", out, dtype, shape, A.device) if out is not None else None
    if _check.through_op(A):
        return _check.into(out, torch.ops.optim8.int8_linear_matmul(A, B))
    return _product(A.reshape(_rows(A), A.shape[-1]), B, sums, shape)


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

    Example:
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

    Example:
        >>> import torch
        >>> from optim8 import functional as F
        >>> A, B = torch.randn(4, 64), torch.randn(8, 64)
        >>> (qa, sa, _), (qb, sb, _) = F.int8_vectorwise_quant(A), F.int8_vectorwise_quant(B)
        >>> bool((F.int8_scaled_mm(qa, qb, sa, sb, dtype=torch.float32) - A @ B.T).abs().max() < 0.5)
        True
    """
    who = "int8_scaled_mm"
    _check_matrix(who, "A", A, (torch.int8,))
    _check_weight(who, A, B)
    row_stats = _check_stats(who, "row_stats", row_stats, _rows(A), "rows", A)
    col_stats = _check_stats(who, "col_stats", col_stats, B.shape[0], "rows of B", A)
    bias = _check_bias(who, bias, B.shape[0], A)
    if dtype not in _check.FLOATS:
        raise ValueError(f"{who}: dtype must be float32, bfloat16 or float16, got {dtype}.")
    if _check.through_op(A):
        return torch.ops.optim8.int8_scaled_mm(A, B, row_stats, col_stats, bias, dtype)  # type: ignore[no-any-return]
    out = torch.empty((_rows(A), B.shape[0]), dtype=dtype, device=A.device)
    module = _native.module_for(A.device, who)
    left = A.reshape(_rows(A), A.shape[-1])
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
    _check_matrix(who, "A", A, (torch.int32,))
    row_stats = _check_stats(who, "row_stats", row_stats, _rows(A), "rows", A)
    col_stats = _check_stats(who, "col_stats", col_stats, A.shape[-1], "columns", A)
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
    if A.device.type == "cpu" and _torch_is_exact(*(extent == 1 for extent in (*A.shape, B.shape[0]))):
        torch._int_mm(A, B.t(), out=out.view(A.shape[0], B.shape[0]))
    else:
        module = _native.module_for(A.device, "int8_linear_matmul")
        module.int8_linear_matmul(A, B, out, _native.threads())
    return out


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


def _rows(A: torch.Tensor) -> int:
    return _check.product(A.shape[:-1])


def _check_matrix(who: str, name: str, value: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    _check.tensor(who, name, value, dtypes)
    if value.dim() == 0:
        raise ValueError(f"{who}: {name} must have at least one dimension, got a scalar. Pass {name}[None].")


def _check_weight(who: str, A: torch.Tensor, B: torch.Tensor) -> None:
    _check.tensor(who, "B", B, (torch.int8,))
    _check.on_device(who, "B", B, A.device)
    if B.dim() != 2 or B.shape[1] != A.shape[-1]:
        raise ValueError(
            f"{who}: B must be a matrix with {A.shape[-1]} columns, as A has, got shape {tuple(B.shape)}. "
            "The product is A @ B.T."
        )


def _check_threshold(who: str, threshold: float) -> float:
    # A tuple of types, not int | float: torch.compile of torch 2.6 cannot trace that.
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise TypeError(f"{who}: threshold must be a float, got {type(threshold).__name__}.")
    # Not math.isfinite, which torch.compile cannot trace where floats may vary.
    if not 0 <= threshold < inf:
        raise ValueError(f"{who}: threshold must be finite and at least 0, got {threshold}. 0 looks for no outliers.")
    return min(max(float(threshold), 2.0**-149), 2.0**127) if threshold else 0.0  # positive and finite in float32 too


def _check_stats(who: str, name: str, value: torch.Tensor, count: int, of: str, A: torch.Tensor) -> torch.Tensor:
    value = _check.tensor(who, name, value, (torch.float32,))
    _check.on_device(who, name, value, A.device)
    _check.entries(who, name, value, count, f"one for each of the {of}", "Pass the stats that belong to it.")
    return _check.plain(value).view(-1)


def _check_bias(who: str, bias: torch.Tensor | None, count: int, A: torch.Tensor) -> torch.Tensor | None:
    if bias is None:
        return None
    bias = _check.floats(who, "bias", bias)
    _check.on_device(who, "bias", bias, A.device)
    _check.entries(who, "bias", bias, count, "one for each column", "Pass bias=None for none.")
    return _check.plain(bias).float().view(-1)
