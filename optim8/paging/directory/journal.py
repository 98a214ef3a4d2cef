"""Who owns a directory of state, and whether the state is whole: in a file that its owner locks and maps, so that its
content survives a kill."""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import struct
from pathlib import Path

from optim8.paging.directory import checkpoint
from optim8.paging.directory.records import Records

IDLE, STEPPING, LOADING, RETURNING, RESETTING = range(5)
_DOING = {
    STEPPING: "stepping",
    LOADING: "loading a state dict",
    RETURNING: "returning to a checkpoint",
    RESETTING: "resetting state",
}
_MAGIC = b"optim8 1"
_SIZE = 4096
# After the magic: what is being done, whether all is on the disk, whether params.json has the parameters of this state,
# process, count of steps, boot of the system, bytes of the witness, and the witness: fingerprints, as JSON, of a few of
# the parameters that the last step left.
_MARK, _SYNCED, _PARAMS, _PROCESS, _STEPS, _BOOT, _WITNESS = 8, 9, 10, 12, 16, 24, 64
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def _boot() -> bytes:
    try:
        return _BOOT_ID.read_bytes().strip()[:36].ljust(36, b"\0")
    except OSError:
        return b"\0" * 36


class Journal:
    """The lock and the marks of a directory of state, which is created where it does not exist.

    Args:
        records: of the directory.
        is_new: it holds no state yet.

    Raises:
        OSError: another optimizer has the directory, or it cannot be written to.
        RuntimeError: its journal is damaged.
    """

    def __init__(self, records: Records, is_new: bool) -> None:
        self.records, self.owner, self.directory = records, records.owner, records.directory
        owner, directory = self.owner, self.directory
        self.stepped = False  # the state is of a step of this optimizer, and params.json is older
        try:
            directory.mkdir(exist_ok=True)
            self._handle = os.open(directory / "journal", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{owner}: state needs a directory that can be written to, got {directory}: {error.strerror}. "
                "Pass a Pager with another directory.",
            ) from error
        try:
            self._lock()
            self._check_file(is_new)
            self._map = mmap.mmap(self._handle, _SIZE)
        except BaseException:
            os.close(self._handle)
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            process = struct.unpack_from("<i", os.pread(self._handle, 4, _PROCESS).ljust(4, b"\0"))[0]
            raise BlockingIOError(
                error.errno,
                f"{self.owner}: an optimizer of process {process} has the state in {self.directory}. "
                "Close it (optimizer.close()), or pass a Pager with another directory.",
            ) from error

    def _check_file(self, is_new: bool) -> None:
        size, head = os.fstat(self._handle).st_size, os.pread(self._handle, len(_MAGIC), 0)
        if is_new:
            os.posix_fallocate(self._handle, 0, _SIZE)
        elif size != _SIZE or head != _MAGIC:
            raise RuntimeError(
                f"{self.owner}: {self.directory / 'journal'} must be {_SIZE} bytes that begin with "
                f"{_MAGIC.decode()!r}, got {size} that begin with {head!r}. It is damaged or of another version of "
                "optim8, and does not tell whether the state is whole. Restore it, or start with another directory and "
                "load a checkpoint."
            )

    @property
    def problem(self) -> str:
        """Why the state cannot be used; empty where it can."""
        mark = self._map[_MARK]
        if mark != IDLE:
            doing = _DOING.get(mark, "doing what this version of optim8 does not know")
            return (
                f"the process that had the state in {self.directory} ended while it was {doing}, after step "
                f"{self.steps}. The state is half old and half new and cannot be used."
            )
        if not self.synced and self._map[_BOOT : _BOOT + 36] != _boot():
            return (
                f"the system was restarted before the state in {self.directory} was all on the disk (step "
                f"{self.steps}). It may be half old and half new and cannot be used."
            )
        return ""

    def claim(self) -> None:
        """Make this process the owner. Mark state that cannot be used, because the boot of the system, which showed it,
        is overwritten."""
        if self.problem:
            self._map[_MARK] = RETURNING
        struct.pack_into("<i", self._map, _PROCESS, os.getpid())
        self._map[_BOOT : _BOOT + 36] = _boot()
        self._map[: len(_MAGIC)] = _MAGIC

    @property
    def synced(self) -> bool:
        """Whether all is on the disk."""
        return bool(self._map[_SYNCED])

    @property
    def steps(self) -> int:
        """Steps since the directory was created, or up to the checkpoint that it has returned to."""
        return int(struct.unpack_from("<q", self._map, _STEPS)[0])

    @steps.setter
    def steps(self, count: int) -> None:
        struct.pack_into("<q", self._map, _STEPS, count)

    def check_whole(self) -> None:
        """Raise RuntimeError where an interruption in this process has left the state half changed."""
        if self._map[_MARK] not in (IDLE, RETURNING):
            raise RuntimeError(
                f"{self.owner}: {_DOING[self._map[_MARK]]} was interrupted, so the state in {self.directory} is half "
                f"old and half new. {checkpoint.advice(self.records)}"
            )

    def begin(self, what: int) -> None:
        """From here on the state is not whole.

        Raises:
            RuntimeError: it was not whole before.
        """
        self.check_whole()
        self.stepped = False
        self._map[_PARAMS] = 0
        struct.pack_into("<q", self._map, _WITNESS, 0)
        if self.synced:
            self._map[_SYNCED] = 0
            self._map.flush()  # before any state that has changed can be on the disk, for the power may fail then
        self._map[_MARK] = what

    def end(self, witness: dict[int, str] | None = None) -> None:
        """The state is whole again. `witness`: fingerprints of some parameters, after a step."""
        if witness is not None:
            self.steps += 1
            self.stepped = True
            content = json.dumps(witness).encode()
            self._map[_WITNESS + 8 : _WITNESS + 8 + len(content)] = content
            struct.pack_into("<q", self._map, _WITNESS, len(content))
        self._map[_MARK] = IDLE

    @property
    def witness(self) -> dict[int, str]:
        """Fingerprints, by position, of some of the parameters that the last step left; empty where the last change was
        no step."""
        size = struct.unpack_from("<q", self._map, _WITNESS)[0]
        try:
            content = json.loads(self._map[_WITNESS + 8 : _WITNESS + 8 + size]) if size else {}
            return {int(place): str(text) for place, text in content.items()}
        except (ValueError, AttributeError) as error:
            raise ValueError(
                f"{self.owner}: {self.directory / 'journal'} is damaged: what it says of parameters is no JSON. "
                "Restore it, or start with another directory and load a checkpoint."
            ) from error

    @property
    def has_params(self) -> bool:
        """Whether params.json has the parameters of this state."""
        return bool(self._map[_PARAMS])

    def note_params(self) -> None:
        """From here on params.json has them."""
        self._map[_PARAMS] = 1
        self.stepped = False

    def note_sync(self) -> None:
        """From here on all is on the disk."""
        if self._map[_MARK] == IDLE:
            self._map[_SYNCED] = 1
            self._map.flush()

    def close(self) -> None:
        """Give the directory back. May be called twice."""
        if not self._map.closed:
            self._map.close()
            os.close(self._handle)

    @property
    def closed(self) -> bool:
        """Whether the directory was given back."""
        return self._map.closed
