"""The options that say how wide a 16-bit parameter's weight is, and how it is rounded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args

MasterBits: TypeAlias = Literal[16, 24, 32]
MASTER_BITS = get_args(MasterBits)

# Of weights that are their parameters, rounded to nearest.
PLAIN_WEIGHTS: dict[str, Any] = {"master_bits": 16, "param_rounding": "nearest"}


def has_plain_weights(options: Mapping[str, Any]) -> bool:
    return all(options[name] == value for name, value in PLAIN_WEIGHTS.items())


def counts_steps(options: Mapping[str, Any]) -> bool:
    """Whether a parameter under these options has a count of steps although its rule keeps nothing: a dither needs
    it."""
    return not has_plain_weights(options)


def narrow_only(where: str, options: Mapping[str, Any], shape: tuple[int, ...]) -> str:
    """The message for a float32 parameter of this shape under options that are for narrower ones."""
    bits = options["master_bits"]
    what = f"master_bits={bits}" if bits != 16 else f"param_rounding={options['param_rounding']!r}"
    return (
        f"{where} must be bfloat16 or float16 for {what}, got float32 {shape}. float32 parameters lack no bits: give "
        "them a group with master_bits=16 and param_rounding='nearest', or convert the model first."
    )
