"""Optimizers that were given the same Pager: they share its budgets, as where each parameter has an optimizer."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Protocol

import torch

from optim8.paging.files import Segment
from optim8.paging.pager import Pager


class Sharer(Protocol):
    """The store of one optimizer."""

    segments: list[Segment]

    def tensors(self) -> list[torch.Tensor]:
        """All its state."""


# By identity: equal Pagers of two programs' optimizers are two budgets.
_sharers: dict[int, weakref.WeakSet[Sharer]] = {}


def sharers(pager: Pager) -> weakref.WeakSet[Sharer]:
    """The stores of this Pager, as long as they live; a new one adds itself."""
    if id(pager) not in _sharers:
        _sharers[id(pager)] = weakref.WeakSet()
        weakref.finalize(pager, _sharers.pop, id(pager), None)
    return _sharers[id(pager)]


def bytes_in(stores: Iterable[Sharer], tier: str) -> int:
    """Bytes of their segments in a tier."""
    return sum(segment.memory.numel() for store in list(stores) for segment in store.segments if segment.tier == tier)


def bytes_on(stores: Iterable[Sharer], device: torch.device) -> int:
    """Bytes of their state on a device."""
    return sum(tensor.nbytes for store in list(stores) for tensor in store.tensors() if tensor.device == device)
