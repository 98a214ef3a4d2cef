"""What a user says about where optimizer state may live."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from optim8.text import UNITS, parse_bytes, size_text

_SIZES = ("device_budget", "host_budget", "bucket", "device_reserve")  # options in bytes
SMALLEST_BUCKET = 64 * 2**10  # below, the cost of a bucket outweighs its work


def as_bytes(name: str, value: int | str) -> int:
    """A size in bytes from a number, or from a text such as "2GiB", "500 MB" or "1.5GiB".

    Raises:
        ValueError, TypeError: it is neither; the message calls it `name`.
    """
    size = parse_bytes(value)
    if size is not None:
        return size
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(f"Pager: {name} must be bytes or a text such as '2GiB', got {value!r}.")
    if isinstance(value, int):
        raise ValueError(f"Pager: {name} must be 0 bytes or more, got {value}.")
    raise ValueError(f"Pager: {name} must be a number and a unit ({UNITS}), got {value!r}.")


@dataclass(frozen=True, repr=False)
class Pager:
    """Where the state of an optimizer may live. `paged=True` is `paged=Pager()`.

    State fills the fastest tier first, parameter by parameter: memory of the parameter's device, memory of the host
    (pinned for CUDA parameters), a memory-mapped file (for parameters on the CPU only). On a machine's CPU the first
    two are one. A step streams what is in the file in buckets, and gives the bits that it would give otherwise.

    Args:
        device_budget: bytes of state on a CUDA device, a number or a text such as "2GiB". None: what is free when
            state is made, less `device_reserve`.
        host_budget: bytes of host memory. None: for CUDA parameters no limit; for parameters on the CPU all state is
            in the file, and as much of it is in memory as the system's page cache holds. A limit covers the buckets
            that are being stepped too: a step copies them from the file and back, and leaves none of it mapped.
        directory: folder of the file; a relative one is taken from the present working directory. None: that of
            temporary files, which TMPDIR names; mind that some systems have that in memory. It must be there, except
            with `keep`.
        keep: keep the file. All state is in `directory` then, which is a checkpoint of its own. It belongs to one
            optimizer at a time, whose parameters are on the CPU.
        resume: go on with the state that an earlier optimizer kept in `directory`; needs `keep`. True: with the state
            of its last step, or of the checkpoint that it noted last (note_checkpoint), whichever the parameters are
            of; where the state of the last step cannot be used, with the checkpoint's. "checkpoint": with the
            checkpoint's.
        bucket: bytes of the budget that are kept for streaming. A step over the file takes what the budget leaves, but
            no more than four times that, and moves state in smaller pieces, of a half at most.
        device_reserve: bytes to leave free on a CUDA device where `device_budget` is None.
        changed_params: go on also with parameters other than those that the last step in `directory` left; needs
            `resume`. They are refused otherwise, where the directory tells of them.
        checkpoint_copy: have note_checkpoint copy the state, so that a run that was killed later can return to it.
            That takes as much room on the disk as the state, once. False: such a run starts anew from its checkpoint.

    Raises:
        ValueError, TypeError: an option cannot be honoured.
    """

    device_budget: int | str | None = None
    host_budget: int | str | None = None
    directory: str | os.PathLike[str] | None = None
    keep: bool = False
    resume: bool | Literal["checkpoint"] = False
    bucket: int | str = "16MiB"
    device_reserve: int | str = "1GiB"
    changed_params: bool = False
    checkpoint_copy: bool = True

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, as_bytes(name, value))
        if self.bucket_bytes < SMALLEST_BUCKET:
            raise ValueError(f"Pager: bucket must be {SMALLEST_BUCKET} bytes or more, got {self.bucket_bytes}.")
        if self.host_bytes is not None and self.host_bytes < self.bucket_bytes:
            raise ValueError(
                f"Pager: host_budget must have room for one bucket of {self.bucket_bytes} bytes, got "
                f"{self.host_bytes}. Raise host_budget, or pass a smaller bucket."
            )
        if self.keep and self.directory is None:
            raise ValueError("Pager: keep=True needs a directory to keep the state in. Pass directory=.")
        if self.resume not in (True, False, "checkpoint"):
            raise ValueError(f"Pager: resume must be True, False or 'checkpoint', got {self.resume!r}.")
        if self.resume and not self.keep:
            raise ValueError("Pager: resume=True goes on in a directory that is kept. Pass keep=True too.")
        if self.changed_params and not self.resume:
            raise ValueError(
                "Pager: changed_params=True is a word on the parameters of a resumed run. Pass resume=True too."
            )
        if self.directory is not None:
            # Not when it is used: a program may go elsewhere until then, as those with a folder for each run do.
            object.__setattr__(self, "directory", Path(self.directory).absolute())

    def __repr__(self) -> str:
        """What differs from the defaults, with sizes in words."""
        given = {name: getattr(self, name) for name in _DEFAULTS if getattr(self, name) != _DEFAULTS[name]}
        words = {name: size_text(value) if name in _SIZES and value else value for name, value in given.items()}
        if self.directory is not None:
            words["directory"] = str(self.directory)
        return f"Pager({', '.join(f'{name}={value!r}' for name, value in words.items())})"

    @property
    def bucket_bytes(self) -> int:
        """`bucket` in bytes."""
        return as_bytes("bucket", self.bucket)

    @property
    def host_bytes(self) -> int | None:
        """`host_budget` in bytes."""
        return None if self.host_budget is None else as_bytes("host_budget", self.host_budget)

    @property
    def reserve_bytes(self) -> int:
        """`device_reserve` in bytes."""
        return as_bytes("device_reserve", self.device_reserve)

    @property
    def device_bytes(self) -> int | None:
        """`device_budget` in bytes."""
        return None if self.device_budget is None else as_bytes("device_budget", self.device_budget)


_DEFAULTS = {field.name: getattr(Pager(), field.name) for field in fields(Pager)}


def pager_of(owner: str, paged: bool | Pager | None, default: bool) -> Pager | None:
    """What the argument `paged` of an optimizer asks for; `default`: whether its class is paged by name.

    Raises:
        ValueError, TypeError: it cannot be honoured.
    """
    if isinstance(paged, Pager):
        return paged
    if paged is not None and not isinstance(paged, bool):
        raise TypeError(f"{owner}: paged must be True, False or an optim8.paging.Pager, got {paged!r}.")
    if default and paged is False:
        raise ValueError(f"{owner} is always paged, got paged=False. Use {owner.removeprefix('Paged')}.")
    return Pager() if (default if paged is None else paged) else None
