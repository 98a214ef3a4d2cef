"""Does 8-bit state train what is rarely updated as 32-bit state does? Small models, several seeds and learning rates.

Where neighbours in a block live differently, 8 bits have to hold values that are orders of magnitude apart. Three
tasks bring that about: `embeddings` (a language model on tokens of Zipf's frequencies; four rows of the embedding and
of the head share a block), `experts` (a mixture of experts on inputs of Zipf's frequencies) and `part` (the language
model, fine-tuned on other tokens with its lower half frozen and then thawed). All tensors have 8-bit state.

For each seed, every optimizer starts from the same parameters and sees the same batches, so that losses are compared
pair by pair with those of float32 state: the mean of the relative differences and its interval from Student's
distribution. At one learning rate a lower loss says nothing, as steps that are too long or too short may help there.
What counts is an equal loss at each.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from parity import CONFIDENCE, confidence_interval
from rarity.report import draw, render
from rarity.subjects import REFERENCE, set_rate, step_without_compiler, subjects
from rarity.tasks import TASKS, Losses, Sizes, Task
from shared.common import add_outputs, provenance
from shared.plotting import publish
from shared.subjects import PEERS, Make, missing_peers, peer_versions
from tqdm import tqdm  # type: ignore[import-untyped]

LEARNING_RATES = (2e-3, 6e-3, 18e-3)  # float32 state ends lowest near the middle one, in each task
STEPS, STEPS_QUICK = 800, 8
BETAS, WEIGHT_DECAY = (0.9, 0.999), 0.01
SMALL = {"batch": 2, "context": 8, "vocabulary": 64, "experts": 8, "checked": 8}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_outputs(parser, "rare_updates")
    parser.add_argument("--tasks", default=",".join(TASKS), help="some of them, with commas between")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, at least 2")
    parser.add_argument("--steps", type=int, help=f"a multiple of 4; by default {STEPS}, with --quick {STEPS_QUICK}")
    parser.add_argument("--no-peers", action="store_true", help="leave bitsandbytes and torchao out")
    arguments = parser.parse_args(argv)
    if arguments.steps is None:
        arguments.steps = STEPS_QUICK if arguments.quick else STEPS
    unknown = [name for name in arguments.tasks.split(",") if name not in TASKS]
    if unknown:
        parser.error(f"--tasks: must be among {', '.join(TASKS)}, got {', '.join(unknown)}")
    if arguments.seeds < 2:
        parser.error(f"--seeds: an interval needs at least 2, got {arguments.seeds}")
    if arguments.steps < 4 or arguments.steps % 4:
        parser.error(f"--steps: must be a multiple of 4, got {arguments.steps}")
    return arguments


def train(task: Task, name: str, make: Make, peak: float, seed: int) -> Losses:
    """The losses at the end of one training, on data that it has not seen."""
    torch.manual_seed(seed)
    model = task.model()
    batches = torch.Generator().manual_seed(seed)
    optimizer = make(list(model.parameters()), lr=peak, betas=BETAS, weight_decay=WEIGHT_DECAY)
    for step in range(task.sizes.steps):
        task.prepare(model, step)
        set_rate(optimizer, task.rate(peak, step))
        loss = task.loss(model, step, batches)
        loss.backward()  # type: ignore[no-untyped-call]
        with step_without_compiler(name):
            optimizer.step()
        optimizer.zero_grad()
    return task.check(model)


def finite(losses: Sequence[float]) -> list[float | None]:
    """As JSON has it: None for what is no number."""
    return [loss if math.isfinite(loss) else None for loss in losses]


def interval(values: Sequence[float]) -> dict[str, float] | None:
    """None where a training did not end with a number."""
    return confidence_interval(values) if all(map(math.isfinite, values)) else None


def row(name: str, found: Sequence[Losses], exact: Sequence[Losses]) -> dict[str, Any]:
    """An optimizer at one learning rate: losses by seed, of all and of what is rare, and those over float32's."""
    figures: dict[str, Any] = {"optimizer": name}
    for key, ours, theirs in zip(("all", "rare"), zip(*found), zip(*exact)):
        differences = [a / b - 1 for a, b in zip(ours, theirs)]
        figures[key] = {
            "losses": finite(ours),
            "loss": interval(ours),
            "relative_difference": None if name == REFERENCE else interval(differences),
        }
    return figures


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    names, seeds = arguments.tasks.split(","), range(arguments.seeds)
    tasks = {name: TASKS[name](Sizes(arguments.steps, **(SMALL if arguments.quick else {}))) for name in names}
    makes = subjects(peers=not arguments.no_peers)
    found: dict[tuple[str, float, str], list[Losses]] = {}
    failed: dict[str, str] = {}
    trainings = [
        (seed, task, rate, name) for seed in seeds for task in tasks for rate in LEARNING_RATES for name in makes
    ]
    for seed, task, rate, name in tqdm(trainings, desc="trainings", unit="training"):
        if name in failed:
            continue
        try:
            losses = train(tasks[task], name, makes[name], rate, seed)
        except Exception as error:
            if name not in PEERS:
                raise
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"  # a finding, not an end
        else:
            found.setdefault((task, rate, name), []).append(losses)
    present = [name for name in makes if name not in failed]
    return {
        "peers": {} if arguments.no_peers else peer_versions(),
        "not_measured": {**missing_peers(asked=not arguments.no_peers), **failed},
        "seeds": list(seeds),
        "confidence": CONFIDENCE,
        "betas": BETAS,
        "weight_decay": WEIGHT_DECAY,
        "tasks": {name: summary(name, task, found, present) for name, task in tasks.items()},
    }


def summary(
    name: str, task: Task, found: Mapping[tuple[str, float, str], Sequence[Losses]], present: Sequence[str]
) -> dict[str, Any]:
    """All that was measured of a task: its learning rates, and the optimizers at each."""
    return {
        "parameters": sum(parameter.numel() for parameter in task.model().parameters()),
        "rates": [
            {
                "learning_rate": rate,
                "rows": [row(o, found[name, rate, o], found[name, rate, REFERENCE]) for o in present],
            }
            for rate in LEARNING_RATES
        ],
    }


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    torch.set_num_threads(1)  # small tensors; and sums are split over threads, so their number is part of the result
    result = {**provenance(vars(arguments)), **measure(arguments)}
    publish("rare_updates", result, arguments, draw, render)
    return 0


if __name__ == "__main__":
    sys.exit(main())
