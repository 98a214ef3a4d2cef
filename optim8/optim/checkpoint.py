"""Reading state dicts: everything is checked and copied before an optimizer changes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch

from optim8.optim import sharded, states
from optim8.optim.formats import Format, own
from optim8.optim.sources import Entry, check_values, fill, is_quantized
from optim8.optim.states import Moment
from optim8.paging.files import tensors_of
from optim8.paging.store import Store


def merged_groups(owner: str, groups: list[dict[str, Any]], saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
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
    """State goes by position, as in torch.optim; so a parameter that the optimizer has may not stand elsewhere."""
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


def loaded_state(
    owner: str,
    moments: Sequence[Moment],
    known: Format,
    state_dict: dict[str, Any],
    groups: list[dict[str, Any]],
    wants_8bit: Callable[[dict[str, Any], torch.Tensor], bool],
    store: Store | None,
    present_state: Mapping[Any, dict[str, Any]],
) -> defaultdict[Any, Any]:
    """State for the optimizer's own parameters, copied from a saved one. Takes `saved_ids` out of the groups. `store`:
    where it is to live, None: beside the parameters; `present_state`: what the optimizer has."""
    pairs = [(id_, param, group) for group in groups for id_, param in zip(group.pop("saved_ids"), group["params"])]
    by_id = {id_: (param, group) for id_, param, group in pairs}
    state: defaultdict[Any, Any] = defaultdict(dict)
    present: dict[torch.device, list[tuple[str, torch.Tensor, torch.Tensor, Entry, bool]]] = {}
    for key, entry in state_dict["state"].items():
        if key not in by_id:
            if isinstance(key, int):
                raise ValueError(
                    f"{owner}: state[{key}] is of no parameter in param_groups. Load a complete state dict."
                )
            state[key] = entry  # not of a parameter: kept as it is, as torch.optim does
        elif entry:
            param, group = by_id[key]
            where = f"{owner}: state[{key!r}]"
            read = sharded.of_shard(where, moments, param, known.read_entry(where, moments, param, entry))
            in_8_bits = is_quantized(read, moments) if known.keeps_precision else wants_8bit(group, param)
            if not known.keeps_precision:
                check_values(where, moments, read, in_8_bits)
            if store is not None:
                store.check_others(where, states.others(moments, read))
            shard = sharded.local(param)
            present.setdefault(shard.device, []).append((f"state[{key!r}]", param, shard, read, in_8_bits))
    # A paged optimizer's state goes where its state is already: two of them might be over the budget.
    if store is not None:
        store.begin_loading()
    reusable = store is not None and not any(map(store.holds, chain(*map(tensors_of, state_dict["state"].values()))))
    for of_device in present.values():
        new = []
        for at in of_device:
            _, param, shard, _, in_8_bits = at
            entry = present_state.get(param, {}) if reusable else {}
            if states.fits(moments, entry, shard, in_8_bits, store):
                state[param] = {name: entry[name] for name in states.names(moments, in_8_bits)}
            else:
                new.append(at)
        fresh = states.allocate(moments, [(shard, in_8_bits) for _, _, shard, _, in_8_bits in new], store)
        state.update((param, entry) for (_, param, *_), entry in zip(new, fresh, strict=True))
        for name, param, _, read, _ in of_device:
            _fill_entry(moments, read, state[param], name)
            more = states.others(moments, read)
            state[param].update({key: sharded.copy_beside(value, param) for key, value in more.items()})
    return state


def converted(
    moments: Sequence[Moment],
    wanted: Sequence[tuple[str, torch.Tensor, dict[str, Any], bool]],
    store: Store | None,
) -> list[dict[str, Any]]:
    """States of an optimizer, laid out anew for the parameters as they are now. What others keep there stays as it is.

    Args:
        moments: the states of the rule.
        wanted: (name for a report, or ""; parameter; its state; whether the new one is 8-bit), all on one device.
        store: where the optimizer's state lives; None: beside the parameters.
    """
    sources = [(name, param, own.as_sources(moments, entry), in_8_bits) for name, param, entry, in_8_bits in wanted]
    fresh = _filled(moments, sources, store)
    for (_, _, entry, _), target in zip(wanted, fresh, strict=True):
        target.update(states.others(moments, entry))
    return fresh


def adopted(
    moments: Sequence[Moment],
    known: Format,
    entries: Sequence[tuple[str, torch.Tensor, dict[str, Any], bool]],
    store: Store | None,
) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """States of another library, (what it is; parameter; state; whether the new one is 8-bit), as (parameter, state)
    in the optimizer's own form.

    Raises:
        ValueError: one does not fit.
    """
    by_device: dict[torch.device, list[tuple[str, torch.Tensor, Entry, bool]]] = {}
    for where, param, entry, in_8_bits in entries:
        read = known.read_entry(where, moments, param, entry)
        check_values(where, moments, read, in_8_bits)
        by_device.setdefault(param.device, []).append((where, param, read, in_8_bits))
    result: list[tuple[torch.Tensor, dict[str, Any]]] = []
    for of_device in by_device.values():
        for (_, param, read, _), entry in zip(of_device, _filled(moments, of_device, store), strict=True):
            entry.update(
                {key: sharded.copy_beside(value, param) for key, value in states.others(moments, read).items()}
            )
            result.append((param, entry))
    return result


def _filled(
    moments: Sequence[Moment], wanted: Sequence[tuple[str, torch.Tensor, Entry, bool]], store: Store | None
) -> list[dict[str, Any]]:
    fresh = states.allocate(moments, [(param, in_8_bits) for _, param, _, in_8_bits in wanted], store)
    for (name, _, source, _), target in zip(wanted, fresh, strict=True):
        _fill_entry(moments, source, target, name)
    return fresh


def _fill_entry(moments: Sequence[Moment], source: Entry, target: dict[str, Any], name: str) -> None:
    target["step"].fill_(float(source["step"]))
    for moment in moments:
        fill(moment, source[moment.name], target, name)
