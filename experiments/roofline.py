"""How close each kernel comes to what the machine's memory allows.

Measures the bandwidth of a copy and of a read-modify-write in place, on 1 thread and on all; then what each kernel of
optim8 reaches of the larger of the two, all in turn in one process. Counts instructions per value where valgrind is
installed. A kernel well under the limit is held back by its instructions, one near it by the memory.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from shared.common import add_outputs, json_path, plural, provenance, table, time_interleaved, write_json
from shared.instructions import count_instructions
from shared.kernels import Kernel, kernels
from shared.plotting import STYLES, new_figure, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NEAR = 0.8  # share of the limit from which a kernel counts as bound by memory


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_outputs(parser, "roofline")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--no-instructions", action="store_true", help="do not count instructions")
    return parser.parse_args()


def memory_kernels(count: int) -> list[Kernel]:
    """The two patterns that set the limit, over float32 arrays of `count` values, far larger than any cache."""
    source, target = torch.ones(count), torch.zeros(count)
    return [
        Kernel("copy", "float32", lambda: target.copy_(source), count, 2 * source.nbytes),
        Kernel("read-modify-write", "float32", lambda: target.add_(1.0), count, 2 * target.nbytes),
    ]


def measure(count: int, threads: int, repeats: int) -> dict[str, Any]:
    """`limits` in bytes per second and a row per kernel, on `threads` threads."""
    torch.set_num_threads(threads)
    limits: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    memory = memory_kernels(count)
    for dtype in (torch.float32, torch.bfloat16):
        found = kernels(count, dtype)
        timings = time_interleaved({kernel.name: kernel.call for kernel in [*memory, *found]}, repeats)
        for kernel in memory:
            reached = kernel.traffic / (timings[kernel.name]["median_ms"] / 1e3)
            limits[kernel.name] = max(reached, limits.get(kernel.name, 0.0))
        rows += [_row(kernel, threads, timings[kernel.name]) for kernel in found]
    for row in rows:
        row["share_of_limit"] = row["bytes_per_second"] / max(limits.values())
    return {"threads": threads, "limits": limits, "kernels": rows}


def _row(kernel: Kernel, threads: int, timing: dict[str, Any]) -> dict[str, Any]:
    seconds = timing["median_ms"] / 1e3
    return {
        "kernel": kernel.name,
        "dtype": kernel.dtype,
        "threads": threads,
        "values": kernel.values,
        "bytes_per_value": kernel.traffic / kernel.values,
        **timing,
        "bytes_per_second": kernel.traffic / seconds,
        "values_per_second": kernel.values / seconds,
    }


def rows_table(measured: dict[str, Any], instructions: dict[str, dict[str, float]]) -> str:
    """One row per kernel; the instructions per value of each form that was counted stand in the last columns."""
    headers = ["kernel", "dtype", "bytes/value", "G values/s", "GB/s", "share of limit", "held back by"]
    rows = []
    for row in measured["kernels"]:
        key = f"{row['kernel']}, {row['dtype']}"
        counts = [f"{found[key]:.1f}" if key in found else "" for found in instructions.values()]
        rows.append(
            [
                row["kernel"],
                row["dtype"],
                f"{row['bytes_per_value']:.2f}",
                f"{row['values_per_second'] / 1e9:.2f}",
                f"{row['bytes_per_second'] / 1e9:.1f}",
                f"{row['share_of_limit']:.0%}",
                "memory" if row["share_of_limit"] >= NEAR else "instructions",
                *counts,
            ]
        )
    return table([*headers, *(f"instructions/value, {isa}" for isa in instructions)], rows)


def draw(result: Mapping[str, Any]) -> Figure:
    """Bars of bytes per second against the two limits, one panel per number of threads."""
    panels: Sequence[dict[str, Any]] = result["measured"]
    figure, axes = new_figure(columns=len(panels), width=8, height=7, sharey=True)
    ours, others = STYLES[2].bar(), STYLES[5].bar()
    for axis, measured in zip(axes, panels):
        for row in measured["kernels"][::-1]:
            style = ours if row["kernel"].startswith("optim8") else others
            bars = axis.barh([f"{row['kernel']}, {row['dtype']}"], [row["bytes_per_second"] / 1e9], **style)
            paper = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}  # no line crosses the number
            axis.bar_label(bars, [f"{row['share_of_limit']:.0%}"], padding=5, bbox=paper)
        for (name, limit), dashes in zip(measured["limits"].items(), ("--", "-.")):
            axis.axvline(limit / 1e9, color="black", linestyle=dashes, label=f"{name}: {limit / 1e9:.0f} GB/s")
        axis.set_xlabel("memory traffic, the least possible (GB/s)")
        axis.set_title(plural(measured["threads"], "thread"))
        axis.set_xlim(0, 1.25 * max(measured["limits"].values()) / 1e9)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)
    return figure


def main() -> int:
    arguments = parse_arguments()
    import optim8._native

    head = provenance(vars(arguments))
    count = 2**18 if arguments.quick else 2**26
    every = torch.get_num_threads()
    measured = [measure(count, threads, arguments.repeats) for threads in sorted({1, every})]
    instructions = {} if arguments.no_instructions or arguments.quick else count_instructions()
    isa = optim8._native.cpu().isa_info()["used"]
    result = {**head, "isa": isa, "measured": measured, "instructions_per_value": instructions}
    for part in measured:
        limits = ", ".join(f"{name} {limit / 1e9:.1f} GB/s" for name, limit in part["limits"].items())
        print(f"\n{plural(part['threads'], 'thread')}: {limits}\n")
        print(rows_table(part, instructions))
    if not instructions:
        print("\nInstructions were not counted (asked not to, or valgrind is not installed).")
    path = json_path(arguments, "roofline")
    write_json(path, result)
    save(draw(result), arguments.png)
    print(f"\noptim8 used {isa}. Written: {path}, {arguments.png}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
