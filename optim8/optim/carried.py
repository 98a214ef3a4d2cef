"""Copies and pickles of an optimizer whose state is paged: streamed, never in memory as a whole."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch

from optim8.optim import checkpoint, sharded, states
from optim8.optim.states import Moment
from optim8.paging import Pager
from optim8.paging.files import copy
from optim8.paging.store import Store

_PART = 2**20  # bytes that are in memory at a time


def _pager_of_copy(store: Store) -> Pager:
    """A kept directory belongs to one optimizer: a copy lives beside it and does not keep its files."""
    return replace(store.pager, keep=False, resume=False, changed_params=False)


def _is_state(moments: Sequence[Moment], param: Any, entry: Any) -> bool:
    keys = {moments[0].name, moments[0].codes}
    return isinstance(param, torch.Tensor) and isinstance(entry, dict) and not keys.isdisjoint(entry)


def copied(
    store: Store, moments: Sequence[Moment], state: dict[Any, Any], memo: dict[int, Any]
) -> tuple[Store, defaultdict[Any, Any]]:
    """State for a deep copy of its optimizer, whose parameters deepcopy and `memo` give."""
    twin = Store(store.owner, store.rule, _pager_of_copy(store))
    fresh: defaultdict[Any, Any] = defaultdict(dict)
    for param, entry in state.items():
        if not _is_state(moments, param, entry):
            fresh[deepcopy(param, memo)] = deepcopy(entry, memo)
    by_device: dict[torch.device, list[tuple[torch.Tensor, tuple[str, torch.Tensor, dict[str, Any], bool]]]] = {}
    for param, entry in state.items():
        if _is_state(moments, param, entry):
            to = deepcopy(param, memo)
            shard = sharded.local(to)
            by_device.setdefault(shard.device, []).append((to, ("", shard, entry, moments[0].absmax in entry)))
    for of_device in by_device.values():
        entries = checkpoint.converted(moments, [wanted for _, wanted in of_device], twin)
        for (param, _), entry in zip(of_device, entries, strict=True):
            # What others keep is the copy's own too.
            fresh[param] = {**entry, **deepcopy(states.others(moments, entry), memo)}
    return twin, fresh


class Carried:
    """Paged state on its way through pickle. Pickled, it is what to allocate, and then the state part by part, each
    written to its place before the next is read."""

    def __init__(self, store: Store, moments: Sequence[Moment], state: dict[Any, Any]) -> None:
        self.store, self.moments, self.state = store, tuple(moments), state
        self.entries = [entry for param, entry in state.items() if _is_state(moments, param, entry)]

    def __reduce__(self) -> tuple[Any, ...]:
        empty, parts = _Empty(self), []
        for place, entry in enumerate(self.entries):
            for name in empty.names & entry.keys():
                size = entry[name].nbytes
                parts += [_Part(empty, place, name, at) for at in range(0, size, _PART)]
        return _filled, (empty, parts)


class _Empty:
    """What to allocate for Carried state."""

    def __init__(self, carried: Carried) -> None:
        self.carried, self.entries = carried, carried.entries
        self.names = {*states.names(carried.moments, True), *states.names(carried.moments, False)}
        self.params = [p for p, entry in carried.state.items() if _is_state(carried.moments, p, entry)]

    def __reduce__(self) -> tuple[Any, ...]:
        state, moments = self.carried.state, self.carried.moments
        in_8_bits = [moments[0].absmax in state[param] for param in self.params]
        more = [{key: value for key, value in state[p].items() if key not in self.names} for p in self.params]
        others = [(key, entry) for key, entry in state.items() if not _is_state(moments, key, entry)]
        store = self.carried.store
        return _allocated, (
            store.owner,
            store.rule,
            _pager_of_copy(store),
            moments,
            self.params,
            in_8_bits,
            more,
            others,
        )


class _Part:
    """Some bytes of a tensor; unpickling it writes them. They are pickled as one number, as the state of an object:
    whatever else holds bytes, and what is in a tuple, pickle remembers to the end."""

    def __init__(self, home: Carried | _Empty, place: int, name: str, at: int) -> None:
        self.home, self.place, self.name, self.at = home, place, name, at

    def _values(self) -> torch.Tensor:
        entry = self.home.entries[self.place]
        name = self.name if self.name in entry else f"{self.name}_codes"  # as version 0.1.0 named codes
        return _flat(entry[name])[self.at : self.at + _PART]

    def __reduce__(self) -> tuple[Any, ...]:
        values = torch.empty_like(self._values())
        copy(values, self._values())
        number = int.from_bytes(values.numpy().tobytes(), "little")
        return _Part, (self.home, self.place, self.name, self.at), number

    def __setstate__(self, number: int) -> None:
        goal = self._values()
        copy(goal, torch.frombuffer(bytearray(number.to_bytes(goal.numel(), "little")), dtype=torch.uint8))


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a dense tensor in memory order, as a view."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _allocated(
    owner: str,
    rule: str,
    pager: Pager,
    moments: Sequence[Moment],
    params: Sequence[torch.Tensor],
    in_8_bits: Sequence[bool],
    more: Sequence[dict[str, Any]],
    others: Sequence[tuple[Any, Any]],
) -> Carried:
    store = Store(owner, rule, pager)
    state: defaultdict[Any, Any] = defaultdict(dict)
    by_device: dict[torch.device, list[int]] = {}
    shards = [sharded.local(param) for param in params]
    for place, shard in enumerate(shards):
        state[params[place]] = {}
        by_device.setdefault(shard.device, []).append(place)
    for places in by_device.values():
        wanted = [(shards[place], in_8_bits[place]) for place in places]
        for place, entry in zip(places, states.allocate(moments, wanted, store), strict=True):
            state[params[place]] = {**entry, **more[place]}
    state.update(others)
    return Carried(store, moments, state)


def _filled(carried: Carried, parts: Sequence[None]) -> Carried:
    return carried
