"""The last noted checkpoint of a directory of state, and the copy of the state at that step."""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from optim8.paging.directory.records import Records
from optim8.paging.files import Segment, reserve

NAME, OPTIONS = "checkpoint.json", "checkpoint-options.pt"
STATE_DICT = "a state dict that was taken"
_CHUNK = 2**20  # bytes that are in memory at a time
_DAMAGED = "Restore it, or remove it to resume without that checkpoint."


@dataclass(frozen=True)
class Checkpoint:
    """A noted checkpoint. Without a copy `layout` (layout.json of that step) and `params` (fingerprints) are empty."""

    what: str
    step: int
    time: str
    layout: dict[str, Any] = field(default_factory=dict)
    params: dict[int, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.what} of step {self.step}"

    @property
    def nbytes(self) -> int:
        """Bytes of the copy; 0 where there is none."""
        return sum(int(segment["size"]) for segment in self.layout.get("segments", ()))


def now(what: str, step: int) -> Checkpoint:
    """A checkpoint of this moment, without a copy."""
    return Checkpoint(what, step, time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()))


def read(records: Records) -> Checkpoint | None:
    """The last noted checkpoint.

    Raises:
        ValueError: the file that tells of it is damaged.
    """
    content = records.read_json(NAME, {"what": str, "step": int, "time": str}, _DAMAGED)
    if content is None:
        return None
    with records.parsing(NAME, _DAMAGED):
        params = {int(place): str(text) for place, text in content.get("params", {}).items()}
        made = Checkpoint(content["what"], content["step"], content["time"], content.get("layout", {}), params)
        made.nbytes  # noqa: B018  # raises where the layout is damaged
    return made


def advice(records: Records) -> str:
    """Advice for a user whose state cannot be used."""
    begin = "Start with another directory and load a checkpoint"
    try:
        last = read(records)
    except ValueError as error:
        return f"{begin}; which one was the last is not known: {error}"
    if last is None:
        return f"{begin}; none was taken from this state."
    more = ", to which Pager(..., resume='checkpoint') returns here" if last.layout else ""
    return f"{begin}; the last one is {last}, {last.time}{more}."


def write(records: Records, checkpoint: Checkpoint) -> None:
    """Make it the last noted checkpoint."""
    records.write_json(NAME, asdict(checkpoint))


def path_of_copy(records: Records, index: int) -> Path:
    """The copy of the file of state that has this index in the layout."""
    return records.directory / f"checkpoint-{index}.bin"


def make_room(records: Records, files: Sequence[Segment]) -> None:
    """Reserve blocks on the disk for a copy of these files, beyond those of an earlier copy, whose content stays.

    Raises:
        OSError: there is no room. Nothing has changed.
    """
    made = []
    try:
        for index, file in enumerate(files):
            path = path_of_copy(records, index)
            if not path.exists():
                made.append(path)
            with _descriptor(path, os.O_RDWR | os.O_CREAT) as handle:
                if os.fstat(handle).st_size < file.memory.numel():
                    reserve(handle, file.memory.numel(), records.directory, _NO_ROOM)
    except OSError:
        for path in made:
            path.unlink(missing_ok=True)
        raise


_NO_ROOM = (
    " for a copy of it at the checkpoint (note_checkpoint); the state itself is unharmed. To go without, so that a run "
    "that is killed may have to load the checkpoint, pass Pager(..., checkpoint_copy=False)"
)


def copy_state(records: Records, files: Sequence[Segment], past_cache: bool) -> None:
    """Copy files of state, so that the copies are on the disk; remove what earlier copies leave over.

    Args:
        records: of the directory.
        files: those that make_room got.
        past_cache: go past the page cache, where the file system can.
    """
    for index, file in enumerate(files):
        path, size = path_of_copy(records, index), file.memory.numel()
        direct = past_cache and file.direct is not None
        with _descriptor(path, os.O_RDWR | (os.O_DIRECT if direct else 0)) as goal:
            source = file.direct if direct else file.handle
            if source is not None:
                _copy(source, goal, 0, size)
            os.ftruncate(goal, size)
            os.fsync(goal)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(goal, 0, 0, os.POSIX_FADV_DONTNEED)  # nobody reads it soon
    remove_copies(records, len(files))
    records.sync_names()


def remove_copies(records: Records, first: int = 0) -> None:
    """Remove the copies of files of state from index `first` on."""
    for path in records.directory.glob("checkpoint-*.bin"):
        index = path.stem.removeprefix("checkpoint-")
        if index.isdecimal() and int(index) >= first:
            path.unlink()


def copy_back(source: Path, goal: Path, head: bytes, size: int) -> None:
    """Make a new file of state, with another head, from a copy.

    Raises:
        OSError: there is no room for it. Nothing is left behind.
    """
    try:
        with (
            _descriptor(goal, os.O_RDWR | os.O_CREAT | os.O_EXCL) as to,
            _descriptor(source, os.O_RDONLY) as of,
        ):
            reserve(to, size, goal.parent, " to return to the checkpoint beside the state of the last step")
            os.pwrite(to, head, 0)
            _copy(of, to, len(head), size)
    except BaseException:
        goal.unlink(missing_ok=True)
        raise


def _copy(source: int, goal: int, begin: int, end: int) -> None:
    """Copy through a buffer of whole pages, which I/O past the page cache needs. The system's own copy could let both
    files share blocks; whoever writes to one later would then need room that nobody has reserved."""
    with mmap.mmap(-1, _CHUNK) as buffer, memoryview(buffer) as memory:
        for at in range(begin, end, _CHUNK):
            size = min(_CHUNK, end - at)
            done = 0
            while done < size:
                count = os.preadv(source, [memory[done:size]], at + done)
                if count == 0:
                    raise OSError(5, f"the file has ended after {at + done} of {end} bytes")
                done += count
            done = 0
            while done < size:
                done += os.pwritev(goal, [memory[done:size]], at + done)


@contextlib.contextmanager
def _descriptor(path: Path, flags: int) -> Iterator[int]:
    handle = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield handle
    finally:
        os.close(handle)
