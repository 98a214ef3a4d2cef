"""A step over state that is in files: in the mapping of the files, or past the page cache."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from optim8 import _native
from optim8.paging.options import Pager
from optim8.paging.plan import AHEAD, streaming_room
from optim8.paging.segments import Segment

# The share of the state that must be in the page cache for a step to be faster there. With less, going past it is.
_ENOUGH = 2 / 3
# Steps that go past the page cache before it is tried again whether state stays there: at first, and at last.
_FIRST_WAIT, _LAST_WAIT = 8, 64


class Stream:
    """The steps of one optimizer over its files.

    State that the page cache holds is stepped where it is mapped. What it does not hold is read through it once, for it
    may stay there. Where it does not stay, steps go past the page cache: they read and write the disk directly, which
    is faster than through a cache that holds too little, and leaves it to others. After some steps the page cache gets
    another chance.
    """

    def __init__(self, owner: str, pager: Pager) -> None:
        self.owner, self.pager = owner, pager
        self.past_cache = False  # whether the last step went so
        self._memory: Any = None  # of steps that go past the page cache
        self._wait, self._next_wait = 0, _FIRST_WAIT
        self._failed = ""

    def step(self, rows: Any, files: Sequence[Segment], host_taken: int) -> None:
        """Step rows of the CPU, without counting the step.

        Args:
            rows: their state may be in `files`, of which none is empty.
            host_taken: bytes of state in memory of the host.

        Raises:
            OSError: the disk failed, and the step has ended in the middle.
            RuntimeError: that has happened before.
        """
        if self._failed:
            raise RuntimeError(f"{self.owner}: an earlier step ended in the middle. {self._failed}")
        pager, room = self.pager, streaming_room(self.pager, host_taken)
        direct = all(file.handle is not None for file in files)
        size = min(pager.bucket_bytes // 2, room // 8) if direct else pager.bucket_bytes
        buckets = _native.cpu().Buckets(rows, [file.span for file in files], size)
        self._memory = self._memory_of(room) if direct and self._goes_past_cache(buckets.share_in_memory()) else None
        try:
            self.past_cache = buckets.run_cpu(
                _native.threads(),
                ahead=AHEAD * pager.bucket_bytes,
                release=pager.host_bytes is not None,
                files=[(file.span, file.handle) for file in files] if direct else [],
                memory=self._memory,
            )
        except OSError as error:
            number, what = error.args
            self._failed = (
                "Parameters and state are half old and half new and cannot be used. Make a new optimizer and load a "
                "checkpoint of both."
            )
            raise OSError(
                number, f"{self.owner}: the disk failed when state was {what}: {os.strerror(number)}. {self._failed}"
            ) from error

    def _goes_past_cache(self, share: float) -> bool:
        if share >= _ENOUGH:
            self._wait, self._next_wait = 0, _FIRST_WAIT
            return False
        if self._wait > 0:
            self._wait -= 1
            return True
        self._wait, self._next_wait = self._next_wait, min(2 * self._next_wait, _LAST_WAIT)
        return False

    def _memory_of(self, room: int) -> Any:
        """None where there is no such room: the mapping needs none."""
        if self._memory is not None and self._memory.size == room:
            return self._memory
        self._memory = None
        try:
            return _native.cpu().DirectMemory(room)
        except MemoryError:
            return None
