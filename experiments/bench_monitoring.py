"""What does it cost to watch: the memory profiler in every step, and the monitor of quantized state at every 100th.

A tool's work depends on the model's tensors and not on the number of tokens, and a step's time varies by more than it.
So what a tool adds to a step is taken where the step is short: CPU time on one thread, of single steps alone and with
each tool, in turn and in a random order; the median of the differences within a round. What the profiler does when a
block of 20 steps begins and ends is timed by itself, in the training that it watches, and a 20th of it counts. The sum
is compared with the steps of two trainings on all threads. The monitor's is that of one look, with its log written by
TensorBoard, spread over 100 steps. Intervals are of 95 %, by the bootstrap: what was measured is drawn again, with
replacement.
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
from typing import Any

import numpy as np
import torch
from lm.model import GPT, Shape
from shared.common import add_json, json_path, origin, plural, provenance, spread, table, write_json
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
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 2], help="sequences of a step: a training each")
    parser.add_argument("--short", type=int, default=128, help="tokens of the short step")
    parser.add_argument("--seconds", type=float, default=50, help="for the short steps")
    parser.add_argument("--steps", type=int, default=60, help="steps alone of each training")
    parser.add_argument("--blocks", type=int, default=3, help="profiled blocks of each training")
    parser.add_argument("--quick", action="store_true", help="in small: shows that it runs, its figures say nothing")
    add_json(parser, "bench_monitoring")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.layers, arguments.width, arguments.context, arguments.batches = 1, 64, 32, [2]
        arguments.short, arguments.seconds, arguments.steps, arguments.blocks = 32, 0.5, 3, 1
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


def seconds(call: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    call()
    return clock() - start


def profiled(training: Training, source: str) -> float:
    """CPU seconds of a step in a profiled block, without those of beginning and ending the block."""
    with optim8.memory.profile(training.model, training.optimizer, source=source):
        return seconds(training.run, time.process_time)


def watched(training: Training, writer: SummaryWriter, looked: dict[str, Any]) -> float:
    """CPU seconds of a step that the monitor looks at; what it saw to `looked`."""
    with optim8.monitor(training.optimizer, writer, every=1) as watch:
        taken = seconds(training.run, time.process_time)
    looked.update(watch.latest)
    return taken


def differences(training: Training, limit: float, writer: SummaryWriter, looked: dict[str, Any]) -> dict[str, Any]:
    """CPU seconds of short steps, round by round: alone, and what each tool adds in the same round. As many rounds as
    there is time for, at least 3."""
    kinds: dict[str, Callable[[], float]] = {
        "alone": lambda: seconds(training.run, time.process_time),
        **{source: lambda source=source: profiled(training, source) for source in SOURCES},  # type: ignore[misc]
        "monitor": lambda: watched(training, writer, looked),
    }
    for call in kinds.values():  # what is done only once, such as making the state, is not counted
        call()
    found: dict[str, list[float]] = {name: [] for name in kinds}
    order = list(kinds)
    generator = random.Random(0)
    begin = time.perf_counter()
    with tqdm(total=round(limit), desc="short steps", unit="s") as bar:
        while (passed := time.perf_counter() - begin) < limit or len(found["alone"]) < 3:
            generator.shuffle(order)
            taken = {name: kinds[name]() for name in order}
            for name, value in taken.items():
                found[name].append(value if name == "alone" else value - taken["alone"])
            bar.update(min(round(passed), bar.total) - bar.n)
    return found


def long_steps(training: Training, steps: int, blocks: int) -> tuple[list[float], dict[str, list[float]]]:
    """Seconds of steps alone, and by source those of beginning and ending a profiled block of steps."""
    training.run(2)
    alone, ends = [], {source: [0.0] * blocks for source in SOURCES}
    with tqdm(total=blocks * len(SOURCES), desc=f"{training.size[0]} sequences", unit="block") as bar:
        for i in range(blocks):
            alone += [seconds(training.run) for _ in range(-(-steps // blocks))]
            for source in SOURCES:
                prof = optim8.memory.profile(training.model, training.optimizer, source=source)
                ends[source][i] = seconds(prof.__enter__)
                training.run(STEPS_OF_A_BLOCK)
                ends[source][i] += seconds(lambda prof=prof: prof.__exit__(None, None, None))  # type: ignore[misc]
                bar.update()
    return alone, ends


def interval(added: Sequence[float], alone: Sequence[float], ends: Sequence[float], share: float) -> dict[str, float]:
    """What a tool costs, in milliseconds and over the time of a step alone, and the bounds of the 95 % interval.

    Args:
        added: seconds that the tool adds to a step.
        alone: seconds of a step.
        ends: seconds of beginning and ending a block; none for a tool that has no blocks.
        share: the part of the steps that the tool looks at.
    """
    generator = np.random.default_rng(0)

    def medians(values: Sequence[float]) -> Any:
        drawn = generator.integers(len(values), size=(RESAMPLES, len(values)))
        return np.array([np.median(values), *np.median(np.asarray(values)[drawn], axis=1)])

    work = share * medians(added) + medians(ends or [0.0]) / STEPS_OF_A_BLOCK
    costs = work / medians(alone)
    lower, upper = np.quantile(costs[1:], [0.025, 0.975])
    return {"ms": 1e3 * float(work[0]), "cost": float(costs[0]), "lower": float(lower), "upper": float(upper)}


def measure(arguments: argparse.Namespace, writer: SummaryWriter) -> dict[str, Any]:
    looked: dict[str, Any] = {}
    threads, shape = torch.get_num_threads(), (arguments.layers, arguments.width)
    gc.collect()
    gc.disable()
    try:
        torch.set_num_threads(1)
        short = differences(Training(*shape, arguments.short, 1), arguments.seconds, writer, looked)
        torch.set_num_threads(threads)
        trainings = []
        for batch in arguments.batches:
            training = Training(*shape, arguments.context, batch)
            alone, ends = long_steps(training, arguments.steps, arguments.blocks)
            costs = {f"memory.profile ({key})": interval(short[key], alone, ends[key], 1) for key in SOURCES}
            costs[f"monitor (every={EVERY})"] = interval(short["monitor"], alone, [], 1 / EVERY)
            found = {"step": spread(alone), "begin_and_end_of_block": {key: spread(ends[key]) for key in SOURCES}}
            trainings.append({"tokens": batch * arguments.context, **found, "costs": costs})
    finally:
        gc.enable()
    moments = [moment for health in looked.values() for moment in health.moments.items()]
    return {
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "threads": threads,
        "short_step": {name: spread(values) for name, values in short.items()},
        "trainings": trainings,
        "limits": LIMITS,
        "largest_error": {name: max(of.error for key, of in moments if key == name) for name, _ in moments},
    }


def render(result: Result) -> str:
    rows = []
    for training in result["trainings"]:
        for name, found in training["costs"].items():
            limit = result["limits"][name.partition(" ")[0]]
            rows.append(
                [
                    name,
                    f"{training['tokens']} tokens, {training['step']['median_ms']:.0f} ms",
                    f"{found['ms']:.2f} ms",
                    f"{found['cost']:.2%}",
                    f"{found['lower']:.2%} to {found['upper']:.2%}",
                    f"{limit:.0%}: {'ok' if found['upper'] < limit else 'MISSED'}",
                ]
            )
    headers = ["tool", "step", "added to a step", "cost", "95% interval", "limit of its upper end"]
    ends = " and ".join(
        f"{training['begin_and_end_of_block']['allocations']['median_ms']:.0f} ms" for training in result["trainings"]
    )
    short = result["short_step"]["alone"]
    return "\n\n".join(
        [
            table(headers, rows),
            f"GPT of {result['parameters'] / 1e6:.1f} M parameters with AdamW8bit, steps on "
            f"{plural(result['threads'], 'thread')}. What a tool adds: CPU time, the median over {short['repeats']} "
            f"rounds of steps of {short['median_ms']:.0f} ms; and a {STEPS_OF_A_BLOCK}th of what a profiled block of "
            f"{STEPS_OF_A_BLOCK} steps takes to begin and end ({ends} with `allocations`).",
            origin(result),
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    head = provenance(vars(arguments))
    warnings.filterwarnings("ignore", message="optim8.monitor")
    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        result = {**head, **measure(arguments, writer)}
    path = json_path(arguments, "bench_monitoring")
    write_json(path, result)
    print(f"{render(result)}\n\nWritten: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
