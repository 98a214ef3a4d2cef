"""LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339): rows of a matrix as int8 with one absmax each, apart from
columns with outliers. int8_matmul.py multiplies two such matrices."""

from __future__ import annotations

from math import inf

import torch

from optim8 import _native
from optim8.functional import _check


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

    Examples:
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
    check_matrix(who, "A", A, _check.FLOATS)
    threshold = _check_threshold(who, threshold)
    if _check.through_op(A):
        return torch.ops.optim8.int8_vectorwise_quant(A, threshold)  # type: ignore[no-any-return]
    codes = torch.empty(A.shape, dtype=torch.int8, device=A.device)
    stats = torch.empty(row_count(A), dtype=torch.float32, device=A.device)
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

    Examples:
        >>> import torch
        >>> from optim8 import functional as F
        >>> F.int8_vectorwise_dequant(torch.tensor([[127, -127]], dtype=torch.int8), torch.tensor([2.0]))
        tensor([[ 2., -2.]])
    """
    who = "int8_vectorwise_dequant"
    check_matrix(who, "A", A, (torch.int8,))
    stats = check_stats(who, "stats", stats, row_count(A), "rows", A)
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

    Examples:
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
    check_matrix(who, "A", A, _check.FLOATS)
    threshold = _check_threshold(who, threshold)
    shapes = (A.shape, A.shape, (row_count(A),), (A.shape[-1],))
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


def row_count(A: torch.Tensor) -> int:
    return _check.product(A.shape[:-1])


def check_matrix(who: str, name: str, value: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    _check.tensor(who, name, value, dtypes)
    if value.dim() == 0:
        raise ValueError(f"{who}: {name} must have at least one dimension, got a scalar. Pass {name}[None].")


def _check_threshold(who: str, threshold: float) -> float:
    # A tuple of types, not int | float: torch.compile of torch 2.6 cannot trace that.
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise TypeError(f"{who}: threshold must be a float, got {type(threshold).__name__}.")
    # Not math.isfinite, which torch.compile cannot trace where floats may vary.
    if not 0 <= threshold < inf:
        raise ValueError(f"{who}: threshold must be finite and at least 0, got {threshold}. 0 looks for no outliers.")
    return min(max(float(threshold), 2.0**-149), 2.0**127) if threshold else 0.0  # positive and finite in float32 too


def check_stats(who: str, name: str, value: torch.Tensor, count: int, of: str, A: torch.Tensor) -> torch.Tensor:
    value = _check.tensor(who, name, value, (torch.float32,))
    _check.on_device(who, name, value, A.device)
    _check.entries(who, name, value, count, f"one for each of the {of}", "Pass the stats that belong to it.")
    return _check.plain(value).view(-1)
