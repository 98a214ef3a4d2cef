"""How far do bfloat16 weights move at a small learning rate? Real optimizers beside float32 weights with float32 state.

All see the same random gradients with a mean (`slow_state/cases.py`) and start from the same weights, as wide as those
of a GPT. At the learning rate of a late finetuning an update is less than half of a weight's last bit, so that a weight
that is rounded to the nearest stands still. Every optimizer is taken as it comes, and with the option by which it keeps
such updates, where it has one. What counts is the bfloat16 weight, which the model uses, not what stands beside it.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from shared.common import add_json, json_path, not_measured, origin, plural, provenance, table, write_json
from shared.subjects import Make, missing_peers, peer, peer_subjects, peer_versions, with_version
from slow_state.cases import BLOCK, STEADY, gradients
from slow_state.subjects import slope
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

SIZES = {"steps": 3000, "blocks": 64}
QUICK = {"steps": 6, "blocks": 16}  # 4096 values: the least that all keep in 8 bits
CHECKPOINTS = 6
DEVIATION = 0.02  # of the weights
REFERENCE = "float32 weights"
LION = "lion-pytorch"
# By the name that the README's table has: the option that keeps small updates.
KEEPS = {"optim8 AdamW8bit": "master_bits=24", "torchao AdamW8bit": "bf16_stochastic_round=True"}

Result = Mapping[str, Any]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="in small: shows that it runs, its figures say nothing")
    add_json(parser, "bf16_movement")
    parser.add_argument("--steps", type=int, help=f"a multiple of {CHECKPOINTS}; by default {SIZES['steps']}")
    parser.add_argument("--blocks", type=int, help=f"of 256 values, at least 16; by default {SIZES['blocks']}")
    parser.add_argument("--rate", type=float, default=1e-5, help="learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-peers", action="store_true", help="leave bitsandbytes, torchao and lion-pytorch out")
    arguments = parser.parse_args(argv)
    for name, value in (QUICK if arguments.quick else SIZES).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.steps < CHECKPOINTS or arguments.steps % CHECKPOINTS:
        parser.error(f"--steps: must be a multiple of {CHECKPOINTS}, got {arguments.steps}")
    if arguments.blocks < QUICK["blocks"]:
        parser.error(f"--blocks: must be at least {QUICK['blocks']}, got {arguments.blocks}")
    return arguments


def subjects(peers: bool) -> dict[str, dict[str, Make]]:
    """By rule: the reference, which steps float32 weights, and then all that step bfloat16 ones."""
    import optim8

    def ours(make: Make) -> dict[str, Make]:
        found: dict[str, Make] = {f"optim8 {make.__name__}": make}
        for option, value in (("master_bits", 24), ("param_rounding", "dithered")):
            found[f"optim8 {make.__name__} {option}={value}"] = functools.partial(make, **{option: value})
        return found

    adamw: dict[str, Make] = {
        REFERENCE: torch.optim.AdamW,
        "torch AdamW": torch.optim.AdamW,
        **ours(optim8.AdamW8bit),
        **(peer_subjects() if peers else {}),
    }
    if "torchao AdamW8bit" in adamw:
        random = functools.partial(peer("torchao"), bf16_stochastic_round=True)
        adamw[f"torchao AdamW8bit {KEEPS['torchao AdamW8bit']}"] = random
    lion: dict[str, Make] = {REFERENCE: functools.partial(optim8.Lion8bit, optim_bits=32), **ours(optim8.Lion8bit)}
    for library, module, name in (("bitsandbytes", "bitsandbytes.optim", "Lion8bit"), (LION, "lion_pytorch", "Lion")):
        if peers and importlib.util.find_spec(module.partition(".")[0]):
            lion[f"{library} {name}"] = getattr(importlib.import_module(module), name)
    return {"AdamW": adamw, "Lion": lion}


def versions() -> dict[str, str]:
    found = peer_versions()
    if importlib.util.find_spec("lion_pytorch"):
        found[LION] = importlib.metadata.version(LION)
    return found


def compare(moved: Tensor, exact: Tensor) -> dict[str, float]:
    """slope: of the weights' displacements against the exact ones; error: norm of the difference over theirs."""
    error = ((moved - exact).norm() / exact.norm()).item()
    return {"slope": float(f"{slope(moved, exact):.6g}"), "error": float(f"{error:.6g}")}


class _Walk:
    """An optimizer under way, whose parameter keeps what it gains."""

    def __init__(self, make: Make, weights: Tensor, rate: float) -> None:
        self.start, self.parameter = weights.double(), torch.nn.Parameter(weights.clone())
        self.parameter.grad = torch.zeros_like(weights)
        self.optimizer = make([self.parameter], lr=rate, weight_decay=0.0)

    def step(self, gradient: Tensor) -> None:
        assert self.parameter.grad is not None
        self.parameter.grad.copy_(gradient)
        self.optimizer.step()

    @property
    def moved(self) -> Tensor:
        return self.parameter.detach().double() - self.start


def follow(
    makes: Mapping[str, Make], arguments: argparse.Namespace, failed: dict[str, str], bar: Any
) -> dict[str, Any]:
    """The figures of each subject at the checkpoints; a peer that fails is noted instead."""
    blocks, steps = arguments.blocks, arguments.steps
    generator = torch.Generator().manual_seed(arguments.seed)
    weights = (torch.randn(blocks, BLOCK, generator=generator) * DEVIATION).bfloat16()
    walks = {
        name: _Walk(make, weights.float() if name == REFERENCE else weights, arguments.rate)
        for name, make in makes.items()
    }
    found: dict[str, dict[str, list[float]]] = {name: {"slope": [], "error": []} for name in makes}
    for step, gradient in enumerate(gradients(STEADY, blocks, steps, steps, arguments.seed), 1):
        rounded = gradient.bfloat16()  # the same values for all
        for name in list(walks):
            try:
                walks[name].step(rounded)
            except Exception as error:
                if name.startswith(("torch ", "optim8 ", REFERENCE)):
                    raise
                del walks[name], found[name]
                failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"  # a finding, not an end
        if step % (steps // CHECKPOINTS) == 0:
            for name, walk in walks.items():
                for key, value in compare(walk.moved, walks[REFERENCE].moved).items():
                    found[name][key].append(value)
        bar.update()
    return found


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(arguments.seed)  # torchao rounds by the global generator
    failed: dict[str, str] = {}
    by_rule = subjects(peers=not arguments.no_peers)
    with tqdm(total=len(by_rule) * arguments.steps, desc="bfloat16 weights", unit="step") as bar:
        rules = {rule: follow(makes, arguments, failed, bar) for rule, makes in by_rule.items()}
    return {
        "peers": {} if arguments.no_peers else versions(),
        "not_measured": {**missing_peers(asked=not arguments.no_peers), **failed},
        "checkpoints": [(at + 1) * arguments.steps // CHECKPOINTS for at in range(CHECKPOINTS)],
        "rules": rules,
    }


def kept(result: Result, subject: str) -> Mapping[str, list[float]] | None:
    """What was found of an AdamW, with the option that keeps small updates where it has one; None if it was not run."""
    found: Mapping[str, Mapping[str, list[float]]] = result["rules"]["AdamW"]
    return found.get(f"{subject} {KEEPS.get(subject)}", found.get(subject))


def label(subject: str) -> str:
    """Whose weights, and by which option they move: "optim8 with master_bits=24"."""
    library = subject.partition(" ")[0]
    return f"{library} with {KEEPS[subject]}" if subject in KEEPS else library


def cell(of: Mapping[str, list[float]], at: int = -1) -> str:
    return f"{of['slope'][at]:.2f} ({of['error'][at]:.2f})"


def render(result: Result) -> str:
    arguments = result["arguments"]
    rows = [
        [rule, with_version(name, result["peers"]), *(cell(of, at) for at in range(len(result["checkpoints"])))]
        for rule, found in result["rules"].items()
        for name, of in found.items()
        if name != REFERENCE
    ]
    headers = ["rule", "bfloat16 weights", *(f"{step} steps" for step in result["checkpoints"])]
    return "\n\n".join(
        [
            table(headers, rows),
            f"Displacement of the weights over that of float32 weights with float32 state: slope (norm of the "
            f"difference over its norm). Learning rate {arguments['rate']:g}, no decay, weights of deviation "
            f"{DEVIATION}, {plural(arguments['blocks'], 'block')} of 256. {not_measured(result)}".rstrip(),
            origin(result),
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    torch.set_num_threads(1)  # small tensors
    result = {**provenance(vars(arguments)), **measure(arguments)}
    path = json_path(arguments, "bf16_movement")
    write_json(path, result)
    print(f"\n{render(result)}\n\nWritten: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
