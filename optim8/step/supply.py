"""The states of an optimizer's parameters: in which precision they are, new ones, and other layouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch

from optim8.rules import Moment
from optim8.state.allocation import allocate
from optim8.state.conversion import Target, converted
from optim8.state.layout import bits_of, dense_stride, layout_of
from optim8.state.shards import local
from optim8.state.states import States
from optim8.step import hypers, overrides, pending
from optim8.step.memory import Groups, Memory


class Stateful(Protocol):
    """What is asked of an optimizer here."""

    rule: ClassVar[str]
    param_groups: Groups
    state: States
    memory: Memory
    known_overrides: overrides.Resolved | None

    @property
    def moments(self) -> tuple[Moment, ...]:
        """The states of the rule."""


def changes_of(optimizer: Stateful, param: torch.Tensor) -> dict[str, Any]:
    """The options that `param` has otherwise than its group, by the overrides that `resolve` has seen."""
    known = optimizer.known_overrides
    return {} if known is None else known.by_id.get(id(param), {})


def bits_wanted(optimizer: Stateful, group: dict[str, Any], param: torch.Tensor) -> int:
    """In how many bits new state of a parameter of a group is."""
    changes = changes_of(optimizer, param)
    return hypers.bits_of_new_state({**group, **changes} if changes else group, param)


def bits_now(optimizer: Stateful, group: dict[str, Any], param: torch.Tensor) -> int:
    """In how many bits the state of a parameter of a group is, or will be."""
    entry = optimizer.state.get(param)
    return bits_of(optimizer.moments, entry) if entry else bits_wanted(optimizer, group, param)


def allocate_states(optimizer: Stateful, wanted: Sequence[tuple[dict[str, Any], torch.Tensor]]) -> None:
    """Zero state for parameters, each with its group."""
    # In how many bits depends on the whole parameter; its state is that of the local shard.
    shards = [(local(param), bits_wanted(optimizer, group, param)) for group, param in wanted]
    layouts = [(shard, layout_of(optimizer.moments, shard, bits)) for shard, bits in shards]
    for (_, param), entry in zip(wanted, allocate(layouts, optimizer.memory), strict=True):
        optimizer.state.put(param, entry)


def convert_states(optimizer: Stateful, wanted: Sequence[tuple[torch.Tensor, int]], name: str = "") -> None:
    """Lay out the states of parameters anew for the parameters as they are now, in so many bits.

    Args:
        name: for a report, formatted with the parameter's shape; "" for none.
    """
    if not wanted:
        return
    pending.wait()
    targets = [
        (Target(local(param), bits, name.format(tuple(param.shape))), optimizer.state[param]) for param, bits in wanted
    ]
    for (param, _), entry in zip(wanted, converted(optimizer.moments, targets, optimizer.memory), strict=True):
        optimizer.state.put(param, entry)
    optimizer.memory.keep_only(optimizer.state.values())


def relay_states(optimizer: Stateful) -> None:
    """Lay out the states of parameters whose strides have changed anew."""
    moments = optimizer.moments
    convert_states(
        optimizer,
        [
            (param, bits_of(moments, entry))
            for param, entry in optimizer.state.items()
            if isinstance(param, torch.Tensor) and entry
            if moments[0].values(entry).stride() != dense_stride(local(param))
        ],
    )


def resolve(optimizer: Stateful) -> overrides.Resolved | None:
    """The overrides of this optimizer, or None where none was ever made. Where they have changed, existing state is
    brought to the precision that they ask for."""
    if overrides.none_made():
        return None
    known = optimizer.known_overrides
    if known is not None and known.holds(optimizer.param_groups):
        return known
    resolved = overrides.resolve(type(optimizer).__name__, optimizer.param_groups)
    optimizer.known_overrides = resolved
    wrong = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            changes = resolved.by_id.get(id(param), {})
            if optimizer.state.get(param) and not changes.keys().isdisjoint(hypers.EXTRA_DEFAULTS):
                bits = bits_wanted(optimizer, group, param)
                if bits != bits_now(optimizer, group, param):
                    wrong.append((param, bits))
    convert_states(optimizer, wanted=wrong, name="override of a parameter {} ")
    return resolved
