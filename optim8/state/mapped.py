"""Copies into and out of state that may lie in memory-mapped files, of which only a limited part may be in memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, Protocol

import torch

from optim8 import _native

PAGE = 4096
_CHUNK = 2**20  # bytes that are in memory at a time


class Mapping(Protocol):
    """A mapped file."""

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's values lie in it."""


# Only what is in here may be released: an object keeps its mapping alive, so nothing else can have its addresses.
_limited: weakref.WeakSet[Any] = weakref.WeakSet()


def limit(mapping: Mapping) -> None:
    """Take the pages of a mapping out of memory after each copy, for as long as the mapping lives."""
    _limited.add(mapping)


def copy(goal: torch.Tensor, source: torch.Tensor) -> None:
    """`goal.copy_(source)` for a dense goal; what is mapped under a limit passes through memory in parts."""
    alike = goal.stride() == source.stride() or (goal.is_contiguous() and source.is_contiguous())
    if not alike or not (_is_limited(goal) or _is_limited(source)):
        goal.copy_(source)
        release((goal, source))
        return
    # Both are dense and laid out alike, so their elements have the same order in memory.
    flat = [tensor.as_strided((tensor.numel(),), (1,)) for tensor in (goal, source)]
    for begin in range(0, goal.numel(), _CHUNK):
        to, of = (tensor[begin : begin + _CHUNK] for tensor in flat)
        to.copy_(of)
        release((to, of))


def fill(goal: torch.Tensor, value: float) -> None:
    """`goal.fill_(value)` for a dense goal; what is mapped under a limit passes through memory in parts."""
    if not _is_limited(goal):
        goal.fill_(value)
        return
    flat = goal.as_strided((goal.numel(),), (1,))
    for begin in range(0, goal.numel(), _CHUNK):
        part = flat[begin : begin + _CHUNK].fill_(value)
        release((part,))


def release(tensors: Iterable[torch.Tensor]) -> None:
    """Take the pages of tensors that are mapped under a limit out of this process; the file keeps what they hold.
    Other tensors are left alone."""
    if not _limited:
        return
    spans = []
    for tensor in filter(_is_limited, tensors):
        begin = tensor.data_ptr()
        spans.append((begin // PAGE * PAGE, -(-(begin + tensor.nbytes) // PAGE) * PAGE))
    _native.cpu().release_pages(spans)


def _is_limited(tensor: torch.Tensor) -> bool:
    return any(mapping.holds(tensor) for mapping in list(_limited))


def tensors_of(entry: Any) -> list[torch.Tensor]:
    """The tensors of one parameter's state."""
    return [value for value in entry.values() if isinstance(value, torch.Tensor)] if isinstance(entry, dict) else []
