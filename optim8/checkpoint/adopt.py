"""States that others put into an optimizer, brought into its own form, as load_state_dict does."""

from __future__ import annotations

from typing import Any

import torch

from optim8.checkpoint import formats
from optim8.checkpoint.formats import Format, own
from optim8.state.conversion import Target, new_states
from optim8.state.layout import bits_of, is_earlier, moments_in, moments_of, others, under_present_names
from optim8.state.moments import check_values
from optim8.state.shards import copy_beside, is_dtensor, local
from optim8.state.states import States
from optim8.step import hypers, supply
from optim8.step.supply import Stateful

Given = tuple[str, torch.Tensor, dict[str, Any], int]  # what it is; its parameter; the state; bits of the new one


def put(optimizer: Stateful, param: torch.Tensor, entry: dict[str, Any]) -> None:
    """Set a state that an earlier run left, maybe of an earlier version; then it is adopted before its first use."""
    entry = under_present_names(optimizer.moments, entry)
    if is_earlier(optimizer.moments, entry):
        optimizer.state[param] = entry
    else:
        optimizer.state.put(param, entry)


def adopt_states(optimizer: Stateful) -> None:
    """Bring state that came from outside into the form of the optimizer.

    Raises:
        ValueError: it does not fit; nothing was changed.
    """
    if type(optimizer.state) is not States:  # a user's own dict
        optimizer.state = States(optimizer.state, optimizer.state)
        optimizer.memory.watch(optimizer.param_groups, optimizer.state)
    if not optimizer.state.given:
        return
    owner, moments = type(optimizer).__name__, optimizer.moments
    given: list[Given] = []
    for at, group in enumerate(optimizer.param_groups):
        for i, param in enumerate(group["params"]):
            entry = optimizer.state.get(param) if param in optimizer.state.given else None
            if not entry:
                continue
            entry = under_present_names(moments, entry)
            if is_dtensor(param) and not is_earlier(moments, entry):  # nobody else puts in shards
                continue
            optimizer.state[param] = entry
            bits = bits_of(moments_in(moments, entry), entry)
            if bits == 32:
                bits = supply.bits_wanted(optimizer, group, param)
            if not own.is_own(moments, entry, bits):
                given.append((f"{owner}: the state of parameter {i} of group {at}", param, entry, bits))
    for there in hypers.BITS:
        part = [each for each in given if bits_of(moments_in(moments, each[2]), each[2]) == there]
        known = formats.of_states([entry for _, _, entry, _ in part])
        if known is None:  # the step says what it lacks
            continue
        formats.common.check_rule(owner, known, optimizer.rule)
        for param, entry in _adopted(optimizer, known, part):
            optimizer.state.put(param, entry)
    if given:
        optimizer.memory.keep_only(optimizer.state.values())
    optimizer.state.given.clear()


def _adopted(optimizer: Stateful, known: Format, given: list[Given]) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """States of another library as (parameter, state) in the optimizer's own form."""
    sources = []
    for where, param, entry, bits in given:
        moments = moments_of(optimizer.moments, entry)
        source = known.read_entry(where, moments, local(param), entry)
        check_values(where, moments, source, bits)
        sources.append((Target(local(param), moments, bits, where), source))
    result = []
    fresh = new_states(sources, optimizer.memory)
    for (_, param, _, _), (_, source), entry in zip(given, sources, fresh, strict=True):
        entry.update({key: copy_beside(value, param) for key, value in others(optimizer.moments, source).items()})
        result.append((param, entry))
    return result
