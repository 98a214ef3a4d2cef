"""Trains with state that does not fit, in a process of its own whose data is limited: python paging_worker.py JSON.

Prints one JSON object: a digest of parameters and state, and for each phase the most memory that was its own, over what
the process had before the parameters.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import hashlib
import json
import mmap
import os
import pickle
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.harness import bits, parameter

import optim8
from optim8 import _native
from optim8.paging import Pager, tiers
from optim8.paging.streaming import Stream
from optim8.state import mapped

MIB = 2**20
COUNT, SIZE = 8, MIB  # bfloat16 parameters of 2 MiB, with 8 MiB of 32-bit AdamW state or 2 MiB of 8-bit state each


def memory(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def own_memory() -> int:
    """Bytes in memory that are anonymous, or pages of files of state. Those of libraries are left out: the kernel drops
    them and reads them back as it likes."""
    pages = 0
    with Path("/proc/self/pagemap").open("rb", buffering=0) as map_:  # 8 bytes for each page, the highest bit: present
        for segment in list(mapped._limited):
            first, end = (address // tiers.PAGE for address in segment.span)
            entries = np.frombuffer(os.pread(map_.fileno(), 8 * (end - first), 8 * first), np.uint64)
            pages += int((entries >> np.uint64(63)).sum())
    return memory("RssAnon") + tiers.PAGE * pages


class Phases:
    """The most memory in each phase. Pages of files are counted each time before they are let go of; for what is
    allocated and freed in between there is a limit, beyond which it fails."""

    def __init__(self, may_have: dict[str, int]) -> None:
        self.may_have = may_have
        self.before = own_memory()
        self.peaks: dict[str, int] = {}
        self.most = 0
        native = _native.cpu()
        release = native.release_pages

        def release_pages(spans: list[tuple[int, int]]) -> None:
            if spans:
                self.look()
            release(spans)

        native.release_pages = release_pages

    def look(self) -> None:
        self.most = max(self.most, own_memory() - self.before)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.most = 0
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if name in self.may_have:
            left = self.may_have[name] - (memory("RssAnon") - self.before)
            resource.setrlimit(resource.RLIMIT_DATA, (min(hard, memory("VmData") + left), hard))
        yield
        self.look()
        self.peaks[name] = self.most
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def make(params: list[torch.nn.Parameter], paged: Any) -> Any:
    few = len(params) // 4
    groups = [{"params": params[:few], "optim_bits": 8}, {"params": params[few:], "optim_bits": 32}]
    return optim8.AdamW8bit(groups, lr=0.01, paged=paged)


def drop(optimizer: Any) -> None:
    """Write the files of an optimizer's state back, and take them out of the page cache."""
    for segment in optimizer.memory.segments:
        if segment.handle is not None:
            os.fsync(segment.handle)
            os.posix_fadvise(segment.handle, 0, 0, os.POSIX_FADV_DONTNEED)


def train(params: list[torch.nn.Parameter], optimizer: Any, first: int, last: int, cold: bool = False) -> None:
    for t in range(first, last):
        if cold:
            drop(optimizer)
        for i, p in enumerate(params):
            assert p.grad is not None
            p.grad.uniform_(-1, 1, generator=torch.Generator().manual_seed(100 * t + i))  # without a temporary
        optimizer.step()


def digest(params: list[torch.nn.Parameter], optimizer: Any) -> str:
    found = hashlib.sha256()
    for p in params:
        found.update(bits(p))
        for name, value in sorted(optimizer.state[p].items()):
            found.update(name.encode() + bits(value))
    return found.hexdigest()


def new_params() -> list[torch.nn.Parameter]:
    params = []
    for i in range(COUNT):
        p = parameter(torch.full((SIZE,), 0.5 + i / 8, dtype=torch.bfloat16))
        p.grad = torch.zeros_like(p)
        params.append(p)
    return params


def main() -> None:
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(2)
    warm = [parameter(torch.ones(300_000, dtype=torch.bfloat16), torch.ones(300_000, dtype=torch.bfloat16))]
    for paged in (None, Pager(host_budget="64KiB", bucket="64KiB")):
        optimizer = make(warm, paged)
        train(warm, optimizer, 0, 2)
        copy.deepcopy(optimizer)
        digest(warm, optimizer)
    if asked.get("cold"):
        Stream._goes_past_cache = lambda self, share: share < 1  # type: ignore[method-assign]
    phases = Phases(asked.get("may_have", {}))
    params = new_params()
    if not asked["paged"]:
        optimizer = make(params, None)
        digests = []
        for first in (0, 4):
            train(params, optimizer, first, 4 + first // 2)
            digests.append(digest(params, optimizer))
        print(json.dumps({"digests": digests}))
        return
    room = memory("VmData") + asked["room"]
    resource.setrlimit(resource.RLIMIT_DATA, (room, room))
    try:
        make(params, None).step()
        resident = "fits"
    except (RuntimeError, MemoryError):
        resident = "fails to allocate"
    folder = Path(asked["folder"])
    pager = Pager(directory=folder, host_budget=asked["budget"], bucket=asked["bucket"])
    with phases.phase("training"):
        optimizer = make(params, pager)
        train(params, optimizer, 0, 2, asked["cold"])
    ways = [optimizer.memory._stream.way]
    with phases.phase("deepcopy"):
        twin = copy.deepcopy(optimizer, {id(p): p for p in params})
    del twin
    torch.save(optimizer.state_dict(), folder / "state.pt")
    del optimizer
    gc.collect()  # an optimizer is part of a cycle
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        saved = torch.load(folder / "state.pt", mmap=True)
    loaded = make(params, pager)
    loaded.load_state_dict(saved)
    del saved
    gc.collect()
    with phases.phase("training after loading"):
        train(params, loaded, 2, 4, asked["cold"])
    ways.append(loaded.memory._stream.way)
    digests = [digest(params, loaded)]
    mapped.release([value for entry in loaded.state.values() for value in entry.values()])
    with phases.phase("pickle"), (folder / "optimizer.pickle").open("wb") as file:
        pickle.dump(loaded, file)
    del loaded
    gc.collect()  # what it has for steps past the page cache counts as data too
    with phases.phase("unpickling"), (folder / "optimizer.pickle").open("rb") as file:
        back = pickle.load(file)
    params = [p for group in back.param_groups for p in group["params"]]
    for p in params:
        p.grad = torch.zeros_like(p)
    train(params, back, 4, 6, asked["cold"])  # in the mapping: the copies of pickle have taken what buffers need
    digests.append(digest(params, back))
    tiers = back.placement().bytes_by_tier()
    print(json.dumps({"digests": digests, "resident": resident, "peaks": phases.peaks, "tiers": tiers, "ways": ways}))


if __name__ == "__main__":
    main()
