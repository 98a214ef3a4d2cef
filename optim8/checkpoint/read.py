"""Reads state dicts: checks and copies everything before an optimizer changes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from optim8.checkpoint import shards as sharded
from optim8.checkpoint.formats import Format
from optim8.rules import Moments
from optim8.state.allocation import allocate
from optim8.state.conversion import fill_state
from optim8.state.layout import Layout, layout_of, moments_of, others
from optim8.state.mapped import tensors_of
from optim8.state.moments import Entry, bits_of_sources, check_values
from optim8.state.shards import copy_beside, local
from optim8.step import supply
from optim8.step.supply import Stateful
from optim8.step.weight_options import counts_steps


def merge_groups(owner: str, groups: list[dict[str, Any]], saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The saved groups with the optimizer's parameters and their names; options that were not saved keep their present
    values.

    Raises:
        ValueError: number or sizes of the groups differ, or a saved name is that of a parameter in another place.
    """
    if len(groups) != len(saved):
        raise ValueError(f"{owner}: param_groups must be {len(groups)} groups, got {len(saved)}.")
    merged = []
    for index, (group, loaded) in enumerate(zip(groups, saved, strict=True)):
        if len(group["params"]) != len(loaded["params"]):
            raise ValueError(
                f"{owner}: param_groups[{index}] must have {len(group['params'])} parameters, "
                f"got {len(loaded['params'])}."
            )
        names = {"param_names": group["param_names"]} if "param_names" in group else {}
        merged.append({**group, **loaded, **names, "params": group["params"], "saved_ids": loaded["params"]})
    _check_names(owner, groups, saved)
    return merged


def _check_names(owner: str, groups: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    """Raise ValueError where a saved name stands in another place here: state goes by position, as in torch.optim."""
    places = {name: (at, i) for at, group in enumerate(groups) for i, name in enumerate(group.get("param_names", ()))}
    for at, loaded in enumerate(saved):
        for i, (id_, name) in enumerate(zip(loaded["params"], loaded.get("param_names", ()))):
            here = places.get(name, (at, i))
            # Ids that are names, as torch.distributed writes them, were brought into this order by their names.
            if here != (at, i) and isinstance(id_, int):
                raise ValueError(
                    f"{owner}: param_groups[{at}]['param_names'][{i}] is {name!r}, which is parameter {here[1]} of "
                    f"group {here[0]} here, and state goes by position. Make the optimizer with its parameters in the "
                    "saved order; or delete 'param_names' from the groups of the dict, where the names are wrong."
                )


@dataclass(frozen=True)
class _Saved:
    """A saved state that was read: whose it is, its sources, and the layout that it is to have."""

    key: Any
    param: torch.Tensor
    source: Entry
    layout: Layout


def read_state(
    owner: str, optimizer: Stateful, known: Format, state_dict: dict[str, Any], groups: list[dict[str, Any]]
) -> defaultdict[Any, Any]:
    """State for the optimizer's own parameters, copied from a saved one. Takes `saved_ids` out of the groups.

    Args:
        owner: names the optimizer, for messages.
        optimizer: whose parameters they are; it is not changed.
        known: the format of the dict.
        groups: those of the dict, with the optimizer's parameters and `saved_ids`.

    Raises:
        ValueError: the dict does not fit; nothing was changed.
    """
    pairs = [(id_, param, group) for group in groups for id_, param in zip(group.pop("saved_ids"), group["params"])]
    by_id = {id_: (param, group) for id_, param, group in pairs}
    memory = optimizer.memory
    state: defaultdict[Any, Any] = defaultdict(dict)
    read = []
    for key, entry in state_dict["state"].items():
        if key not in by_id:
            if isinstance(key, int):
                raise ValueError(
                    f"{owner}: state[{key}] is of no parameter in param_groups. Load a complete state dict."
                )
            state[key] = entry  # not of a parameter: kept as it is, as torch.optim does
        elif any(value is not None for value in entry.values()):  # None: torch's SGD without momentum
            param, group = by_id[key]
            where = f"{owner}: state[{key!r}]"
            moments = _moments_to_read(optimizer, group, param, entry)
            if not moments and not counts_steps(supply.options_of(optimizer, group, param)):
                continue
            source = sharded.of_shard(where, moments, param, known.read_entry(where, moments, param, entry))
            if known.keeps_precision:
                bits = bits_of_sources(source, moments)
            else:
                bits = supply.bits_wanted(optimizer, group, param)
                check_values(where, moments, source, bits)
            memory.check_others(where, others(optimizer.moments, source))
            read.append(_Saved(key, param, source, layout_of(moments, local(param), bits)))
    with memory.loading():
        # State goes where state is already: two of them might be over the budget.
        saved_tensors = chain(*map(tensors_of, state_dict["state"].values()))
        reusable = memory.is_paged and not any(map(memory.holds, saved_tensors))
        new = []
        for each in read:
            present = optimizer.state.get(each.param, {}) if reusable else {}
            if present and each.layout.fits(present, local(each.param), memory.reaches):
                state[each.param] = {key: present[key] for key in each.layout.keys}
            else:
                new.append(each)
        fresh = allocate([(local(each.param), each.layout) for each in new], memory)
        state.update((each.param, entry) for each, entry in zip(new, fresh, strict=True))
        for each in read:
            fill_state(each.layout.moments, each.source, state[each.param], f"state[{each.key!r}]")
            more = others(optimizer.moments, each.source)
            state[each.param].update({key: copy_beside(value, each.param) for key, value in more.items()})
    return state


def _moments_to_read(
    optimizer: Stateful, group: dict[str, Any], param: torch.Tensor, entry: Mapping[str, Any]
) -> Moments:
    """The moments that a saved state must have, which are those that the options of the group ask for; with what else
    it has that another variant of the rule keeps, for that may be asked for later."""
    wanted = supply.moments_wanted(optimizer, group, param)
    there = moments_of(optimizer.moments, entry).beside(wanted.master_bits)
    return there if {moment.name for moment in wanted} <= {moment.name for moment in there} else wanted
