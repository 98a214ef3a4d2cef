"""What paged state costs: a step with state in a file against a resident one, from the page cache and from the disk.

From the page cache: resident, paged and paged under a budget, timed in turn in one process.

From the disk: the file's pages are dropped from the page cache before each step, and the step's time ends when all of
it is on the disk again (fsync). What the file system can do is measured by plain calls, in random turn with the steps,
on the same file, from the same state of the cache and until the same fsync: every byte is read once and written once,
in calls of 16 MiB. They do that in three ways: each chunk is read and written back through the page cache; or so, while
a thread reads ahead, and writing is begun behind; or past the page cache (O_DIRECT), four chunks at a time in threads,
with memory in huge pages. The share is of the way that is the fastest by its median. That way is also timed while one
more thread does the step's arithmetic, on state in memory: so fast is the disk when the processors have work. One step
that is not timed comes first: it goes through the page cache, for state might stay there, and so does every ninth step
or fewer after it.

With --proof, the state also has to be paged: in a process of its own, under a limit on its data (paged_proof.py).
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import paged_proof
import torch
from shared.common import add_outputs, origin, plural, provenance, table, time_interleaved
from shared.plotting import STYLES, new_figure, publish
from tqdm import tqdm  # type: ignore[import-untyped]

import optim8
from optim8 import _native
from optim8.paging import Pager, as_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIB = 2**20
CHUNK = 16 * MIB
DIRECT_THREADS = 4


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_outputs(parser, "paged")
    parser.add_argument("--parameters", type=int, default=128, help="millions of float32 parameters")
    parser.add_argument("--disk-parameters", type=int, default=384, help="the same, of the steps from the disk")
    parser.add_argument("--host-budget", default="64MiB", help="of the runs under a budget")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="where the files go")
    parser.add_argument("--repeats", type=int, default=15, help="steps of each kind from the page cache")
    parser.add_argument("--from-disk", type=int, default=15, help="steps from the disk")
    parser.add_argument("--proof", action="store_true", help="also train where resident state cannot be allocated")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.parameters = arguments.disk_parameters = 12
        arguments.repeats, arguments.from_disk = 3, 1
        arguments.host_budget = "16MiB"
    return arguments


def make(count: int, pager: Pager | None) -> Any:
    parameter = torch.nn.Parameter(torch.ones(count))
    parameter.grad = torch.full_like(parameter, 0.5)
    optimizer = optim8.AdamW8bit([parameter], paged=pager)
    optimizer.step()
    return optimizer


def page_cache(arguments: argparse.Namespace, count: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    pagers = {
        "resident": None,
        "paged": Pager(directory=arguments.directory),
        f"paged, {arguments.host_budget}": Pager(directory=arguments.directory, host_budget=arguments.host_budget),
    }
    made = {name: make(count, pager) for name, pager in pagers.items()}
    bar = tqdm(total=len(made) * (arguments.repeats + 2), desc="from the page cache", disable=None)

    def step(optimizer: Any) -> None:
        optimizer.step()
        bar.update()

    timings = time_interleaved({name: lambda o=o: step(o) for name, o in made.items()}, arguments.repeats)  # type: ignore[misc]
    bar.close()
    reference = timings["resident"]["median_ms"]
    tiers = {name: optimizer.placement().bytes_by_tier() for name, optimizer in made.items()}
    return tiers, [{"name": n, **timing, "ratio": timing["median_ms"] / reference} for n, timing in timings.items()]


def drop(path: Path) -> None:
    """Write a file back and take it out of the page cache."""
    handle = os.open(path, os.O_RDWR)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def read_all(handle: int, size: int) -> None:
    for at in range(0, size, CHUNK):
        os.preadv(handle, [bytearray(min(CHUNK, size - at))], at)


def rewrite(handle: int, at: int, size: int) -> None:
    buffer = bytearray(min(CHUNK, size - at))
    os.preadv(handle, [buffer], at)
    os.pwrite(handle, buffer, at)


def by_chunks(handle: int, size: int) -> None:
    for at in range(0, size, CHUNK):
        rewrite(handle, at, size)


def ahead_and_behind(handle: int, size: int) -> None:
    ahead = threading.Thread(target=read_all, args=(handle, size))
    ahead.start()
    for at in range(0, size, CHUNK):
        rewrite(handle, at, size)
        os.posix_fadvise(handle, at, CHUNK, os.POSIX_FADV_DONTNEED)  # Linux begins to write what is not written yet
    ahead.join()


@cache
def direct_memory() -> memoryview:
    """Memory that I/O past the page cache can use, in huge pages where the system has any, made once."""
    size = DIRECT_THREADS * CHUNK
    memory = mmap.mmap(-1, size + 2 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -whole.data_ptr() % (2 * MIB)
    whole.fill_(1)
    return memoryview(memory)[begin : begin + size]


def past_cache(handle: int, size: int) -> None:
    direct = os.open(f"/proc/self/fd/{handle}", os.O_RDWR | os.O_DIRECT)
    chunks, lock = iter(range(0, size, CHUNK)), threading.Lock()

    def work(buffer: memoryview) -> None:
        while True:
            with lock:
                at = next(chunks, None)
            if at is None:
                return
            part = buffer[: size - at]
            os.preadv(direct, [part], at)
            os.pwritev(direct, [part], at)

    begins = range(0, DIRECT_THREADS * CHUNK, CHUNK)
    threads = [threading.Thread(target=work, args=(direct_memory()[at : at + CHUNK],)) for at in begins]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(direct)


PLAIN: dict[str, Callable[[int, int], None]] = {
    "by chunks": by_chunks,
    "ahead and behind": ahead_and_behind,
    "past the page cache": past_cache,
}
BESIDE = "past the page cache, beside arithmetic"


def beside_a_step(optimizer: Any) -> Callable[[int, int], None]:
    """The fastest plain way, while a thread of its own steps `optimizer`."""

    def step() -> None:
        torch.set_num_threads(1)
        optimizer.step()

    def work(handle: int, size: int) -> None:
        threads, other = torch.get_num_threads(), threading.Thread(target=step)
        other.start()
        past_cache(handle, size)
        other.join()
        torch.set_num_threads(threads)

    optimizer.step()  # makes its state
    return work


def read_from_disk() -> int:
    """Bytes that the disk read for this process until now; 0 where the system does not tell."""
    path = Path("/proc/self/io")
    lines = path.read_text().splitlines() if path.exists() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def timed(path: Path, work: Callable[[int, int], None]) -> float:
    """Seconds from nothing in the page cache until all is on the disk."""
    drop(path)
    handle = os.open(path, os.O_RDWR)
    start = time.perf_counter()
    work(handle, path.stat().st_size)
    os.fsync(handle)
    seconds = time.perf_counter() - start
    os.close(handle)
    return seconds


def disk(arguments: argparse.Namespace, count: int) -> dict[str, Any]:
    steps, ways, came = [], [], 0
    shuffle = random.Random(0).shuffle
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        pager = Pager(directory=folder, keep=True, host_budget=arguments.host_budget)
        optimizer = make(count, pager)
        plain = {**PLAIN, BESIDE: beside_a_step(optim8.AdamW8bit(optimizer.param_groups[0]["params"]))}
        seconds: dict[str, list[float]] = {name: [] for name in plain}
        direct_memory()
        path = next(Path(folder).glob("state-*.bin"))
        size = path.stat().st_size
        timed(path, lambda *_: optimizer.step())
        order = [*plain, "step"]
        for _ in tqdm(range(arguments.from_disk), desc="from the disk", disable=None):
            shuffle(order)  # one of them may leave the disk busier than another
            for name in order:
                if name in plain:
                    seconds[name].append(timed(path, plain[name]))
                    continue
                before = read_from_disk()
                steps.append(timed(path, lambda *_: optimizer.step()))
                came += read_from_disk() - before
                ways.append(optimizer.memory._stream.way == "direct")
        optimizer.close()
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    fastest = min(PLAIN, key=medians.__getitem__)
    step = statistics.median(steps)
    return {
        "bytes": 2 * size,
        "read_from_disk": came / (size * len(steps)),
        "step_seconds": steps,
        "past_page_cache": ways,
        "plain_seconds": seconds,
        "fastest": fastest,
        "step_bandwidth": 2 * size / step,
        "plain_bandwidth": {name: 2 * size / median for name, median in medians.items()},
        "share": medians[fastest] / step,
    }


def draw(result: Mapping[str, Any]) -> Figure:
    """Left: a step from the page cache. Right: bytes per second from the disk."""
    figure, (left, right) = new_figure(columns=2)
    rows = result["page_cache"]
    steps = left.bar([row["name"] for row in rows], [row["median_ms"] for row in rows], **STYLES[2].bar())
    left.bar_label(steps, [f"{row['median_ms']:.1f} ms\n{row['ratio']:.2f} times" for row in rows], padding=3)
    left.set_ylabel("step, state in the page cache (ms)")
    of_disk = result["disk"]
    bandwidths = {**of_disk["plain_bandwidth"], "paged step": of_disk["step_bandwidth"]}
    fastest = max(of_disk["plain_bandwidth"].values())
    for name, bandwidth in bandwidths.items():
        style = STYLES[2 if name == "paged step" else 5]
        bar = right.bar([fill(name, 12)], [bandwidth / 1e6], **style.bar())
        right.bar_label(bar, [f"{bandwidth / 1e6:.0f}\n{bandwidth / fastest:.0%}"], padding=3)
    right.set_ylabel("read from the disk and written back (MB/s)")
    right.tick_params(axis="x", labelsize=11)
    for panel in (left, right):
        panel.margins(y=0.16)
        panel.grid(visible=False, axis="x")
    return figure


def render(result: Mapping[str, Any]) -> str:
    rows = []
    for row in result["page_cache"]:
        tiers = ", ".join(f"{name} {size / MIB:.1f} MiB" for name, size in result["tiers"][row["name"]].items())
        rows.append([row["name"], tiers, f"{row['median_ms']:.1f} ms", f"{row['ratio']:.2f}"])
    of_disk = result["disk"]
    bandwidths = {**of_disk["plain_bandwidth"], "paged step": of_disk["step_bandwidth"]}
    seconds = {**of_disk["plain_seconds"], "paged step": of_disk["step_seconds"]}
    of_disk_rows = [
        [
            name if name == "paged step" else f"plain calls, {name}",
            f"{statistics.median(seconds[name]) * 1e3:.0f} ms ({min(seconds[name]) * 1e3:.0f} to "
            f"{max(seconds[name]) * 1e3:.0f})",
            f"{bandwidth / 1e6:.0f} MB/s",
            f"{bandwidth / of_disk['plain_bandwidth'][of_disk['fastest']]:.2f}",
        ]
        for name, bandwidth in bandwidths.items()
    ]
    return "\n\n".join(
        [
            table(["AdamW8bit, from the page cache", "state", "step", "ratio"], rows),
            table(["from the disk", "median (range)", "read and written", "of the fastest plain"], of_disk_rows),
            f"{result['arguments']['parameters']} M float32 parameters, all gradients the same. From the disk: "
            f"{result['arguments']['disk_parameters']} M parameters; {of_disk['bytes'] / 2 / MIB:.0f} MiB are read and "
            "written back, "
            f"{plural(len(of_disk['step_seconds']), 'time')} in turn, under a budget of "
            f"{result['arguments']['host_budget']}; the disk read {of_disk['read_from_disk']:.0%} of them. "
            f"{sum(of_disk['past_page_cache'])} of the steps went past the page cache.",
            *([proof(result["proof"])] if result["proof"] else []),
            origin(result),
        ]
    )


def proof(found: Mapping[str, Any]) -> str:
    """In words, what paged_proof found."""
    mib = {name: f"{found[name] / MIB:.0f} MiB" for name in ("state", "budget", "data_limit", "peak", "may_have")}
    bits = "the bits of" if found["same_bits"] else "OTHER bits than"
    return (
        f"Where a process may allocate {mib['data_limit']} beside parameters and gradients, {mib['state']} of resident "
        f"state {found['resident']}. Paged under a budget of {mib['budget']}, {plural(found['steps'], 'step')} gave "
        f"{bits} a run without a limit. The peak of resident memory was {mib['peak']}, pages of files included; "
        f"parameters, gradients and budget are {mib['may_have']}."
    )


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    as_bytes("host_budget", arguments.host_budget)
    count = arguments.parameters * 10**6
    tiers, rows = page_cache(arguments, count)
    result = {
        **provenance({**vars(arguments), "directory": None}),
        "isa": _native.cpu().isa_info()["used"],
        "threads": torch.get_num_threads(),
        "tiers": tiers,
        "page_cache": rows,
        "disk": disk(arguments, arguments.disk_parameters * 10**6),
        "proof": paged_proof.prove(count, arguments.directory) if arguments.proof else None,
    }
    publish("paged", result, arguments, draw, render)
    return 0


if __name__ == "__main__":
    sys.exit(main())
