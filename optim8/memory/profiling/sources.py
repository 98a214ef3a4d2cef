"""Sources of the profiler: the CUDA allocator, torch's CPU allocations, or the resident set of the process.

The profiler marks moments. For each mark a source gives the bytes in use, and the most in use since the mark before.
"""

from __future__ import annotations

import contextlib
import operator
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

# torch.profiler always records operators as well, which costs many times as much as memory alone.
_profiler: Any = torch._C._autograd

_LONGEST_STATUS = 2**16  # bytes; it lists the groups of the user before the memory

Reading = tuple[int, int]  # bytes in use at a mark, most bytes in use since the mark before


class Source(Protocol):
    """Reads memory for a profile."""

    name: str
    meaning: str

    def start(self, known: int, gradients: Sequence[torch.Tensor]) -> None:
        """Begin, with mark 0. The profile knows tensors of `known` bytes that are in use now; `gradients` are those of
        them that may be freed."""

    def mark(self) -> None:
        """Mark this moment."""

    def readings(self, last: bool) -> Sequence[Reading]:
        """The readings of the marks since the last call. `last`: stop, and leave nothing behind."""


class CudaSource:
    """torch's caching allocator on one device. Every mark resets its peak."""

    name, meaning = "cuda", "bytes of tensors on the GPU, by torch's allocator"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._readings: list[Reading] = []

    def start(self, known: int, gradients: Sequence[torch.Tensor]) -> None:
        self.mark()

    def mark(self) -> None:
        # One call for what memory_allocated and max_memory_allocated each look up among all counters.
        counters = torch.cuda.memory_stats_as_nested_dict(self._device)["allocated_bytes"]["all"]
        self._readings.append((counters["current"], counters["peak"]))
        torch.cuda.reset_peak_memory_stats(self._device)

    def readings(self, last: bool) -> Sequence[Reading]:
        found, self._readings = self._readings, []
        return found


class AllocationSource:
    """Every allocation of the CPU allocator by this thread and its backward passes, as torch's profiler reports them.

    torch's profiler runs without recording operators. It does not report the end of allocations from before its start,
    so this source watches gradients from before. Other tensors from before count where the profile knows them.
    """

    name, meaning = "allocations", "bytes of tensors in RAM, by torch's CPU allocator"
    _MARK, _FREED = "optim8.memory mark", "optim8.memory freed "

    def __init__(self) -> None:
        self._level = 0
        self._before: dict[int, int] = {}  # bytes of gradients from before, by address
        self._watches: list[Any] = []

    def start(self, known: int, gradients: Sequence[torch.Tensor]) -> None:
        if _profiler._profiler_enabled():
            raise RuntimeError(
                "optim8.memory.profile: source='allocations' needs torch's profiler, which is running already. End it "
                "first, or pass source='rss'."
            )
        self._level = known
        self._before = {gradient.data_ptr(): gradient.nbytes for gradient in gradients}
        self._watches = [weakref.finalize(gradient, self._note_end, gradient.data_ptr()) for gradient in gradients]
        self._enable()
        self.mark()

    def mark(self) -> None:
        _note(self._MARK)

    def _note_end(self, address: int) -> None:
        _note(f"{self._FREED}{address}")

    def readings(self, last: bool) -> Sequence[Reading]:
        result = _profiler._disable_profiler()
        if last:
            for watch in self._watches:
                watch.detach()
        else:
            self._enable()
        events = result.events()  # hundreds for each step, so an allocation may cost no more than two calls here
        starts = [event.start_ns() for event in events]
        if any(map(operator.gt, starts, starts[1:])):
            events = [event for _, event in sorted(zip(starts, events), key=operator.itemgetter(0))]
        from_before: set[int] | None = None
        found: list[Reading] = []
        level = most = self._level
        for event in events:
            size = event.nbytes()
            if size:
                level += size
                if level > most:
                    most = level
                continue
            name = event.name()
            if name == self._MARK:
                found.append((level, most))
                most = level
            elif name.startswith(self._FREED):
                from_before = _addresses_from_before(result) if from_before is None else from_before
                address = int(name[len(self._FREED) :])
                level -= 0 if address in from_before else self._before[address]
        self._level = level
        return found

    def _enable(self) -> None:
        inner: Any = torch._C._profiler
        config = inner.ProfilerConfig(
            inner.ProfilerState.KINETO, False, True, False, False, False, inner._ExperimentalConfig()
        )
        activities = {inner.ProfilerActivity.CPU}
        _profiler._prepare_profiler(config, activities)
        _profiler._enable_profiler(config, activities, {inner.RecordScope.USER_SCOPE})


def _note(name: str) -> None:
    """Record an event of this name. `torch.profiler.record_function` takes several times as long for the same."""
    _profiler._record_function_with_args_exit(_profiler._record_function_with_args_enter(name))


def _addresses_from_before(result: Any) -> set[int]:
    """Addresses whose first event is a deallocation: an earlier run of torch's profiler saw the allocation."""
    first: dict[int, tuple[int, int]] = {}
    waiting = list(result.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.name == "[memory]":
            address, told = event.extra_fields.ptr, (event.start_time_ns, event.extra_fields.alloc_size)
            first[address] = min(told, first.get(address, told))
    return {address for address, (_, size) in first.items() if size < 0}


class ResidentSource:
    """The resident set of the process as Linux counts it: with Python, libraries, and memory that the allocator holds
    for reuse.

    Every mark resets its peak, which the kernel counts. The files stay open between marks, because opening one takes
    longer than reading it.
    """

    name, meaning = "rss", "resident set of the process, Python and libraries included"
    _STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def __init__(self) -> None:
        self._readings: list[Reading] = []
        self._files = contextlib.ExitStack()

    def start(self, known: int, gradients: Sequence[torch.Tensor]) -> None:
        try:
            self._status = self._files.enter_context(self._STATUS.open("rb", buffering=0))
            self._clear = self._files.enter_context(self._CLEAR.open("wb", buffering=0))
            self.mark()
        except OSError as error:
            self._files.close()
            raise RuntimeError(
                f"optim8.memory.profile: source='rss' needs Linux's /proc/self, which cannot be used: {error}. "
                "Pass source='allocations'."
            ) from None

    def mark(self) -> None:
        text = os.pread(self._status.fileno(), _LONGEST_STATUS, 0)
        now, most = (1024 * int(text[text.index(key) + len(key) :].split(None, 1)[0]) for key in (b"VmRSS:", b"VmHWM:"))
        self._readings.append((now, max(now, most)))
        self._clear.write(b"5")

    def readings(self, last: bool) -> Sequence[Reading]:
        if last:
            self._files.close()
        found, self._readings = self._readings, []
        return found


def source_for(name: str | None, device: torch.device) -> Source:
    """The source of this name; None for the one that fits the device."""
    name = name or ("cuda" if device.type == "cuda" else "allocations")
    if name == "cuda" and device.type == "cuda":
        return CudaSource(device)
    if name == "allocations" and device.type == "cpu":
        return AllocationSource()
    if name == "rss":
        return ResidentSource()
    raise ValueError(
        f"optim8.memory.profile: source must be 'cuda' (for a model on a GPU), 'allocations' (for one on the CPU) or "
        f"'rss', got {name!r} for a model on {device.type}."
    )
