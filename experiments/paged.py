"""What paged state costs: a step with state in a file against a resident one, from the page cache and from the disk.

From the page cache: resident, paged and paged under a budget, timed in turn in one process. From the disk: the file's
pages are dropped before each step and written back behind it; the same bytes read and written by plain calls are the
file system's sequential bandwidth.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from common import add_outputs, origin, provenance, table, time_interleaved
from plotting import new_figure, publish
from tqdm import tqdm  # type: ignore[import-untyped]

import optim8
from optim8 import _native
from optim8.paging import Pager, as_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIB = 2**20
CHUNK = 16 * MIB


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_outputs(parser, "paged")
    parser.add_argument("--parameters", type=int, default=128, help="millions of float32 parameters")
    parser.add_argument("--host-budget", default="64MiB", help="of the runs under a budget")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="where the files go")
    parser.add_argument("--repeats", type=int, default=15, help="steps of each kind from the page cache")
    parser.add_argument("--from-disk", type=int, default=3, help="steps from the disk")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.parameters, arguments.repeats, arguments.from_disk = 12, 3, 1
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


def sequential(path: Path) -> float:
    """Seconds to read a file and write it back by plain calls, nothing of it in the page cache."""
    size, buffer = path.stat().st_size, bytearray(CHUNK)
    drop(path)
    handle = os.open(path, os.O_RDWR)
    start = time.perf_counter()
    for at in range(0, size, CHUNK):
        read = os.preadv(handle, [buffer], at)
        os.pwritev(handle, [memoryview(buffer)[:read]], at)
    os.fsync(handle)
    seconds = time.perf_counter() - start
    os.close(handle)
    return seconds


def disk(arguments: argparse.Namespace, count: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        pager = Pager(directory=folder, keep=True, host_budget=arguments.host_budget)
        optimizer = make(count, pager)
        path = next(Path(folder).glob("state-*.bin"))
        steps, plain = [], []
        for _ in tqdm(range(arguments.from_disk), desc="from the disk", disable=None):
            plain.append(sequential(path))
            drop(path)
            start = time.perf_counter()
            optimizer.step()
            with path.open("rb") as file:
                os.fsync(file.fileno())
            steps.append(time.perf_counter() - start)
        optimizer.close()
        moved = 2 * path.stat().st_size
    step, best = sorted(steps)[len(steps) // 2], sorted(plain)[len(plain) // 2]
    return {
        "bytes": moved,
        "step_seconds": steps,
        "sequential_seconds": plain,
        "step_bandwidth": moved / step,
        "sequential_bandwidth": moved / best,
        "share": best / step,
    }


def draw(result: Mapping[str, Any]) -> Figure:
    """Left: a step from the page cache. Right: bytes per second from the disk."""
    figure, (left, right) = new_figure(columns=2)
    left.bar([row["name"] for row in result["page_cache"]], [row["median_ms"] for row in result["page_cache"]])
    left.set_ylabel("step (ms)")
    of_disk = result["disk"]
    right.bar(
        ["plain calls", "paged step"],
        [of_disk["sequential_bandwidth"] / 1e6, of_disk["step_bandwidth"] / 1e6],
    )
    right.set_ylabel("read and written back (MB/s)")
    return figure


def rendered(result: Mapping[str, Any]) -> str:
    rows = []
    for row in result["page_cache"]:
        tiers = ", ".join(f"{name} {size / MIB:.1f} MiB" for name, size in result["tiers"][row["name"]].items())
        rows.append([row["name"], tiers, f"{row['median_ms']:.1f} ms", f"{row['ratio']:.2f}"])
    of_disk = result["disk"]
    return "\n\n".join(
        [
            table(["AdamW8bit", "state", "step", "ratio"], rows),
            f"{result['arguments']['parameters']} M float32 parameters. From the disk, read and written back: "
            f"{of_disk['step_bandwidth'] / 1e6:.0f} MB/s in a step, {of_disk['sequential_bandwidth'] / 1e6:.0f} MB/s "
            f"by plain calls ({of_disk['share']:.0%}).",
            origin(result),
        ]
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
        "disk": disk(arguments, count),
    }
    publish("paged", result, arguments, draw, rendered)
    return 0


if __name__ == "__main__":
    sys.exit(main())
