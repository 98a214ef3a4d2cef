"""Apply every operation of csrc/core/number.h to hostile float32 numbers and print, as JSON, where it is wrong.

Started by test_numerics_number.py once per instruction set, since OPTIM8_CPU_ISA is read when the module is loaded.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from optim8 import _native

Floats = npt.NDArray[np.float32]

# Zeros, the ends of the subnormal and the normal range, neighbours of 1, halves, and numbers of either size whose
# products round, overflow or vanish. With both signs.
MAGNITUDES = [
    *(0.0, 2.0**-149, 2.0**-148, 2.0**-127, 2.0**-126 - 2.0**-149, 2.0**-126, 2.0**-126 + 2.0**-149, 3e-30, 2.0**-64),
    *(1e-8, 1 / 3, 0.5, 1 - 2.0**-24, 1.0, 1 + 2.0**-23, 2.0, 3.0, 2.0**24 + 2, 1e19, 2.0**126, 2.0**127),
    *((2 - 2.0**-23) * 2.0**127, np.inf),
]


def hostile() -> tuple[Floats, Floats, Floats]:
    """All triples of hostile numbers, and numbers of any bits; their count is no multiple of any vector's."""
    numbers = np.array([*MAGNITUDES, *(-m for m in MAGNITUDES), np.nan, -np.nan], dtype=np.float32)
    triples = np.array(list(itertools.product(numbers, repeat=3)), dtype=np.float32)
    any_bits = np.random.default_rng(0).integers(0, 1 << 32, (100_003, 3), dtype=np.uint32).view(np.float32)
    a, b, c = np.ascontiguousarray(np.concatenate([triples, any_bits]).T)
    return a, b, c


def fma(a: Floats, b: Floats, c: Floats) -> Floats:
    """One rounding: the product is exact in float64, and its sum with c is rounded to odd before it is narrowed."""
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + addend
    part = total - product
    lost = (product - (total - part)) + (addend - part)  # exact (Knuth's two-sum)
    inexact = np.isfinite(total) & (lost != 0) & (total.view(np.int64) & 1 == 0)
    odd = np.where(inexact, np.nextafter(total, np.copysign(np.inf, lost)), total)
    return odd.astype(np.float32)


REFERENCE: dict[str, Callable[[Floats, Floats, Floats], Floats]] = {
    "add": lambda a, b, c: a + b,
    "subtract": lambda a, b, c: a - b,
    "multiply": lambda a, b, c: a * b,
    "negate": lambda a, b, c: np.negative(a),
    "fma": fma,
    "minimum": lambda a, b, c: np.where(a < b, a, b),
    "maximum": lambda a, b, c: np.where(a > b, a, b),
    "absolute": lambda a, b, c: np.abs(a),
    "sign": lambda a, b, c: torch.sign(torch.from_numpy(a)).numpy() + np.float32(0),  # -0 + 0 is 0
    "square_root": lambda a, b, c: np.sqrt(a),
    "reciprocal": lambda a, b, c: np.float32(1) / a,
    "select_less": lambda a, b, c: np.where(a < b, b, c),
    "select_greater": lambda a, b, c: np.where(a > b, b, c),
}


def main() -> None:
    native, values = _native.cpu(), hostile()
    wrong: dict[str, list[str]] = {}
    for name in native.number_operations:
        out = torch.empty(values[0].size)
        native.apply_number_operation(name, *map(torch.from_numpy, values), out)
        with np.errstate(all="ignore"):
            expected = np.asarray(REFERENCE[name](*values), dtype=np.float32)
        actual = out.numpy()
        # What is not a number has the bits that a machine gives it.
        differ = (actual.view(np.uint32) != expected.view(np.uint32)) & ~(np.isnan(actual) & np.isnan(expected))
        at = np.flatnonzero(differ)[:5]
        wrong[name] = [
            f"{[float(v[i]).hex() for v in values]} gives {float(actual[i]).hex()}, not {float(expected[i]).hex()}"
            for i in at
        ]
    print(json.dumps({"used": native.isa_info()["used"], "values": values[0].size, "wrong": wrong}))


if __name__ == "__main__":
    main()
