"""States in another layout: laid out anew, in another precision, or filled from what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from optim8.rules import Moment
from optim8.state.allocation import Allocator, allocate
from optim8.state.layout import STEP, Layout, layout_of, others
from optim8.state.mapped import fill as fill_tensor
from optim8.state.moments import Entry, fill, source_of


@dataclass(frozen=True)
class Target:
    """Whose state is to be made, and how.

    param: the parameter, or its local shard.
    bits: 8, 16 or 32.
    name: for a report; "" for none.
    """

    param: torch.Tensor
    bits: int
    name: str = ""


def as_sources(moments: Sequence[Moment], entry: Mapping[str, Any]) -> Entry:
    """The state of an optimizer here as sources, unchecked."""
    read: Entry = {STEP: entry[STEP]}
    for moment in moments:
        read[moment.name] = source_of(moment, entry)
    return read


def fill_state(moments: Sequence[Moment], source: Entry, entry: dict[str, Any], name: str) -> None:
    """Bring the sources of a state into an allocated one; `name`: for a report."""
    entry[STEP].fill_(float(source[STEP]))
    for moment in moments:
        fill(moment, source[moment.name], entry, name)


def new_states(
    moments: tuple[Moment, ...], wanted: Sequence[tuple[Target, Entry]], allocator: Allocator
) -> list[dict[str, Any]]:
    """New states with the values of sources."""
    layouts = [(target.param, layout_of(moments, target.param, target.bits)) for target, _ in wanted]
    fresh = allocate(layouts, allocator)
    for (target, source), entry in zip(wanted, fresh, strict=True):
        fill_state(moments, source, entry, target.name)
    return fresh


def convert(
    moments: tuple[Moment, ...], wanted: Sequence[tuple[Target, dict[str, Any]]], allocator: Allocator
) -> list[dict[str, Any]]:
    """States of an optimizer, laid out anew for the parameters as they are now. What others keep there stays as it is.

    Args:
        moments: the states of the rule.
        wanted: (what is to be made, the present state).
        allocator: decides where the state lives.
    """
    fresh = new_states(moments, [(target, as_sources(moments, entry)) for target, entry in wanted], allocator)
    for (_, entry), new in zip(wanted, fresh, strict=True):
        new.update(others(moments, entry))
    return fresh


def zero(layout: Layout, entry: Mapping[str, Any]) -> None:
    """Reset a state of this layout, in its memory, to what new state is."""
    for part in layout.parts:
        fill_tensor(entry[part.key], part.fill)
