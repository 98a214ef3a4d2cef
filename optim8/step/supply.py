"""The states of an optimizer's parameters: tells their precision, makes new ones, and lays old ones out anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch

from optim8 import rules
from optim8.rules import Moments
from optim8.state.allocation import allocate
from optim8.state.conversion import Target, begin, convert
from optim8.state.layout import bits_of, layout_of, master_bits_of, moments_of
from optim8.state.shards import local
from optim8.state.states import States
from optim8.step import hypers, overrides, pending
from optim8.step.memory import Groups, Memory
from optim8.step.weight_options import counts_steps


class Stateful(Protocol):
    """What is asked of an optimizer here."""

    rule: ClassVar[str]
    param_groups: Groups
    state: States
    memory: Memory
    known_overrides: overrides.Resolved | None

    @property
    def moments(self) -> Moments:
        """The states of the rule."""


def changes_of(optimizer: Stateful, param: torch.Tensor) -> dict[str, Any]:
    """The options that `param` has in place of its group's, by the overrides that `resolve` has seen."""
    known = optimizer.known_overrides
    return {} if known is None else known.by_id.get(id(param), {})


def options_of(optimizer: Stateful, group: dict[str, Any], param: torch.Tensor) -> dict[str, Any]:
    """The options of a parameter: those of its group, and over them its own."""
    changes = changes_of(optimizer, param)
    return {**group, **changes} if changes else group


def moments_wanted(optimizer: Stateful, group: dict[str, Any], param: torch.Tensor) -> Moments:
    """The states that a parameter of a group needs: those of the variant of the rule that its options select, beside
    weights of so many bits as they ask for."""
    options, moments = options_of(optimizer, group, param), optimizer.moments
    if moments.variants:
        moments = rules.variant(optimizer.rule, options).moments
    return moments.beside(options["master_bits"])


def keeps_state(optimizer: Stateful, group: dict[str, Any], param: torch.Tensor) -> bool:
    """Whether a parameter of a group has state once it is stepped."""
    return bool(moments_wanted(optimizer, group, param)) or counts_steps(options_of(optimizer, group, param))


def bits_wanted(optimizer: Stateful, group: dict[str, Any], param: torch.Tensor) -> int:
    """The bits that new state of a parameter of a group gets: 8, 16 or 32."""
    return hypers.bits_of_new_state(options_of(optimizer, group, param), param)


def bits_now(optimizer: Stateful, group: dict[str, Any], param: torch.Tensor) -> int:
    """The bits that the state of a parameter of a group has, or will have: 8, 16 or 32."""
    entry = optimizer.state.get(param)
    return bits_of(optimizer.moments, entry) if entry else bits_wanted(optimizer, group, param)


def allocate_states(optimizer: Stateful, wanted: Sequence[tuple[dict[str, Any], torch.Tensor]]) -> None:
    """New state for parameters, each with its group."""
    # The whole parameter decides the bits; the state is made for the local shard.
    shards = [(local(param), bits_wanted(optimizer, group, param)) for group, param in wanted]
    needed = [moments_wanted(optimizer, group, param) for group, param in wanted]
    layouts = [(shard, layout_of(moments, shard, bits)) for moments, (shard, bits) in zip(needed, shards, strict=True)]
    fresh = allocate(layouts, optimizer.memory)
    for (group, param), moments, entry in zip(wanted, needed, fresh, strict=True):
        begin(moments, entry, options_of(optimizer, group, param))
        optimizer.state.put(param, entry)


def convert_states(optimizer: Stateful, wanted: Sequence[tuple[torch.Tensor, int, int]], name: str = "") -> None:
    """Lay out the states of parameters anew, each for the parameter as it is now.

    Args:
        wanted: (parameter, bits of its moments, bits of its weight).
        name: for a report, formatted with the parameter's shape; "" for none.
    """
    if not wanted:
        return
    pending.wait()
    targets = []
    for param, bits, master_bits in wanted:
        entry = optimizer.state[param]
        moments = moments_of(optimizer.moments, entry).beside(master_bits)
        targets.append((Target(local(param), moments, bits, name.format(tuple(param.shape))), entry))
    for (param, *_), entry in zip(wanted, convert(targets, optimizer.memory), strict=True):
        optimizer.state.put(param, entry)
    optimizer.memory.keep_only(optimizer.state.values())


def relay_states(optimizer: Stateful) -> None:
    """Lay out anew the states of parameters whose strides have changed."""
    moments = optimizer.moments
    convert_states(
        optimizer,
        [
            (param, bits_of(moments, entry), master_bits_of(entry))
            for param, entry in optimizer.state.items()
            if isinstance(param, torch.Tensor) and entry
            if not layout_of(moments_of(moments, entry), local(param), bits_of(moments, entry)).lies_in(entry)
        ],
    )


def resolve(optimizer: Stateful) -> overrides.Resolved | None:
    """The overrides of this optimizer, or None where none was ever made. Where they have changed, brings existing
    state to the precision that they ask for."""
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
                bits, master = bits_wanted(optimizer, group, param), moments_wanted(optimizer, group, param).master_bits
                now = bits_now(optimizer, group, param), master_bits_of(optimizer.state[param])
                if (bits, master) != now:
                    wrong.append((param, bits, master))
    convert_states(optimizer, wanted=wrong, name="override of a parameter {} ")
    return resolved
