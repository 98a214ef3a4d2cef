"""A step over state that is in files: in their mapping, or in copies of their parts."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from optim8 import _native
from optim8.paging.files import Segment
from optim8.paging.pager import Pager
from optim8.paging.tiers import AHEAD, streaming_room
from optim8.step.norms import Reduce, measured

# The ways of a step over files: it works in the mapping, copies state through the page cache to memory of its own and
# back, or copies past the page cache.
MAPPED, CACHED, DIRECT = "mapped", "cached", "direct"

# The share of the state that must be in the page cache for a step to be faster there. With less, going past it is.
_ENOUGH = 2 / 3
# Steps that go past the page cache before one tries again whether state stays in it: at first, and at most.
_FIRST_WAIT, _LAST_WAIT = 8, 64
# Buckets in memory at a time where a step goes past the page cache: enough to keep a disk busy.
_DIRECT_SLOTS = 8
# Bytes of a bucket that is copied from the page cache: small enough that the processor's caches hold it meanwhile.
_CACHED_BUCKET = 2**19


class Stream:
    """The steps of one optimizer over its files.

    A step works in the mapping where the page cache holds the state. Under a limit on mapped pages it copies state from
    the page cache, steps it and copies it back, which costs less than to map it anew in every step. State that the page
    cache does not hold is read through it once, for it may stay there. Where it does not stay, steps go past the page
    cache: they read and write the disk directly, which is faster than through a cache that holds too little, and leaves
    the cache to others. After some steps one tries the page cache again.
    """

    def __init__(self, owner: str, pager: Pager) -> None:
        self.owner, self.pager = owner, pager
        self.way = MAPPED  # of the last step
        self._memory: Any = None  # of steps that copy
        self._wait, self._next_wait = 0, _FIRST_WAIT
        self._failed = ""

    def step(self, rows: Any, files: Sequence[Segment], host_taken: int, reduce: Reduce | None = None) -> None:
        """Step rows of parameters on the CPU. The step is not counted.

        Args:
            rows: their state may be in `files`. No file is empty.
            host_taken: bytes of state in memory of the host.
            reduce: for a rule with norms, what adds up those of shards; None: there are none.

        Raises:
            OSError, MemoryError: the disk failed or memory ran out, and the step has ended in the middle.
            RuntimeError: an earlier step ended so.
        """
        if self._failed:
            raise RuntimeError(f"{self.owner}: an earlier step ended in the middle. {self._failed}")
        room = streaming_room(self.pager, host_taken)
        share = _native.cpu().share_in_memory([file.span for file in files])
        self.way = self._way(files, share)
        mapped = {
            "ahead": 0 if share == 1 else AHEAD * self.pager.bucket_bytes,
            "release": self.pager.host_bytes is not None,
        }
        # Whatever the way of the step, what it depends on is read from the mapping: this changes nothing.
        sums = measured(rows, reduce, partial(self._measure, rows, files, mapped)) if rows.has_norms else None
        step_in_copies = None if self.way == MAPPED else self._step_in_copies(rows, files, room, share)
        try:
            if step_in_copies is None or not step_in_copies():
                self.way, self._memory = MAPPED, None
                self._buckets(rows, files).run_mapped(_native.threads(), **mapped)
        except (OSError, MemoryError) as error:
            self._failed = (
                "Parameters and state are half old and half new and cannot be used. Make a new optimizer and load a "
                "checkpoint of both."
            )
            if isinstance(error, MemoryError):
                raise MemoryError(f"{self.owner}: no memory in the middle of a step. {self._failed}") from error
            number, what = error.args
            raise OSError(
                number, f"{self.owner}: the disk failed when state was {what}: {os.strerror(number)}. {self._failed}"
            ) from error
        del sums  # the step has taken them from there
        if self.pager.host_bytes is not None:
            _native.cpu().release_pages([file.span for file in files])  # pages that somebody has read

    def _buckets(self, rows: Any, files: Sequence[Segment]) -> Any:
        return _native.cpu().Buckets(rows, [file.span for file in files], self.pager.bucket_bytes)

    def _measure(self, rows: Any, files: Sequence[Segment], mapped: dict[str, Any]) -> None:
        self._buckets(rows, files).measure_mapped(_native.threads(), **mapped)

    def free_memory(self) -> None:
        """Free the memory that a step keeps for the next one."""
        self._memory = None

    def _step_in_copies(
        self, rows: Any, files: Sequence[Segment], room: int, share: float
    ) -> Callable[[], bool] | None:
        """A step on copies of the state, False where it cannot run; None where there is no memory for copies."""
        direct, threads = self.way == DIRECT, _native.threads()
        size = min(self.pager.bucket_bytes // 2 if direct else _CACHED_BUCKET, room // (_DIRECT_SLOTS + 1))
        memory = self._memory = self._memory_of(room if direct else min(room, 2 * threads * _CACHED_BUCKET))
        if memory is None:
            return None
        return partial(
            _native.cpu().Buckets(rows, [file.span for file in files], size).run_copied,
            threads,
            ahead=0 if direct or share == 1 else AHEAD * self.pager.bucket_bytes,
            files=[(file.span, file.direct if direct else file.handle) for file in files],
            memory=memory,
            slots=_DIRECT_SLOTS if direct else threads,
        )

    def _way(self, files: Sequence[Segment], share: float) -> str:
        if not files:
            return MAPPED
        if all(file.direct is not None for file in files) and self._goes_past_cache(share):
            return DIRECT
        return MAPPED if self.pager.host_bytes is None else CACHED

    def _goes_past_cache(self, share: float) -> bool:
        if share >= _ENOUGH:
            self._wait, self._next_wait = 0, _FIRST_WAIT
            return False
        if self._wait > 0:
            self._wait -= 1
            return True
        self._wait, self._next_wait = self._next_wait, min(2 * self._next_wait, _LAST_WAIT)
        return False

    def _memory_of(self, size: int) -> Any:
        """Memory for copies; None where there is none: the mapping needs no memory."""
        if self._memory is not None and self._memory.size == size:
            return self._memory
        self._memory = None
        try:
            return _native.cpu().DirectMemory(size)
        except MemoryError:
            return None
