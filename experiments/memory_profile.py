"""How much memory training takes, against the size of the model: torch's AdamW, optim8 resident and paged, the peers.

Each point is a GPT that takes a few steps in a process of its own, on very few tokens, so that parameters, gradients
and state make up the memory and activations little. Before it, a tiny model is stepped, so that libraries are loaded
and compiled code is there; then the largest resident set is reset, and what it grows by from there is the point's peak.
It counts pages of mapped files too. The bytes of state are the sum over its tensors, by tier where it is paged.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lm import memory
from lm.model import GPT, Shape
from shared.common import RUNS, add_outputs, not_measured, origin, provenance, table
from shared.plotting import STYLES, new_figure, publish
from shared.subjects import Make, missing_peers, peer, peer_versions, state_bytes, with_version
from tqdm import tqdm  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIB = 2**20
HOST_BUDGET = "20MiB"  # of the paged state; a bucket has 16
PAGED = "optim8 AdamW8bit, paged"
SUBJECTS = ("torch AdamW", "optim8 AdamW8bit", PAGED, "bitsandbytes AdamW8bit", "torchao AdamW8bit")
SIZES = ((4, 256), (4, 512), (4, 1024), (8, 1024))  # layers, width
QUICK = ((1, 1024),)
CONTEXT = 64

Result = Mapping[str, Any]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_outputs(parser, "memory_profile")
    parser.add_argument("--steps", type=int, default=2, help="training steps; state is made in the first")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-peers", action="store_true", help="leave bitsandbytes and torchao out")
    parser.add_argument("--one", nargs=3, metavar=("SUBJECT", "LAYERS", "WIDTH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.steps < 1:
        parser.error(f"--steps: must be at least 1, got {arguments.steps}")
    return arguments


def maker(subject: str, folder: str) -> Make:
    """How to make an optimizer; paged state goes to a file in `folder`. Imports nothing of the other subjects."""
    if subject == "torch AdamW":
        return functools.partial(torch.optim.AdamW, fused=True)
    if not subject.startswith("optim8 "):
        return peer(subject.split()[0])
    import optim8
    from optim8.paging import Pager

    pager = Pager(directory=folder, host_budget=HOST_BUDGET) if subject == PAGED else None
    return functools.partial(optim8.AdamW8bit, paged=pager)


def reset_peak() -> None:
    """Makes the kernel forget the largest resident set so far (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def measure_one(make: Make, layers: int, width: int, steps: int) -> dict[str, Any]:
    """In the process of one point: bytes by kind, and what the resident set grew by at most."""
    device = torch.device("cpu")
    warm = torch.nn.Parameter(torch.zeros(64, 64))
    warm.grad = torch.ones_like(warm)
    make([warm]).step()
    tokens = torch.randint(256, (1, CONTEXT + 1), generator=torch.Generator().manual_seed(0))
    GPT(Shape(1, 1, 64, CONTEXT)).loss(tokens[:, :-1], tokens[:, 1:]).backward()  # type: ignore[no-untyped-call]
    del warm
    gc.collect()
    reset_peak()
    before = memory.current(device)
    torch.manual_seed(0)
    model = GPT(Shape(layers, 4, width, CONTEXT))
    parameters = list(model.parameters())
    optimizer = make(parameters)
    for _ in range(steps):
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    placement = getattr(optimizer, "placement", None)
    return {
        "parameters": sum(p.numel() for p in parameters),
        "parameter_bytes": sum(p.nbytes for p in parameters),
        "gradient_bytes": sum(p.grad.nbytes for p in parameters if p.grad is not None),
        "state_bytes": state_bytes(optimizer),
        "state_on_disk_bytes": placement().bytes_by_tier().get("disk", 0) if placement else 0,
        "before_bytes": before,
        "peak_growth_bytes": memory.peak(device) - before,
    }


def one(arguments: argparse.Namespace) -> int:
    """The process of one point: prints its figures as the last line."""
    subject, layers, width = arguments.one[0], int(arguments.one[1]), int(arguments.one[2])
    torch.set_num_threads(arguments.threads)
    RUNS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=RUNS) as folder:  # on a disk, where /tmp may be memory
        found = measure_one(maker(subject, folder), layers, width, arguments.steps)
    print(json.dumps(found))
    return 0


def in_own_process(arguments: argparse.Namespace, subject: str, layers: int, width: int) -> dict[str, Any] | str:
    """The figures of a point, or why there are none."""
    options = [f"--steps={arguments.steps}", f"--threads={arguments.threads}"]
    command = [sys.executable, __file__, *options, "--one", subject, str(layers), str(width)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    return done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit status {done.returncode}"


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    peers = {} if arguments.no_peers else peer_versions()
    subjects = [name for name in SUBJECTS if name.startswith(("torch ", "optim8 ")) or name.split()[0] in peers]
    points = [(name, *size) for size in (QUICK if arguments.quick else SIZES) for name in subjects]
    rows: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for subject, layers, width in tqdm(points, desc="memory", unit="process"):
        if subject in failed:
            continue
        found = in_own_process(arguments, subject, layers, width)
        if isinstance(found, str):
            if subject.startswith(("torch ", "optim8 ")):
                raise RuntimeError(f"memory_profile: {subject}, {layers} layers of {width}: {found}")
            failed[subject] = found  # a peer that fails is a finding
        else:
            rows.append({"subject": subject, "layers": layers, "width": width, **found})
    return {
        "peers": peers,
        "not_measured": {**missing_peers(asked=not arguments.no_peers), **failed},
        "host_budget": HOST_BUDGET,
        "rows": rows,
    }


def by_subject(result: Result) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of every subject that was measured, by size of the model."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(result["rows"], key=lambda row: int(row["parameters"])):
        found.setdefault(row["subject"], []).append(row)
    return found


def cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "not measured"
    state = f"{row['state_bytes'] / MIB:.1f}"
    if row["state_on_disk_bytes"]:
        state += f", {row['state_on_disk_bytes'] / MIB:.1f} of it in a file"
    return f"{row['peak_growth_bytes'] / MIB:.0f} ({state})"


def render(result: Result) -> str:
    found = by_subject(result)
    sizes = sorted({row["parameters"] for row in result["rows"]})
    rows = []
    for size in sizes:
        at = {name: row for name, points in found.items() for row in points if row["parameters"] == size}
        rows.append([f"{size / 1e6:.1f} M", *(cell(at.get(name)) for name in SUBJECTS)])
    headers = ["parameters", *(with_version(name, result["peers"]) for name in SUBJECTS)]
    return "\n\n".join(
        [
            table(headers, rows),
            f"Growth of the largest resident set in MiB, from before the model was made to after "
            f"{result['arguments']['steps']} steps on {CONTEXT} bytes of text; in brackets the optimizer state. A "
            f"process of its own for each; float32. Paged: at most {result['host_budget']} of state in memory. "
            f"{not_measured(result)}".rstrip(),
            origin(result),
        ]
    )


def draw(result: Result) -> Figure:
    """Left: peak memory against the number of parameters. Right: state in memory, per parameter."""
    figure, (left, right) = new_figure(columns=2)
    found = by_subject(result)
    for style, name in zip(STYLES, SUBJECTS):
        rows = found.get(name, [])
        label = with_version(name, result["peers"]) + ("" if rows else ": not measured")
        millions = [row["parameters"] / 1e6 for row in rows]
        left.plot(millions, [row["peak_growth_bytes"] / MIB for row in rows], label=label, **style.line())
        state = [(row["state_bytes"] - row["state_on_disk_bytes"]) / row["parameters"] for row in rows]
        # Those that keep as much lie on each other: the later ones are smaller, so that all can be seen.
        right.plot(millions, state, label=label, **style.line(markersize=16 - 2.5 * SUBJECTS.index(name)))
    left.set_ylabel("peak memory of training (MiB)")
    right.set_ylabel("optimizer state in memory (bytes per parameter)")
    right.set_ylim(bottom=0)
    for panel in (left, right):
        panel.set_xlabel("parameters (millions)")
    left.set_ylim(bottom=0)
    left.legend()
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.one:
        return one(arguments)
    if not Path("/proc/self/clear_refs").exists():
        print("memory_profile: resident memory is measured by Linux' /proc/self/clear_refs, not found", file=sys.stderr)
        return 2
    result = {**provenance(vars(arguments)), **measure(arguments)}
    publish("memory_profile", result, arguments, draw, render)
    return 0


if __name__ == "__main__":
    sys.exit(main())
