"""A step over state that is in files: where they are mapped, or in copies."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from optim8 import _native
from optim8.paging.files import Segment
from optim8.paging.pager import Pager
from optim8.paging.tiers import AHEAD, streaming_room

# What a step over files does with the state: it uses the mapping, copies through the page cache to memory of its own
# and back, or copies past the page cache.
MAPPED, CACHED, DIRECT = "mapped", "cached", "direct"

# The share of the state that must be in the page cache for a step to be faster there. With less, going past it is.
_ENOUGH = 2 / 3
# Steps that go past the page cache before it is tried again whether state stays there: at first, and at last.
_FIRST_WAIT, _LAST_WAIT = 8, 64
# Buckets that are in memory at a time where the step goes past the page cache: so many keep a disk busy.
_DIRECT_SLOTS = 8
# Bytes of a bucket that is copied from the page cache: caches of the processor hold it until it is copied back.
_CACHED_BUCKET = 2**19


class Stream:
    """The steps of one optimizer over its files.

    State that the page cache holds is stepped where it is mapped; under a limit on what may be mapped, it is copied
    from the page cache, stepped and copied back, which costs less than to map it anew in every step. What the page
    cache does not hold is read through it once, for it may stay there. Where it does not stay, steps go past the page
    cache: they read and write the disk directly, which is faster than through a cache that holds too little, and leaves
    it to others. After some steps the page cache gets another chance.
    """

    def __init__(self, owner: str, pager: Pager) -> None:
        self.owner, self.pager = owner, pager
        self.way = MAPPED  # of the last step
        self._memory: Any = None  # of steps that copy
        self._wait, self._next_wait = 0, _FIRST_WAIT
        self._failed = ""

    def step(self, rows: Any, files: Sequence[Segment], host_taken: int) -> None:
        """Step rows of the CPU, without counting the step.

        Args:
            rows: their state may be in `files`, of which none is empty.
            host_taken: bytes of state in memory of the host.

        Raises:
            OSError, MemoryError: the disk failed, or there was no memory, and the step has ended in the middle.
            RuntimeError: that has happened before.
        """
        if self._failed:
            raise RuntimeError(f"{self.owner}: an earlier step ended in the middle. {self._failed}")
        room = streaming_room(self.pager, host_taken)
        share = _native.cpu().share_in_memory([file.span for file in files])
        self.way = self._way(files, share)
        copied = None if self.way == MAPPED else self._copied(rows, files, room, share)
        try:
            if copied is None or not copied():
                self.way, self._memory = MAPPED, None
                _native.cpu().Buckets(rows, [file.span for file in files], self.pager.bucket_bytes).run_mapped(
                    _native.threads(),
                    ahead=0 if share == 1 else AHEAD * self.pager.bucket_bytes,
                    release=self.pager.host_bytes is not None,
                )
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
        if self.pager.host_bytes is not None:
            _native.cpu().release_pages([file.span for file in files])  # what somebody has looked at

    def free_memory(self) -> None:
        """Let go of what a step keeps for the next one."""
        self._memory = None

    def _copied(self, rows: Any, files: Sequence[Segment], room: int, share: float) -> Callable[[], bool] | None:
        """A step of copies of the state, which may find that it cannot be; None where there is no memory for it."""
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
        """None where there is no such room: the mapping needs none."""
        if self._memory is not None and self._memory.size == size:
            return self._memory
        self._memory = None
        try:
            return _native.cpu().DirectMemory(size)
        except MemoryError:
            return None
