"""The reference of weights that are wider than their parameter, in numpy and float64: a weight is a place among the
16-bit numbers, counted from 0, and a fraction of the way to the next one."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

Integers = npt.NDArray[np.int64]
BITS_OF_LOW = {torch.uint8: 8, torch.int16: 16}
_MOST = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}  # the bits of infinity
_NAN = {torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}


def value_of(place: Integers, dtype: torch.dtype) -> npt.NDArray[np.float64]:
    """The 16-bit numbers at these places; what follows the largest finite one as if exponents went on."""
    place = np.asarray(place, np.int64)
    beyond = place >= _MOST[dtype]
    number = torch.from_numpy(np.where(beyond, _MOST[dtype] - 1, place).astype(np.int16)).view(dtype)
    value = number.double().numpy()
    below = torch.from_numpy(np.where(beyond, _MOST[dtype] - 2, place).astype(np.int16)).view(dtype).double().numpy()
    return np.where(beyond, 2 * value - below, value)


def place_of(x: npt.NDArray[np.float64], dtype: torch.dtype) -> Integers:
    """Places of |x| in units of 2^-16; of float16 in steps of 2^-13, to nearest even. Infinity's is the first that a
    dtype has no number for."""
    infinite = value_of(np.array([_MOST[dtype]]), dtype)
    is_infinite = np.abs(x) >= infinite
    size = np.where(is_infinite, 0, np.abs(x))
    low, high = np.zeros(size.shape, np.int64), np.full(size.shape, _MOST[dtype], np.int64)
    while (high - low > 1).any():  # the last number that is not larger
        middle = (low + high) // 2
        smaller = value_of(middle, dtype) <= size
        low, high = np.where(smaller, middle, low), np.where(smaller, high, middle)
    begin, end = value_of(low, dtype), value_of(low + 1, dtype)
    steps = 2.0**16 if dtype == torch.bfloat16 else 2.0**13
    part = np.rint((size - begin) / (end - begin) * steps) * (2.0**16 / steps)
    return np.where(is_infinite, _MOST[dtype] * 2**16, low * 2**16 + part.astype(np.int64))


def rounded(place: Integers, master_bits: int, u: npt.NDArray[np.float64]) -> Integers:
    """Places that are kept of a weight with so many bits; `u` in [0, 1), of 16 bits, for those that are dithered."""
    if master_bits == 32:
        return place
    parts = 2**8 if master_bits == 24 else 2**16  # of 2^-16
    return (place + np.floor(u * parts).astype(np.int64)) // parts * parts


def kept(
    x: npt.NDArray[np.float64], dtype: torch.dtype, master_bits: int, u: npt.NDArray[np.float64]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The parameter and the low bits of weights x."""
    bad = np.isnan(x)
    place = np.where(bad, _NAN[dtype] * 2**16, rounded(place_of(np.where(bad, 0, x), dtype), master_bits, u))
    negative = np.signbit(x) & ~bad
    nearest = (place + 2**15) // 2**16
    bits = np.where(negative, nearest + 2**15, nearest).astype(np.uint16).view(np.int16)
    param = torch.from_numpy(bits).view(dtype)
    rest = place - nearest * 2**16
    if master_bits == 24:
        return param, torch.from_numpy((rest // 256).astype(np.int8)).view(torch.uint8)
    return param, torch.from_numpy(rest.astype(np.int16)) if master_bits == 32 else None
