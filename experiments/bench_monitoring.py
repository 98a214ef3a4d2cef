"""What does it cost to watch: the memory profiler in every step, and the monitor of quantized state at every 100th.

Some training steps run with each tool, and the same number alone before and behind them; the cost is the median of
these ratios. The profiler's includes what it does when a block of 20 steps begins and ends. The monitor's is that of
one look, with its log written by TensorBoard, spread over the steps between two looks.
"""

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, provenance, spread, write_json
from lm.model import GPT, Shape
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm  # type: ignore[import-untyped]

import optim8

LIMITS = {"memory.profile": 0.03, "monitor": 0.01}  # of the time of training
EVERY = 100
STEPS_OF_A_BLOCK = 20


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="steps that are timed at once")
    parser.add_argument("--rounds", type=int, default=14)
    parser.add_argument("--json", type=Path, default=None, help=f"such as {RESULTS.name}/bench_monitoring.json")
    return parser.parse_args()


class Training:
    """A GPT with AdamW8bit on random bytes."""

    def __init__(self, layers: int, width: int, context: int, batch: int) -> None:
        torch.manual_seed(0)
        self.model = GPT(Shape(layers, 4, width, context))
        self.optimizer = optim8.AdamW8bit(self.model.named_parameters(), lr=1e-3)
        self.size = (batch, context)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            tokens = torch.randint(0, 256, self.size)
            self.model.loss(tokens, tokens.roll(1, 1)).backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.optimizer.zero_grad()


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def profiled(training: Training, steps: int, source: str, ends: list[float]) -> float:
    """Seconds of the steps in a profiled block; adds those of beginning and ending the block to `ends`."""
    prof = optim8.memory.profile(training.model, training.optimizer, source=source)
    around = seconds(prof.__enter__)
    taken = seconds(lambda: training.run(steps))
    ends.append(around + seconds(lambda: prof.__exit__(None, None, None)))
    return taken


def measure(training: Training, steps: int, rounds: int, writer: SummaryWriter) -> dict[str, Any]:
    """Steps with each tool, between steps alone: a machine whose speed drifts is compared with itself."""
    ends: dict[str, list[float]] = {"allocations": [], "rss": []}
    looked: dict[str, Any] = {}

    def watched() -> float:
        with optim8.monitor(training.optimizer, writer, every=1) as watch:
            taken = seconds(lambda: training.run(steps))
        looked.update(watch.latest)
        return taken

    tools: dict[str, Callable[[], float]] = {
        "allocations": lambda: profiled(training, steps, "allocations", ends["allocations"]),
        "rss": lambda: profiled(training, steps, "rss", ends["rss"]),
        "monitor": watched,
    }
    alone: list[float] = []
    extra: dict[str, list[float]] = {name: [] for name in tools}  # seconds of a tool's steps over those alone, - 1
    training.run(3)
    for _ in tqdm(range(rounds), desc="rounds"):
        alone.append(seconds(lambda: training.run(steps)))
        for name, tool in tools.items():
            taken = tool()
            alone.append(seconds(lambda: training.run(steps)))
            extra[name].append(2 * taken / (alone[-2] + alone[-1]) - 1)
    of_block = statistics.median(alone)
    costs = {
        f"memory.profile ({source})": statistics.median(extra[source])
        + statistics.median(ends[source]) / (STEPS_OF_A_BLOCK * of_block / steps)
        for source in ends
    }
    costs[f"monitor (every={EVERY})"] = statistics.median(extra["monitor"]) / EVERY
    moments = [moment for health in looked.values() for moment in health.moments.items()]
    return {
        "largest_error": {name: max(of.error for key, of in moments if key == name) for name, _ in moments},
        "step": spread([taken / steps for taken in alone]),
        "extra": {name: statistics.quantiles(values, n=4) for name, values in extra.items()},
        "begin_and_end_of_block": {name: spread(values) for name, values in ends.items()},
        "cost": costs,
        "limits": LIMITS,
    }


def main() -> int:
    arguments = parse_arguments()
    warnings.filterwarnings("ignore", message="optim8.monitor")
    training = Training(arguments.layers, arguments.width, arguments.context, arguments.batch)
    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        measured = measure(training, arguments.steps, arguments.rounds, writer)
    parameters = sum(p.numel() for p in training.model.parameters())
    print(f"GPT, {parameters / 1e6:.1f} M parameters, {arguments.batch} x {arguments.context} tokens a step")
    print(f"largest relative error of a moment: {max(measured['largest_error'].values()):.1%}")
    for name, cost in measured["cost"].items():
        limit = LIMITS[name.partition(" ")[0]]
        print(f"{name}: {cost:+.2%} of the time of training, limit {limit:.0%}: {'ok' if cost <= limit else 'MISSED'}")
    if arguments.json is not None:
        write_json(arguments.json, {**provenance(vars(arguments)), "parameters": parameters, **measured})
    return 0


if __name__ == "__main__":
    sys.exit(main())
