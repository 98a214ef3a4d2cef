"""Where optimizer state may live: the options that a user sets."""

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
    Optimizers that are given one Pager share its budgets and its directory; `keep` is for one optimizer.

    Args:
        device_budget: bytes of state on a CUDA device, a number or a text such as "2GiB". None: what is free when
            the optimizer allocates state, less `device_reserve`.
        host_budget: bytes of host memory. None: for CUDA parameters no limit; for parameters on the CPU all state is
            in the file, and the system's page cache holds as much of it as it can. A limit includes the buckets of a
            running step: the step copies them from the file and back, and leaves nothing of the file mapped.
        directory: folder of the file; a relative one starts from the present working directory. None: the directory of
            temporary files (TMPDIR), which some systems have in memory. It must exist, except with `keep`.
        keep: keep the state after the process ends. All of it is then in `directory`, which is a checkpoint by itself.
            One optimizer at a time owns the directory, and its parameters are on the CPU.
        resume: continue with the state that an earlier optimizer left in `directory`; needs `keep`. True: the state of
            the last step or of the last noted checkpoint (note_checkpoint), whichever belongs to the parameters; the
            checkpoint's where the state of the last step cannot be used. "checkpoint": always the checkpoint's.
        bucket: bytes of the budget that are reserved for streaming. A step over the file uses what the budget leaves,
            at most four times `bucket`, and moves state in pieces of at most half of it.
        device_reserve: bytes to leave free on a CUDA device where `device_budget` is None.
        changed_params: accept parameters other than those that the last step in `directory` left; needs `resume`.
            Otherwise the first step refuses them, where the directory has fingerprints of the right ones.
        checkpoint_copy: note_checkpoint copies the state, so that a run that is killed later can return to the
            checkpoint. The copy takes as much room on the disk as the state. False: such a run starts anew from its
            checkpoint.

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
            # Now and not at the first use: the program may change its working directory in between.
            object.__setattr__(self, "directory", Path(self.directory).absolute())

    def __repr__(self) -> str:
        """The options that differ from the defaults, with sizes as text."""
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


_WITHOUT_BUDGETS = Pager()  # one for all: what optimizers share of it is the memory of a running step
_DEFAULTS = {field.name: getattr(Pager(), field.name) for field in fields(Pager)}


def pager_of(owner: str, paged: bool | Pager | None, default: bool) -> Pager | None:
    """The Pager that the argument `paged` of an optimizer stands for; `default`: whether its class is paged by name.

    Raises:
        ValueError, TypeError: it cannot be honoured.
    """
    if isinstance(paged, Pager):
        return paged
    if paged is not None and not isinstance(paged, bool):
        raise TypeError(f"{owner}: paged must be True, False or an optim8.paging.Pager, got {paged!r}.")
    if default and paged is False:
        raise ValueError(f"{owner} is always paged, got paged=False. Use {owner.removeprefix('Paged')}.")
    return _WITHOUT_BUDGETS if (default if paged is None else paged) else None
