"""The table of rules, as csrc/core/rules states it: names and codes of states, hyper-parameters and their bounds.

Nothing else in Python lists rules or names states; it asks here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import starmap
from typing import Any, NamedTuple, overload

import torch

from optim8 import _native


@dataclass(frozen=True)
class Moment:
    """One state of a rule.

    name: the key of its values in float32.
    signed: whether its code has negative values.
    root: whether codes stand for its square root.
    wide: whether it has 16 bits where the other states of its rule have 8.
    initial: the hyper-parameter that each of its values starts as; None: they start as 0.
    codes, low, absmax: the keys of its 8-bit codes, of their low bytes in 16 bits, and of their scales.
    """

    name: str
    signed: bool
    root: bool = False
    wide: bool = False
    initial: str | None = None
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
        self.__dict__.update({"root": False, "wide": False, "initial": None, **state})
        self.__post_init__()  # keys are interned anew, and version 0.1.0 had none for codes

    @property
    def direct(self) -> Moment:
        """The same with codes that stand for its values, as other libraries keep them, and earlier versions did."""
        return Moment(self.name, self.signed, wide=self.wide, initial=self.initial) if self.root else self

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

    def keys_in(self, bits: int) -> tuple[str, ...]:
        """The keys of its tensors in a state of 8, 16 or 32 bits."""
        if bits == 32:
            return (self.name,)
        return (self.codes, self.low, self.absmax) if bits == 16 or self.wide else (self.codes, self.absmax)

    def values(self, entry: Mapping[str, Any]) -> torch.Tensor:
        """That tensor of a parameter's state: codes, or float32."""
        tensor: torch.Tensor = entry[self.key(8 if self.absmax in entry else 32)]
        return tensor


class Scalar(NamedTuple):
    """A number that a rule keeps for each parameter beside its count of steps: its key, and what it starts as."""

    name: str
    start: float


@dataclass(frozen=True)
class Moments(Sequence[Moment]):
    """The states of a rule in order, and the scalars beside its count of steps.

    variants: of a rule that has some, the states of each, the most first; `each` are then those of all.
    master_bits: of the weights that they belong to: 16, or 24 or 32 with the bits that the parameter lacks beside them.
    """

    each: tuple[Moment, ...]
    scalars: tuple[Scalar, ...] = ()
    variants: tuple[tuple[Moment, ...], ...] = ()
    master_bits: int = 16

    @overload
    def __getitem__(self, index: int) -> Moment: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Moment, ...]: ...
    def __getitem__(self, index: Any) -> Any:
        return self.each[index]

    def __iter__(self) -> Iterator[Moment]:
        return iter(self.each)

    def __len__(self) -> int:
        return len(self.each)

    def only(self, moments: Sequence[Moment]) -> Moments:
        """Other moments with the same scalars, beside the same weights."""
        return Moments(tuple(moments), self.scalars, master_bits=self.master_bits)

    def beside(self, master_bits: int) -> Moments:
        """The same beside weights of so many bits."""
        return self if master_bits == self.master_bits else replace(self, master_bits=master_bits)


@dataclass(frozen=True)
class Hyper:
    """A hyper-parameter of a rule: an option of a parameter group.

    default: what it is unless told; a bool for a flag, a tuple for several numbers, None for one that may be missing.
    least, below: the range of the number, or of each of several: least <= value < below.
    """

    name: str
    default: bool | float | tuple[float, ...] | None
    least: float
    below: float
    is_flag: bool = field(init=False)
    is_tuple: bool = field(init=False)
    is_number: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_flag", isinstance(self.default, bool))
        object.__setattr__(self, "is_tuple", isinstance(self.default, tuple))
        object.__setattr__(self, "is_number", isinstance(self.default, float))


@dataclass(frozen=True)
class Rule:
    """An update rule: its states in order, and its hyper-parameters.

    family: the rule of which it is a variant, or its own name. Variants keep different states, as options ask.
    torch_name: the optimizer of torch.optim with the same rule; None: there is none.
    functional_name: what optimizer_update_* of the functional API call it; None: they do not have it.
    gives_direction: whether its native step leaves a direction in the place of the parameter, for step.matrices.
    has_norms: whether a step depends on norms of the whole tensor.
    """

    name: str
    family: str
    torch_name: str | None
    functional_name: str | None
    moments: Moments
    hypers: tuple[Hyper, ...]
    gives_direction: bool = False
    has_norms: bool = False

    def has(self, hyper: str) -> bool:
        return any(known.name == hyper for known in self.hypers)


_NUMBER, _FLAG, _OPTIONAL = range(3)


def _hypers(rows: list[tuple[str, int, float, float, float, int]]) -> tuple[Hyper, ...]:
    hypers: dict[str, Hyper] = {}
    for name, part, initial, least, below, kind in rows:
        default: bool | float | tuple[float, ...] | None = {_FLAG: bool(initial), _OPTIONAL: None}.get(kind, initial)
        if part >= 0:
            before = hypers[name].default if part else ()
            default = (*(before if isinstance(before, tuple) else ()), initial)
        hypers[name] = Hyper(name, default, least, below)
    return tuple(hypers.values())


@cache
def every() -> dict[str, Rule]:
    """All rules by name, variants among them.

    Raises:
        ImportError: the compiled module is missing; says what to do.
    """
    known = {}
    for name, family, torch_name, functional_name, states, hypers, running, start, *is_so in _native.cpu().rules():
        scalars = () if running is None else (Scalar(sys.intern(running), start),)
        moments = Moments(tuple(starmap(Moment, states)), scalars)
        known[name] = Rule(name, family, torch_name, functional_name, moments, _hypers(hypers), *is_so)
    return known


@cache
def rule(family: str) -> Rule:
    """A rule with the states of all its variants. `family` is the name of the first of them, a line of
    csrc/core/rules/all.h.

    Raises:
        ValueError: there is none.
    """
    variants = [known for known in every().values() if known.family == family]
    if not variants:
        known_names = ", ".join(dict.fromkeys(known.family for known in every().values()))
        raise ValueError(f"optim8: rule must be one of {known_names}, got {family!r}.")
    first = every()[family]
    if len(variants) == 1:
        return first
    sets = sorted((variant.moments.each for variant in variants), key=len, reverse=True)
    # The variant with most states has them in the order of all. One may be wide in some variants only.
    union: dict[str, Moment] = {}
    for of_variant in sets:
        for moment in of_variant:
            union.setdefault(moment.name, moment)
    scalars = dict.fromkeys(scalar for variant in variants for scalar in variant.moments.scalars)
    return replace(first, moments=Moments(tuple(union.values()), tuple(scalars), tuple(sets)))


def variant(family: str, options: Mapping[str, Any]) -> Rule:
    """The variant of a rule that steps a parameter with these options, which have all its hyper-parameters."""
    return every()[_native.cpu().variant(family, dict(options))]
