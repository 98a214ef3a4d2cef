"""States in another layout: laid out anew, in another precision, or filled from what a checkpoint holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from optim8.rules import Moments
from optim8.state.allocation import Allocator, allocate
from optim8.state.layout import PARAM_LOW, Layout, count_keys, layout_of, others
from optim8.state.mapped import fill as fill_tensor
from optim8.state.moments import Entry, fill, source_of
from optim8.state.weights import fill_low


@dataclass(frozen=True)
class Target:
    """Whose state is to be made, and how.

    param: the parameter, or its local shard.
    moments: of the variant of the rule that steps it.
    bits: 8, 16 or 32.
    name: for a report; "" for none.
    """

    param: torch.Tensor
    moments: Moments
    bits: int
    name: str = ""


def as_sources(moments: Moments, entry: Mapping[str, Any]) -> Entry:
    """The state of an optimizer here as sources, unchecked."""
    read: Entry = {key: entry[key] for key in count_keys(moments)}
    for moment in moments:
        read[moment.name] = source_of(moment, entry)
    if PARAM_LOW in entry:
        read[PARAM_LOW] = entry[PARAM_LOW]
    return read


def fill_state(moments: Moments, source: Entry, entry: dict[str, Any], name: str) -> None:
    """Bring the sources of a state into an allocated one; `name`: for a report."""
    for key in count_keys(moments):
        entry[key].fill_(float(source[key]))
    for moment in moments:
        fill(moment, source[moment.name], entry, name)
    if PARAM_LOW in entry:
        fill_low(entry[PARAM_LOW], source.get(PARAM_LOW))


def new_states(wanted: Sequence[tuple[Target, Entry]], allocator: Allocator) -> list[dict[str, Any]]:
    """New states with the values of sources."""
    layouts = [(target.param, layout_of(target.moments, target.param, target.bits)) for target, _ in wanted]
    fresh = allocate(layouts, allocator)
    for (target, source), entry in zip(wanted, fresh, strict=True):
        fill_state(target.moments, source, entry, target.name)
    return fresh


def convert(wanted: Sequence[tuple[Target, dict[str, Any]]], allocator: Allocator) -> list[dict[str, Any]]:
    """States of an optimizer, laid out anew for the parameters as they are now. What others keep there stays as it is.

    Args:
        wanted: (what is to be made, the present state).
        allocator: decides where the state lives.
    """
    fresh = new_states([(target, as_sources(target.moments, entry)) for target, entry in wanted], allocator)
    for (target, entry), new in zip(wanted, fresh, strict=True):
        new.update(others(target.moments, entry))
    return fresh


def zero(layout: Layout, entry: Mapping[str, Any]) -> None:
    """Reset a state of this layout, in its memory, to what `allocate` gives."""
    for part in layout.parts:
        fill_tensor(entry[part.key], part.fill)


def begin(moments: Moments, entry: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Give a state that `allocate` or `zero` made the values that its rule starts with under these options."""
    for moment in moments:
        value = float(options[moment.initial]) if moment.initial else 0.0
        if not value:
            continue
        if moment.absmax not in entry:
            fill_tensor(entry[moment.name], value)
            continue
        fill_tensor(entry[moment.codes], _ONE)
        fill_tensor(entry[moment.absmax], math.sqrt(value) if moment.root else value)
        if moment.low in entry:
            fill_tensor(entry[moment.low], moment.middle)


_ONE = 255  # the code of the absmax itself
