"""Segments, from which tensors of state are cut: memory of the host, or a memory-mapped file."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from optim8.state.allocation import DISK, HOST, Arena
from optim8.state.mapped import PAGE, limit

_NUMPY = {torch.uint8: np.uint8, torch.int16: np.int16, torch.float32: np.float32}
_CHUNK = 2**20  # bytes written at a time to fill a file


@dataclass(frozen=True, eq=False)
class Segment:
    """One allocation. A mapped file stays mapped as long as the segment or any tensor in it lives."""

    tier: str
    memory: torch.Tensor  # uint8, flat
    path: Path | None = None  # of a file that outlives the process; any other file has no name
    limited: bool = False  # a mapped file of which only so many pages may be in memory
    pinned: bool = False  # CUDA kernels may use it by its addresses
    handle: int | None = None  # of a file that keeps its name or is limited, for copies; closed with the segment
    direct: int | None = None  # the same past the page cache, where the file system has that

    def __post_init__(self) -> None:
        for handle in (self.handle, self.direct):
            if handle is not None:
                weakref.finalize(self, os.close, handle)
        if self.limited:
            limit(self)

    @property
    def span(self) -> tuple[int, int]:
        """Its addresses: first, one past the last."""
        begin = self.memory.data_ptr()
        return begin, begin + self.memory.numel()

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's values lie in it."""
        begin, end = self.span
        return begin <= tensor.data_ptr() < end


def offsets(arenas: Sequence[Arena], head: int = 0) -> tuple[list[int], int]:
    """The byte at which each arena begins behind `head` bytes, and the size of the whole segment, in whole pages."""
    begins, at = [], head
    for arena in arenas:
        begins.append(at)
        at += -(-arena.size * arena.dtype.itemsize // PAGE) * PAGE
    return begins, at


def part(memory: torch.Tensor, begin: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """`size` values of `memory` from byte `begin` on, with a storage of their own: torch.save refuses one storage with
    several dtypes."""
    return torch.from_numpy(memory.numpy()[begin : begin + size * dtype.itemsize].view(_NUMPY[dtype]))


def cut(memory: torch.Tensor, arenas: Sequence[Arena], begins: Sequence[int]) -> None:
    """Give every arena its part of `memory`."""
    for arena, begin in zip(arenas, begins, strict=True):
        arena.flat = part(memory, begin, arena.size, arena.dtype)


def in_memory(arenas: Sequence[Arena], pinned: bool) -> Segment:
    """A segment in memory of the host. Every arena has its fill."""
    begins, size = offsets(arenas)
    memory = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    cut(memory, arenas, begins)
    for arena in arenas:
        arena.flat.fill_(arena.fill)
    return Segment(HOST, memory, pinned=pinned)


def in_file(
    arenas: Sequence[Arena], directory: Path, limited: bool, keep_as: str | None = None, head: bytes = b""
) -> Segment:
    """A segment in a new file of `directory`. Every arena has its fill.

    Args:
        arenas: get their memory.
        directory: of the file.
        limited: only so many of its pages may be in memory.
        keep_as: the name of the file; None: it has no name, and is gone when its mapping ends.
        head: whole pages at the beginning of the file.

    Raises:
        OSError: the file cannot be created or filled, for example because the disk is full. Nothing is left behind.
    """
    begins, size = offsets(arenas, len(head))
    try:
        if keep_as is None:
            handle, name = tempfile.mkstemp(prefix="optim8-", suffix=".paged", dir=directory)
            path = Path(name)
        else:
            path = directory / keep_as
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        what = f"a directory that can be written to, got {directory}: {error.strerror}"
        if error.errno in (errno.EMFILE, errno.ENFILE):
            what = f"a file or two for each optimizer: {error.strerror}. Raise the limit (ulimit -n), or give one "
            what += "optimizer several parameters"
        raise OSError(error.errno, f"paged state needs {what}.") from error
    kept = False
    try:
        if size:
            reserve(handle, size, directory)
            os.pwrite(handle, head, 0)
            for arena, begin in zip(arenas, begins, strict=True):
                _fill(handle, begin, arena)
        segment = map_file(path, size, limited, named=keep_as is not None)
        kept = keep_as is not None
    finally:
        os.close(handle)
        if not kept:
            path.unlink()
    cut(segment.memory, arenas, begins)
    return segment


def map_file(path: Path, size: int, limited: bool, named: bool = True) -> Segment:
    """A segment of the first `size` bytes of a file, mapped so that whoever writes to them writes to the file; `named`:
    the file keeps its name."""
    if size == 0:
        return Segment(DISK, torch.empty(0, dtype=torch.uint8), path if named else None, limited)
    memory = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
    handle = os.open(path, os.O_RDWR | os.O_CLOEXEC) if named or limited else None
    return Segment(DISK, memory, path if named else None, limited, handle=handle, direct=_past_cache(path))


def _past_cache(path: Path) -> int | None:
    """A descriptor of the file that reads and writes past the page cache; None where the file system, such as one in
    memory, has no such access."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        return None
    try:
        with mmap.mmap(-1, PAGE) as page:
            os.preadv(handle, [page], 0)
    except OSError:
        os.close(handle)
        return None
    return handle


def reserve(handle: int, size: int, directory: Path, what_for: str = "") -> None:
    """Reserve blocks on the disk for the whole file. Without them a full disk kills the process (SIGBUS) in a step.

    Raises:
        OSError: there is no room; the message says `what_for`.
    """
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        free = ""
        with contextlib.suppress(OSError):
            at = os.fstatvfs(handle)
            free = f", which has {at.f_bavail * at.f_frsize / 2**20:.1f} MiB free"
        advice = {
            errno.ENOSPC: "Make room, or pass a Pager with another directory.",
            errno.EDQUOT: "Ask for more quota, or pass a Pager with another directory.",
            errno.EFBIG: "Raise the limit on the size of files (ulimit -f), or pass a Pager with another directory.",
        }.get(error.errno or 0, "Pass a Pager with another directory.")
        raise OSError(
            error.errno,
            f"paged state needs {size / 2**20:.1f} MiB in {directory}{free}{what_for}: {error.strerror}. {advice}",
        ) from error


def _fill(handle: int, begin: int, arena: Arena) -> None:
    """Write an arena's fill through the file and not through its mapping, which would become memory of this process.
    Zeros are written too: the first step is then as fast as every later one, which finds no blocks that are only
    reserved."""
    size = arena.size * arena.dtype.itemsize
    one = torch.full((1,), arena.fill, dtype=arena.dtype).view(torch.uint8).numpy().tobytes()
    chunk = one * min(_CHUNK // len(one), arena.size)
    at, end = begin, begin + size
    while at < end:
        at += os.pwrite(handle, chunk[: end - at], at)


def check_directory(directory: Path) -> None:
    """Raise OSError where no file can be created in `directory`."""
    try:
        handle, name = tempfile.mkstemp(prefix="optim8-", suffix=".paged", dir=directory)
    except OSError as error:
        raise OSError(
            error.errno,
            f"paged state needs a directory that is there and can be written to, got {directory}: {error.strerror}. "
            "Make it, or pass a Pager with another directory.",
        ) from error
    os.close(handle)
    Path(name).unlink()
