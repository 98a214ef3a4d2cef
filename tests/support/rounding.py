"""Float64 values that carry a bound on what float32 arithmetic may have made of them.

Running error analysis (Wilkinson 1963; Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.3):
every operation passes the bounds of its operands on and adds the one rounding float32 makes there, 2^-24 of the result
(plus 2^-150 where the result can be subnormal). A formula written once over this type gives both the exact
result and the tolerance of a float32 implementation that does the same operations; a fused multiply-add rounds less.
Nothing is tuned. The float64 arithmetic itself adds 2^-53 per operation, 2^-29 of what is allowed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float64]

UNIT = 2.0**-24  # half the distance from 1 to the next float32
TINY = 2.0**-150  # half the smallest float32
FLT_MIN = 2.0**-126
FLT_MAX = 2.0**128 - 2.0**104


def half_ulp(dtype: str, x: Array) -> Array:
    """The most that rounding `x` to `dtype` ("float32", "bfloat16", "float16") changes it, overflow aside."""
    unit, tiny = {"float32": (UNIT, TINY), "bfloat16": (2.0**-8, 2.0**-134), "float16": (2.0**-11, 2.0**-25)}[dtype]
    return unit * np.abs(x) + tiny


@dataclass(frozen=True)
class Rounded:
    """`value` is exact (float64); a float32 computation gives something within `error` of it."""

    value: Array
    error: Array

    @staticmethod
    def exact(value: npt.ArrayLike) -> Rounded:
        """An input that float32 holds as it is."""
        value = np.asarray(value, np.float64)
        return Rounded(value, np.zeros_like(value))

    @staticmethod
    def once(value: Array, error: Array, *, underflows: bool = True) -> Rounded:
        """The result of one operation: the operands' `error` and one rounding. Zero from exact zeros is exact."""
        reach = np.abs(value) + error
        tiny = TINY if underflows else 0.0
        return Rounded(value, np.where(reach > 0, error + UNIT * reach + tiny, 0.0))

    @staticmethod
    def of(other: Rounded | float) -> Rounded:
        """A scalar of the step. Computed in double and rounded once, or stored as its reciprocal: two roundings."""
        if isinstance(other, Rounded):
            return other
        value = np.asarray(float(other))
        held = float(np.float32(other)) == float(other)
        return Rounded(value, np.zeros(()) if held else 2 * UNIT * np.abs(value))

    def __neg__(self) -> Rounded:
        return Rounded(-self.value, self.error)

    def __add__(self, other: Rounded | float) -> Rounded:
        b = Rounded.of(other)
        return Rounded.once(self.value + b.value, self.error + b.error, underflows=False)

    def __sub__(self, other: Rounded | float) -> Rounded:
        return self + (-Rounded.of(other))

    def __mul__(self, other: Rounded | float) -> Rounded:
        b = Rounded.of(other)
        with np.errstate(invalid="ignore"):
            spread = np.abs(self.value) * b.error + np.abs(b.value) * self.error + self.error * b.error
        spread = np.where(np.isnan(spread), np.inf, spread)  # no error of one factor, no bound on the other
        zero = (self.value == 0) & (self.error == 0) | (b.value == 0) & (b.error == 0)
        return Rounded.once(self.value * b.value, np.where(zero, 0.0, spread))

    __radd__ = __add__
    __rmul__ = __mul__

    def __truediv__(self, other: Rounded | float) -> Rounded:
        b = Rounded.of(other)
        with np.errstate(divide="ignore", invalid="ignore"):
            value = self.value / b.value
            least = np.abs(b.value) - b.error
            worst = (np.abs(self.value) + self.error) / least
            spread = np.where(least > 0, worst - np.abs(value), np.inf)
        spread = np.where((self.value == 0) & (self.error == 0), 0.0, spread)
        return Rounded.once(value, spread)

    def __matmul__(self, other: Rounded) -> Rounded:
        """A product of matrices, summed in any order: each of n terms passes through n roundings at most, and what is
        below the normal numbers may be lost (Higham, section 3.5)."""
        n, a, b = self.value.shape[-1], np.abs(self.value), np.abs(other.value)
        spread = a @ other.error + self.error @ b + self.error @ other.error
        reach = a @ b + spread
        return Rounded(self.value @ other.value, spread + n * (UNIT / (1 - n * UNIT) * reach + FLT_MIN))

    @property
    def T(self) -> Rounded:
        return Rounded(self.value.T, self.error.T)

    def sqrt(self) -> Rounded:
        value = np.sqrt(self.value)
        above = np.sqrt(self.value + self.error) - value
        below = value - np.sqrt(np.maximum(self.value - self.error, 0))
        return Rounded.once(value, np.maximum(above, below), underflows=False)

    def __abs__(self) -> Rounded:
        return Rounded(np.abs(self.value), self.error)

    def at_least(self, floor: Rounded | float) -> Rounded:
        """The larger of the value and another, or a float32 constant: between the larger of what both may be at least,
        and of what they may be at most."""
        b = floor if isinstance(floor, Rounded) else Rounded.exact(floor)
        value = np.maximum(self.value, b.value)
        below = value - np.maximum(self.value - self.error, b.value - b.error)
        return Rounded(value, np.maximum(below, np.maximum(self.value + self.error, b.value + b.error) - value))

    def sign(self) -> Rounded:
        """-1, 0 or 1; where the operand may be of either sign any of them will do."""
        value = np.sign(self.value)
        either = np.where(self.error > 0, 1 + np.abs(value), 0.0)
        return Rounded(value, np.where(np.abs(self.value) > self.error, 0.0, either))

    def stored(self, dtype: str) -> Rounded:
        """Rounded once more, to the dtype of a tensor. Float32 results are in float32 already."""
        if dtype == "float32":
            return self
        return Rounded(self.value, self.error + half_ulp(dtype, np.abs(self.value) + self.error))
