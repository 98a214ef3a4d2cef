"""What does it cost to watch: the memory profiler in every step, and the monitor of quantized state at every 100th.

In every round one step runs alone and one with each tool, in a random order; the cost of a tool is the median of what
its step takes more than the round's step alone. So a machine whose speed drifts is compared with itself. The profiler's
also has its part in a block of 20 steps of what beginning and ending the block takes, with all that is worked out at
the end; the monitor's, with its log written by TensorBoard, is that of one look, spread over the steps between two
looks. Intervals are of 95 %, by the bootstrap: rounds and blocks are drawn again, with replacement.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, RUNS, origin, provenance, spread, table, write_json
from lm.model import GPT, Shape
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm  # type: ignore[import-untyped]

import optim8

LIMITS = {"memory.profile": 0.03, "monitor": 0.01}  # of the time of training
SOURCES = ("allocations", "rss")
EVERY = 100
STEPS_OF_A_BLOCK = 20
RESAMPLES = 4000

Result = Mapping[str, Any]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batches", default="8,2", help="sequences of a step, one training for each")
    parser.add_argument("--seconds", type=float, default=50, help="for the rounds of each training")
    parser.add_argument("--blocks", type=int, default=3, help="profiled blocks, for what begins and ends them")
    parser.add_argument("--quick", action="store_true", help="in small: shows that it runs, its figures say nothing")
    parser.add_argument("--json", type=Path, help="by default in experiments/results, or runs if --quick")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.layers, arguments.width, arguments.context, arguments.batches = 1, 64, 32, "2"
        arguments.seconds, arguments.blocks = 0.5, 1
    return arguments


class Training:
    """A GPT with AdamW8bit on random bytes."""

    def __init__(self, layers: int, width: int, context: int, batch: int) -> None:
        torch.manual_seed(0)
        self.model = GPT(Shape(layers, 4, width, context))
        self.optimizer = optim8.AdamW8bit(self.model.named_parameters(), lr=1e-3)
        self.size = (batch, context)

    def run(self, steps: int = 1) -> None:
        for _ in range(steps):
            tokens = torch.randint(0, 256, self.size)
            self.model.loss(tokens, tokens.roll(1, 1)).backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.optimizer.zero_grad()


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def block(training: Training, source: str, steps: int) -> tuple[float, float]:
    """Seconds of the steps in a profiled block, and those of beginning and ending it."""
    prof = optim8.memory.profile(training.model, training.optimizer, source=source)
    ends = seconds(prof.__enter__)
    taken = seconds(lambda: training.run(steps))
    return taken, ends + seconds(lambda: prof.__exit__(None, None, None))


def watched(training: Training, writer: SummaryWriter, looked: dict[str, Any]) -> float:
    """Seconds of a step that the monitor looks at; what it saw to `looked`."""
    with optim8.monitor(training.optimizer, writer, every=1) as watch:
        taken = seconds(training.run)
    looked.update(watch.latest)
    return taken


def rounds(kinds: Mapping[str, Callable[[], float]], limit: float, label: str) -> dict[str, list[float]]:
    """Seconds of each kind's steps, as many as there is time for, at least 3."""
    found: dict[str, list[float]] = {name: [] for name in kinds}
    order = list(kinds)
    generator = random.Random(0)
    begin = time.perf_counter()
    with tqdm(total=round(limit), desc=label, unit="s") as bar:
        while (passed := time.perf_counter() - begin) < limit or len(found[order[0]]) < 3:
            generator.shuffle(order)
            for name in order:
                found[name].append(kinds[name]())
            bar.update(min(round(passed), bar.total) - bar.n)
    return found


def interval(taken: Sequence[float], alone: Sequence[float], ends: Sequence[float], share: float) -> dict[str, float]:
    """What a tool costs, over the time of a step alone, and the bounds of the 95 % interval.

    Args:
        taken, alone: seconds of a step with the tool, and of one without, round by round.
        ends: seconds of beginning and ending a block; empty for a tool that has none.
        share: the part of the steps that the tool looks at.
    """
    generator = np.random.default_rng(0)
    extra, base, around = np.divide(taken, alone) - 1, np.asarray(alone), np.asarray(ends or [0.0])

    def cost(of_rounds: Any, of_blocks: Any) -> Any:
        ratio = share * np.median(extra[of_rounds], axis=-1)
        return ratio + np.median(around[of_blocks], axis=-1) / (STEPS_OF_A_BLOCK * np.median(base[of_rounds], axis=-1))

    drawn = cost(
        generator.integers(len(extra), size=(RESAMPLES, len(extra))),
        generator.integers(len(around), size=(RESAMPLES, len(around))),
    )
    lower, upper = np.quantile(drawn, [0.025, 0.975])
    return {"cost": float(cost(slice(None), slice(None))), "lower": float(lower), "upper": float(upper)}


def measure(training: Training, limit: float, blocks: int, writer: SummaryWriter) -> dict[str, Any]:
    looked: dict[str, Any] = {}
    kinds: dict[str, Callable[[], float]] = {
        "alone": lambda: seconds(training.run),
        **{source: lambda source=source: block(training, source, 1)[0] for source in SOURCES},  # type: ignore[misc]
        "monitor": lambda: watched(training, writer, looked),
    }
    for call in kinds.values():  # what is done only once, such as making the state, is not counted
        call()
    gc.collect()
    gc.disable()
    try:
        taken = rounds(kinds, limit, f"{training.size[0]} sequences")
        ends = {source: [block(training, source, STEPS_OF_A_BLOCK)[1] for _ in range(blocks)] for source in SOURCES}
    finally:
        gc.enable()
    alone = taken["alone"]
    costs = {f"memory.profile ({source})": interval(taken[source], alone, ends[source], 1) for source in SOURCES}
    costs[f"monitor (every={EVERY})"] = interval(taken["monitor"], alone, [], 1 / EVERY)
    moments = [moment for health in looked.values() for moment in health.moments.items()]
    return {
        "tokens": training.size[0] * training.size[1],
        "step": {name: spread(values) for name, values in taken.items()},
        "begin_and_end_of_block": {name: spread(values) for name, values in ends.items()},
        "costs": costs,
        "largest_error": {name: max(of.error for key, of in moments if key == name) for name, _ in moments},
    }


def rendered(result: Result) -> str:
    rows = []
    for training in result["trainings"]:
        alone = training["step"]["alone"]
        for name, found in training["costs"].items():
            limit = result["limits"][name.partition(" ")[0]]
            ends = training["begin_and_end_of_block"].get(name.partition("(")[2].rstrip(")"))
            rows.append(
                [
                    name,
                    f"{training['tokens']} tokens, {alone['median_ms']:.0f} ms",
                    f"{found['cost']:+.2%}",
                    f"{found['lower']:+.2%} to {found['upper']:+.2%}",
                    "-" if ends is None else f"{ends['median_ms']:.1f} ms",
                    f"{limit:.0%}: {'ok' if found['upper'] < limit else 'MISSED'}",
                ]
            )
    headers = ["tool", "step alone", "cost", "95% interval", "begin and end", "limit, on the interval"]
    repeats = " and ".join(str(training["step"]["alone"]["repeats"]) for training in result["trainings"])
    return "\n\n".join(
        [
            table(headers, rows),
            f"GPT of {result['parameters'] / 1e6:.1f} M parameters with AdamW8bit, {result['threads']} threads; "
            f"{repeats} rounds. The profiler's cost has a {STEPS_OF_A_BLOCK}th of what a block of {STEPS_OF_A_BLOCK} "
            "steps takes to begin and end.",
            origin(result),
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    head = provenance(vars(arguments))
    warnings.filterwarnings("ignore", message="optim8.monitor")
    trainings = []
    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        for batch in map(int, arguments.batches.split(",")):
            training = Training(arguments.layers, arguments.width, arguments.context, batch)
            trainings.append(measure(training, arguments.seconds, arguments.blocks, writer))
    result = {
        **head,
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "threads": torch.get_num_threads(),
        "trainings": trainings,
        "limits": LIMITS,
    }
    path = arguments.json or (
        RUNS / "bench_monitoring-quick.json" if arguments.quick else RESULTS / "bench_monitoring.json"
    )
    write_json(path, result)
    print(f"{rendered(result)}\n\nWritten: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
