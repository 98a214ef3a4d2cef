"""Copies and pickles of an optimizer whose state is paged: streamed, never in memory as a whole."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch

from optim8 import rules
from optim8.paging import Pager
from optim8.paging.store import Store
from optim8.rules import Moment, Moments
from optim8.state.allocation import allocate
from optim8.state.conversion import Target, convert
from optim8.state.layout import PARAM_LOW, bits_of, keys_of, layout_of, master_bits_of, moments_of, others
from optim8.state.mapped import copy
from optim8.state.shards import local
from optim8.step import hypers

_PART = 2**20  # bytes that are in memory at a time
_WITH_ROOTS = "roots"  # which keys the state in a pickle has


def _pager_of_copy(store: Store) -> Pager:
    """A kept directory belongs to one optimizer: a copy lives beside it and does not keep its files."""
    return replace(store.pager, keep=False, resume=False, changed_params=False)


def _is_state(moments: Moments, param: Any, entry: Any) -> bool:
    keys = {key for moment in moments for key in (moment.name, moment.codes, moment.direct.codes)}
    return isinstance(param, torch.Tensor) and isinstance(entry, dict) and not keys.isdisjoint(entry)


def copy_states(
    store: Store, moments: Moments, state: dict[Any, Any], memo: dict[int, Any]
) -> tuple[Store, defaultdict[Any, Any]]:
    """State for a deep copy of its optimizer, whose parameters deepcopy and `memo` give."""
    twin = Store(store.owner, store.rule, _pager_of_copy(store))
    fresh: defaultdict[Any, Any] = defaultdict(dict)
    params, targets = [], []
    for param, entry in state.items():
        if not _is_state(moments, param, entry):
            fresh[deepcopy(param, memo)] = deepcopy(entry, memo)
    for param, entry in state.items():
        if _is_state(moments, param, entry):
            params.append(deepcopy(param, memo))
            present = moments_of(moments, entry)
            targets.append((Target(local(params[-1]), present, bits_of(present, entry)), entry))
    for param, entry in zip(params, convert(targets, twin), strict=True):
        # What others keep is the copy's own too.
        fresh[param] = {**entry, **deepcopy(others(moments, entry), memo)}
    return twin, fresh


class PagedStates:
    """Paged state on its way through pickle. The pickle says what to allocate, then holds the state part by part:
    unpickling writes each part to its place before it reads the next."""

    def __init__(self, store: Store, moments: Moments, state: dict[Any, Any]) -> None:
        self.store, self.moments, self.state = store, moments, state
        self.entries = [entry for param, entry in state.items() if _is_state(moments, param, entry)]

    def __reduce__(self) -> tuple[Any, ...]:
        empty, parts = _Empty(self), []
        for place, entry in enumerate(self.entries):
            for name in empty.names & entry.keys():
                size = entry[name].nbytes
                parts += [_Part(empty, place, name, at) for at in range(0, size, _PART)]
        return _filled, (empty, parts)


class _Empty:
    """What to allocate for PagedStates state."""

    def __init__(self, whole: PagedStates) -> None:
        self.whole, self.entries = whole, whole.entries
        of_variants = [whole.moments, *map(whole.moments.only, whole.moments.variants)]
        self.names = {key for moments in of_variants for bits in hypers.BITS for key in keys_of(moments, bits)}
        self.names.add(PARAM_LOW)
        self.params = [p for p, entry in whole.state.items() if _is_state(whole.moments, p, entry)]

    def __reduce__(self) -> tuple[Any, ...]:
        state, moments = self.whole.state, self.whole.moments
        bits = [bits_of(moments_of(moments, state[param]), state[param]) for param in self.params]
        names = [tuple(moment.name for moment in moments_of(moments, state[param])) for param in self.params]
        more = [{key: value for key, value in state[p].items() if key not in self.names} for p in self.params]
        others = [(key, entry) for key, entry in state.items() if not _is_state(moments, key, entry)]
        store = self.whole.store
        return _allocated, (
            store.owner,
            store.rule,
            _pager_of_copy(store),
            _WITH_ROOTS,
            self.params,
            bits,
            more,
            others,
            names,
            [master_bits_of(state[param]) for param in self.params],
        )


class _Part:
    """Some bytes of a tensor; unpickling it writes them. They are pickled as one number, as the state of an object,
    because pickle keeps anything else that holds bytes, and what is in a tuple, in memory to the end."""

    def __init__(self, home: PagedStates | _Empty, place: int, name: str, at: int) -> None:
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
    form: Sequence[Moment] | str,  # before there were roots, the moments or nothing
    params: Sequence[torch.Tensor],
    bits: Sequence[int | bool],  # version 0.1.0 wrote whether it is 8
    more: Sequence[dict[str, Any]],
    others_: Sequence[tuple[Any, Any]],
    names: Sequence[tuple[str, ...]] = (),  # of the moments of each, since rules have variants
    masters: Sequence[int] = (),  # the bits of each weight, since they may be other than 16
) -> PagedStates:
    store = Store(owner, rule, pager)
    state: defaultdict[Any, Any] = defaultdict(dict)
    moments = rules.rule(rule).moments
    layouts = []
    for i, (shard, each) in enumerate(zip(map(local, params), bits, strict=True)):
        of_variant = moments_of(moments, dict.fromkeys(names[i])) if names else moments_of(moments, {})
        of_variant = of_variant.beside(masters[i] if masters else 16)
        if form != _WITH_ROOTS:
            of_variant = of_variant.only([moment.direct for moment in of_variant])
        layouts.append((shard, layout_of(of_variant, shard, (8 if each else 32) if isinstance(each, bool) else each)))
    for param, entry, kept in zip(params, allocate(layouts, store), more, strict=True):
        state[param] = {**entry, **kept}
    state.update(others_)
    return PagedStates(store, moments, state)


def _filled(whole: PagedStates, parts: Sequence[None]) -> PagedStates:
    return whole
