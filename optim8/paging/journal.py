"""What a kept directory says of itself: who has it, whether its state is whole, and what the last checkpoint was.

Files: `journal`, locked by its owner and mapped, so that what it says survives a kill; `layout.json`, where each
tensor lies; `options.pt`, the options of the parameter groups; `state-<n>.bin`, the state; `params.json`, fingerprints
of the parameters that the last step left.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import struct
import time
from pathlib import Path
from typing import Any

import torch

IDLE, STEPPING, LOADING = range(3)
_DOING = {STEPPING: "stepping", LOADING: "loading a state dict"}
_MAGIC = b"optim8 1"
_SIZE = 4096
# After the magic: what is being done, whether all is on the disk, whether params.json tells of the parameters of this
# state, process, count of steps, boot of the system.
_MARK, _SYNCED, _PARAMS, _PROCESS, _STEPS, _BOOT = 8, 9, 10, 12, 16, 24
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def _boot() -> bytes:
    try:
        return _BOOT_ID.read_bytes().strip()[:36].ljust(36, b"\0")
    except OSError:
        return b"\0" * 36


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file, so that it is the old one or the new one also after a kill or a power cut."""
    beside = path.with_name(f".{path.name}.new")
    with beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


class Journal:
    """The lock and the marks of a kept directory.

    Raises:
        OSError: the directory cannot be used: another optimizer has it, it cannot be written to, it holds state though
            nothing is to be resumed, or none though it is.
        RuntimeError: its state is not whole; the message names the last checkpoint.
    """

    def __init__(self, owner: str, directory: Path, resume: bool) -> None:
        self.owner, self.directory = owner, directory
        self.stepped = False  # the state is that of a step made here, of whose parameters there is no word yet
        path = directory / "journal"
        try:
            directory.mkdir(exist_ok=True)
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{owner}: state needs a directory that can be written to, got {directory}: {error.strerror}. "
                "Pass a Pager with another directory.",
            ) from error
        try:
            self._lock()
            if os.fstat(self._handle).st_size < _SIZE:
                os.posix_fallocate(self._handle, 0, _SIZE)
            self._map = mmap.mmap(self._handle, _SIZE)
        except BaseException:
            os.close(self._handle)
            raise
        try:
            self.layout = self._read_layout(resume)
        except BaseException:
            self.close()  # the mapping has the lock too
            raise
        struct.pack_into("<i", self._map, _PROCESS, os.getpid())
        self._map[_BOOT : _BOOT + 36] = _boot()
        self._map[: len(_MAGIC)] = _MAGIC

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

    def _read_layout(self, resume: bool) -> dict[str, Any] | None:
        path = self.directory / "layout.json"
        if not path.exists():
            if resume:
                raise FileNotFoundError(
                    f"{self.owner}: resume=True needs state that was kept in {self.directory}, found none. "
                    "Pass the directory of the earlier run, or resume=False."
                )
            return None
        layout: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not resume:
            raise FileExistsError(
                f"{self.owner}: {self.directory} holds the state of another run ({layout['optimizer']}, step "
                f"{self.steps}). Pass resume=True to go on with it, or another directory to start anew."
            )
        mark = self._map[_MARK]
        if self._map[: len(_MAGIC)] != _MAGIC:
            raise RuntimeError(f"{self.owner}: {path.parent}/journal is not one of optim8. {self._advice()}")
        if mark != IDLE:
            raise RuntimeError(
                f"{self.owner}: the process that had the state in {self.directory} ended while it was {_DOING[mark]}, "
                f"after step {self.steps}. The state is half old and half new and cannot be used. {self._advice()}"
            )
        if not self._map[_SYNCED] and self._map[_BOOT : _BOOT + 36] != _boot():
            raise RuntimeError(
                f"{self.owner}: the system was restarted before the state in {self.directory} was all on the disk "
                f"(step {self.steps}). It may be half old and half new and cannot be used. {self._advice()}"
            )
        return layout

    def _advice(self) -> str:
        path = self.directory / "checkpoint.json"
        begin = "Start with another directory and load a checkpoint"
        if not path.exists():
            return f"{begin}; none was taken from this state."
        last = json.loads(path.read_text(encoding="utf-8"))
        return f"{begin}; the last one is {last['what']} of step {last['step']}, {last['time']}."

    @property
    def steps(self) -> int:
        """Steps that were made since the directory was made."""
        return int(struct.unpack_from("<q", self._map, _STEPS)[0])

    def begin(self, what: int) -> None:
        """From here on the state is not whole.

        Raises:
            RuntimeError: it was not whole before.
        """
        if self._map[_MARK] != IDLE:
            raise RuntimeError(
                f"{self.owner}: {_DOING[self._map[_MARK]]} was interrupted, so the state in {self.directory} is half "
                f"old and half new. {self._advice()}"
            )
        self.stepped = False
        self._map[_PARAMS] = 0
        if self._map[_SYNCED]:
            self._map[_SYNCED] = 0
            self._map.flush()  # before any state that has changed can be on the disk, for the power may fail then
        self._map[_MARK] = what

    def end(self, stepped: bool) -> None:
        """The state is whole again."""
        if stepped:
            struct.pack_into("<q", self._map, _STEPS, self.steps + 1)
            self.stepped = True
        self._map[_MARK] = IDLE

    def note_checkpoint(self, what: str) -> None:
        """Remember the last checkpoint, for those who find the state half stepped."""
        last = {"what": what, "step": self.steps, "time": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())}
        write_whole(self.directory / "checkpoint.json", json.dumps(last).encode())

    def write_layout(self, layout: dict[str, Any]) -> None:
        """Make it what the directory holds; files of state that it does not name are removed."""
        write_whole(self.directory / "layout.json", json.dumps(layout).encode())
        self.layout = layout
        self.tidy()

    def tidy(self) -> None:
        """Remove files of state that the layout does not name."""
        named = set() if self.layout is None else {segment["file"] for segment in self.layout["segments"]}
        for path in self.directory.glob("state-*.bin"):
            if path.name not in named:
                path.unlink()

    def write_options(self, groups: list[dict[str, Any]]) -> None:
        """The options of the parameter groups, without their parameters."""
        beside = self.directory / ".options.pt.new"
        torch.save(groups, beside)
        beside.replace(self.directory / "options.pt")

    def read_options(self) -> list[dict[str, Any]]:
        """What write_options wrote."""
        return torch.load(self.directory / "options.pt", weights_only=True)  # type: ignore[no-any-return]

    def write_params(self, fingerprints: dict[int, str]) -> None:
        """Fingerprints of the parameters that the last step left, by position."""
        content = {"steps": self.steps, "params": fingerprints}
        write_whole(self.directory / "params.json", json.dumps(content).encode())
        self._map[_PARAMS] = 1
        self.stepped = False

    def read_params(self) -> dict[int, str]:
        """What write_params wrote, if that was after the last change of the state; else nothing."""
        path = self.directory / "params.json"
        if not self._map[_PARAMS] or not path.exists():
            return {}
        content = json.loads(path.read_text(encoding="utf-8"))
        # After a power cut the file may be an older one than the journal knows.
        same = content["steps"] == self.steps
        return {int(place): text for place, text in content["params"].items()} if same else {}

    def sync(self) -> None:
        """All of it to the disk."""
        for path in self.directory.iterdir():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
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
