"""The table of rules, as csrc/core/rules states it: names and codes of states, hyper-parameters and their bounds.

Nothing else in Python lists rules or names states; it asks here.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import starmap
from typing import Any

import torch

from optim8 import _native


@dataclass(frozen=True)
class Moment:
    """One state of a rule.

    name: the key of its values in float32.
    signed: whether its code has negative values.
    root: whether codes stand for its square root.
    codes, low, absmax: the keys of its 8-bit codes, of their low bytes in 16 bits, and of their scales.
    """

    name: str
    signed: bool
    root: bool = False
    codes: str = field(init=False)
    low: str = field(init=False)
    absmax: str = field(init=False)

    def __post_init__(self) -> None:
        stem = f"{self.name}_root" if self.root else self.name
        # Interned: a step compares the keys of a state by identity.
        object.__setattr__(self, "codes", sys.intern(f"{stem}_codes"))
        object.__setattr__(self, "low", sys.intern(f"{stem}_low"))
        object.__setattr__(self, "absmax", sys.intern(f"{stem}_absmax"))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()  # keys are interned anew, and version 0.1.0 had none for codes

    @property
    def direct(self) -> Moment:
        """The same with codes that stand for its values, as other libraries keep them, and earlier versions did."""
        return Moment(self.name, self.signed) if self.root else self

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys under which a state may have it."""
        direct = self.direct
        return self.name, *dict.fromkeys((self.codes, self.low, self.absmax, direct.codes, direct.absmax))

    @property
    def zero(self) -> int:
        """The code of 0: the middle of the signed code, the start of the unsigned one."""
        zero: int = _native.cpu().zero_code(self.signed)
        return zero

    @property
    def middle(self) -> int:
        """The low byte of a value that its code stands for."""
        middle: int = _native.cpu().middle_low
        return middle

    def key(self, bits: int) -> str:
        """The key of the tensor that has one element for each value of the parameter: codes, or float32."""
        return self.name if bits == 32 else self.codes

    def values(self, entry: Mapping[str, Any]) -> torch.Tensor:
        """That tensor of a parameter's state: codes, or float32."""
        tensor: torch.Tensor = entry[self.key(8 if self.absmax in entry else 32)]
        return tensor


@dataclass(frozen=True)
class Hyper:
    """A hyper-parameter of a rule: an option of a parameter group.

    default: what it is unless told; a bool for a flag, a tuple for a pair.
    least, below: the range of the number, or of each of a pair: least <= value < below.
    """

    name: str
    default: bool | float | tuple[float, float]
    least: float
    below: float
    is_flag: bool = field(init=False)
    is_pair: bool = field(init=False)
    is_number: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_flag", isinstance(self.default, bool))
        object.__setattr__(self, "is_pair", isinstance(self.default, tuple))
        object.__setattr__(self, "is_number", not (self.is_flag or self.is_pair))


@dataclass(frozen=True)
class Rule:
    """An update rule: its states in order, and its hyper-parameters.

    torch_name: the optimizer of torch.optim with the same rule; None: there is none.
    functional_name: what optimizer_update_* of the functional API call it; None: they do not have it.
    """

    name: str
    torch_name: str | None
    functional_name: str | None
    moments: tuple[Moment, ...]
    hypers: tuple[Hyper, ...]

    def has(self, hyper: str) -> bool:
        return any(known.name == hyper for known in self.hypers)


def _hypers(rows: list[tuple[str, int, float, float, float, bool]]) -> tuple[Hyper, ...]:
    hypers: dict[str, Hyper] = {}
    for name, part, initial, least, below, is_flag in rows:
        default: bool | float | tuple[float, float] = bool(initial) if is_flag else initial
        if part == 0:
            default = (initial, initial)
        elif part > 0:
            first = hypers[name].default
            default = (first[0] if isinstance(first, tuple) else 0.0, initial)
        hypers[name] = Hyper(name, default, least, below)
    return tuple(hypers.values())


@cache
def every() -> dict[str, Rule]:
    """All rules by name.

    Raises:
        ImportError: the compiled module is missing; says what to do.
    """
    return {
        name: Rule(name, torch_name, functional_name, tuple(starmap(Moment, states)), _hypers(hypers))
        for name, torch_name, functional_name, states, hypers in _native.cpu().rules()
    }


def rule(name: str) -> Rule:
    """The rule of this name, a line of csrc/core/rules/all.h.

    Raises:
        ValueError: there is none.
    """
    known = every()
    if name not in known:
        raise ValueError(f"optim8: rule must be one of {', '.join(known)}, got {name!r}.")
    return known[name]
