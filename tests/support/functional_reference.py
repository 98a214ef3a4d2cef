"""Float64 definitions of the functional API, by brute force: the nearest entry, the exact product.

Sources: QLoRA, arXiv 2305.14314 (4-bit codes); LLM.int8(), arXiv 2208.07339.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

import optim8.functional as F
from support.harness import hostile
from support.rounding import UNIT, Array

Bytes = npt.NDArray[np.uint8]

NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
_FP4_MAGNITUDES = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12
FP4 = np.concatenate([_FP4_MAGNITUDES, 0.0 - _FP4_MAGNITUDES]).astype(np.float32)
TABLES = {"nf4": NF4, "fp4": FP4}
ZERO = {"nf4": 7, "fp4": 0}
TOP = {"nf4": (0, 15), "fp4": (11, 3)}  # the codes of -1 and 1


def values_of(t: torch.Tensor) -> Array:
    """The values of a tensor, row after row, in float64."""
    return t.detach().to("cpu", torch.float64).contiguous().flatten().numpy()


def finite_max(x: Array, blocksize: int) -> Array:
    """The largest finite magnitude of each block."""
    padded = np.zeros(-(-x.size // blocksize) * blocksize)
    padded[: x.size] = np.where(np.isfinite(x), np.abs(x), 0)
    return padded.reshape(-1, blocksize).max(axis=1) if x.size else np.zeros(0)


def spread(absmax: Array, blocksize: int, size: int) -> Array:
    """The block value of each element."""
    return np.repeat(absmax, blocksize)[:size]


def quotients(x: Array, absmax: Array, blocksize: int) -> Array:
    """x / absmax as the API defines it for anything: NaN counts as 0, an infinity stays one."""
    scale = spread(absmax, blocksize, x.size)
    with np.errstate(invalid="ignore"):
        y = np.where(scale > 0, x / np.where(scale > 0, scale, 1), 0)
    y = np.where(np.isinf(x), x, y)
    return np.where(np.isnan(x), 0, y)


def not_nearest(codes: Bytes, y: Array, table: npt.NDArray[np.float32], slack: Array | float) -> npt.NDArray[np.intp]:
    """Positions whose entry is not the nearest to any quotient within `slack` of `y`, which ends where the table does.

    An entry nearest to some y' within d of y is at most 2 d farther from y than the best. Beside `slack`, y itself is
    rounded three times: 1 / absmax, the product, and the midpoint it is compared with.
    """
    entries = table.astype(np.float64)
    y = np.clip(y, entries.min(), entries.max())
    best = np.full(y.shape, np.inf)
    for entry in entries:
        best = np.minimum(best, np.abs(entry - y))
    return np.flatnonzero(np.abs(entries[codes] - y) > best + 2 * (3 * UNIT * np.abs(y) + slack))


def unpack(packed: torch.Tensor, size: int) -> Bytes:
    """The 4-bit codes of packed bytes, the first in the high nibble."""
    stored = packed.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return np.stack([stored >> 4, stored & 15], axis=1).flatten()[:size]


def int8_codes(x: Array, absmax: Array) -> Array:
    """round(127 x / absmax), ties to even: 127 x is exact in float64, and a quotient on a tie is exact too."""
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.rint(127 * x / absmax)
    return np.where(np.isinf(x), 127 * np.sign(x), np.nan_to_num(codes, nan=0, posinf=0, neginf=0))


def awkward(shape: tuple[int, ...], dtype: torch.dtype, seed: int, bad: bool = False) -> torch.Tensor:
    """Values over many decades with zeros, zero and tiny blocks and one huge value; `bad`: with NaN and infinities."""
    n = int(np.prod(shape))
    x = hostile(n, dtype, seed)
    if bad and n > 9:
        x[3], x[n // 2], x[n - 1] = float("nan"), float("inf"), float("-inf")
    return x.view(shape)


def every_result(x: torch.Tensor) -> list[torch.Tensor]:
    """Of the functions of the API, of a matrix and of what they made of it."""
    codes, state = F.quantize_blockwise(x, blocksize=256)
    packed, state4 = F.quantize_4bit(x, quant_type="nf4")
    rows, columns, of_rows, of_columns, outliers = F.int8_double_quant(x, threshold=2.0)
    assert outliers is not None
    sums = F.int8_linear_matmul(rows, rows)
    return [
        *(codes, state.absmax, F.dequantize_blockwise(codes, state)),
        *(packed, state4.absmax, F.dequantize_4bit(packed, state4), F.gemv_4bit(x[:1], packed.t(), state=state4)),
        *(rows, columns, of_rows, of_columns, outliers),
        *(F.int8_vectorwise_dequant(rows, of_rows), sums, F.int8_mm_dequant(sums, of_rows, of_rows, bias=of_rows)),
    ]
