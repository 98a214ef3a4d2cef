"""Code tables: the value of each 8-bit or 4-bit code, as sorted float32 values in [-1, 1] (FP4: by bit pattern)."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from statistics import NormalDist

import torch

from optim8 import _native, codec
from optim8.functional import _check

_SIZE = 256

# Yoshida 2023, arXiv 2306.06965: the 4-bit code for blocks of 64 values, divided by their absmax.
_AF4 = (
    *(1.0, 0.72424863, 0.55496234, 0.42563882, 0.31675666, 0.21961274, 0.12934483, 0.04273164),
    *(0.0, -0.04934812, -0.14982478, -0.25607552, -0.3736951, -0.51243739, -0.69441008, -1.0),
)
# The 4-bit integers whose negative is one too; 0 is there twice.
_INT4 = tuple(i / 7 for i in (*range(7, -1, -1), *range(0, -8, -1)))

_CPU = torch.device("cpu")
_shared: dict[tuple[str, torch.device], torch.Tensor] = {}


def _padded(values: Iterable[float]) -> torch.Tensor:
    """The values, sorted, with more zeros up to 256 entries."""
    listed = list(values)
    return torch.tensor(sorted([*listed, *[0.0] * (_SIZE - len(listed))]), dtype=torch.float32, device="cpu")


def create_dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> torch.Tensor:
    """The dynamic code: decades of ten, each split evenly, twice as finely as the one below.

    Args:
        signed: with negative values, or without (and then twice as fine).
        max_exponent_bits: number of decades, 1 to total_bits - 1; with `signed` also total_bits, of which the lowest
            decade then has no values.
        total_bits: 2 to 8. Fewer than 8 leave the rest of the 256 entries 0.

    Returns:
        float32 [256], sorted, on the CPU.

    Raises:
        ValueError: the bits are out of range.

    Source: Dettmers 2015, arXiv 1511.04561; Dettmers et al. 2021, arXiv 2110.02861.

    Examples:
        >>> from optim8 import functional as F
        >>> F.create_dynamic_map()[[0, 127, 128, 255]]
        tensor([-9.9297e-01,  0.0000e+00,  5.5000e-07,  1.0000e+00])
    """
    decades = max_exponent_bits - 1 if signed and max_exponent_bits == total_bits else max_exponent_bits
    return torch.tensor(_native.cpu().dynamic_map(signed, decades, total_bits), dtype=torch.float32, device="cpu")


def create_linear_map(signed: bool = True, total_bits: int = 8, add_zero: bool = True) -> torch.Tensor:
    """Evenly spaced values from -1 (or 0) to 1.

    Args:
        signed: from -1, or from 0.
        total_bits: 2 to 8. Fewer than 8 leave the rest of the 256 entries 0.
        add_zero: with `signed`, take an odd number of values, so that 0 is one of them; signed codes of fewer than 8
            bits always do.

    Returns:
        float32 [256], sorted, on the CPU.

    Raises:
        ValueError: total_bits is out of range.

    Examples:
        >>> from optim8 import functional as F
        >>> F.create_linear_map(signed=False)[:3] * 255
        tensor([0., 1., 2.])
    """
    _check_bits("create_linear_map", total_bits)
    count = 2**total_bits
    if signed and (add_zero or total_bits < 8):
        count -= 1
    low = -(count - 1) if signed else 0
    return _padded(i / (count - 1) for i in range(low, count, 2 if signed else 1))


def create_normal_map(offset: float = 0.9677083, use_extra_value: bool = True) -> torch.Tensor:
    """Quantiles of the normal distribution, divided by the largest: the values of NF4, padded to 256.

    Args:
        offset: the outermost quantile, between 0.5 and 1.
        use_extra_value: 8 positive and 7 negative values beside 0; otherwise 7 and 7.

    Returns:
        float32 [256], sorted, on the CPU; zeros fill the middle.

    Raises:
        ValueError: offset is not between 0.5 and 1.

    Source: Dettmers et al. 2023 (QLoRA), arXiv 2305.14314.

    Examples:
        >>> from optim8 import functional as F
        >>> F.create_normal_map()[[0, 1, 127, 255]]
        tensor([-1.0000, -0.6962,  0.0000,  1.0000])
    """
    if not 0.5 < offset < 1:
        raise ValueError(f"create_normal_map: offset must be a quantile between 0.5 and 1, got {offset}.")

    # In float32, as for the published values of NF4: grid, quantiles and quotients are each rounded.
    def quantiles(count: int) -> list[float]:
        grid = torch.linspace(offset, 0.5, count + 1, dtype=torch.float32, device="cpu")
        return [NormalDist().inv_cdf(at) for at in grid[:-1].tolist()]

    positive = quantiles(8 if use_extra_value else 7)
    values = _padded([*positive, *(-value for value in quantiles(7))])
    return values / values.max()


def create_fp8_map(
    signed: bool = True, exponent_bits: int = 5, precision_bits: int = 2, total_bits: int = 8
) -> torch.Tensor:
    """All values of a small floating-point format, divided by the largest.

    A pattern with exponent field e > 0 and fraction f in [0, 1) has the value (1 + f) * 2^(e - 1); with e = 0 it has
    f / 4, as in the tables of the field (in IEEE 754 it would have f).

    Args:
        signed: with a sign bit.
        exponent_bits: width of the exponent field, at least 1.
        precision_bits: width of the fraction.
        total_bits: their sum with the sign bit, at most 8. Fewer than 8 leave the rest of the 256 entries 0.

    Returns:
        float32 [256], sorted, on the CPU.

    Raises:
        ValueError: the bits do not add up.

    Examples:
        >>> from optim8 import functional as F
        >>> F.create_fp8_map(exponent_bits=2, precision_bits=1, total_bits=4)[-7:] * 12
        tensor([ 0.2500,  2.0000,  3.0000,  4.0000,  6.0000,  8.0000, 12.0000])
    """
    who = "create_fp8_map"
    _check_bits(who, total_bits)
    if exponent_bits < 1 or precision_bits < 0 or exponent_bits + precision_bits + int(signed) != total_bits:
        raise ValueError(
            f"{who}: exponent_bits (1 or more), precision_bits and the sign bit must make total_bits={total_bits}, "
            f"got exponent_bits={exponent_bits}, precision_bits={precision_bits}, signed={signed}."
        )
    steps = 2**precision_bits
    values = []
    for exponent, step in product(range(2**exponent_bits), range(steps)):
        fraction = step / steps
        values.append(fraction / 4 if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - 1))
    top = max(values)
    magnitudes = [value / top for value in values]
    return _padded([*magnitudes, *(-value for value in magnitudes)] if signed else magnitudes)


def get_4bit_type(typename: str, device: torch.device | str | None = None, blocksize: int = 64) -> torch.Tensor:
    """The 16 values of a 4-bit code.

    Args:
        typename: "nf4" (rising), "fp4" (by bit pattern), "int4" (7/7 to -7/7, falling, 0 twice) or "af4" (falling).
        device: of the tensor; None is torch's default device.
        blocksize: the block size that the code is for; "af4" exists for 64 only.

    Returns:
        float32 [16], from -1 to 1.

    Raises:
        ValueError: the type is none of these, or has no values for this block size; or there is no such device.

    Source: QLoRA, arXiv 2305.14314 (nf4); arXiv 2306.06965 (af4).

    Examples:
        >>> from optim8 import functional as F
        >>> F.get_4bit_type("fp4", "cpu")[:4] * 12
        tensor([ 0.0000,  0.0625,  8.0000, 12.0000])
    """
    who = "get_4bit_type"
    device = None if device is None else _check.device(who, device)
    if typename == "af4" and blocksize != 64:
        raise ValueError(f"{who}: af4 has values for blocksize 64 only, got {blocksize}. Use nf4.")
    if typename in ("nf4", "fp4"):
        values = _native.cpu().fourbit_map(typename)
    elif typename == "af4":
        values = _AF4
    elif typename == "int4":
        values = _INT4
    else:
        raise ValueError(f"{who}: typename must be 'nf4', 'fp4', 'int4' or 'af4', got {typename!r}.")
    return torch.tensor(values, dtype=torch.float32, device=device)


def _check_bits(who: str, total_bits: int) -> None:
    if not 2 <= total_bits <= 8:
        raise ValueError(f"{who}: total_bits must be from 2 to 8, got {total_bits}.")


def shared_code(name: str, like: torch.Tensor) -> torch.Tensor:
    """The table "dynamic" (signed), "nf4" or "fp4" on a tensor's device, made once. Nobody may write to it."""
    if not _shared:
        _native.cpu()  # raises where it was not built, and says what to do
    if _check.is_traced(like):  # a tracer's operators take tensors of its own kind only
        return torch.tensor(_shared[name, _CPU].tolist(), dtype=torch.float32, device=like.device)
    key = (name, like.device)
    if key in _shared:
        return _shared[key]
    if _check.through_op(like):
        return _shared[name, _CPU].to(like.device)
    _shared[key] = codec.code_table(True, like.device) if name == "dynamic" else _shared[name, _CPU].to(like.device)
    return _shared[key]


def _make_shared() -> None:
    """Make the tables at import, because torch.compile cannot look into native code."""
    if _native.cpu_or_none() is not None:
        _shared["dynamic", _CPU] = codec.code_table(True, _CPU)
        _shared["nf4", _CPU] = get_4bit_type("nf4", _CPU)
        _shared["fp4", _CPU] = get_4bit_type("fp4", _CPU)


_make_shared()
