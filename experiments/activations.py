"""Are planned activations those that a training takes?

The plan of `optim8.memory.plan(model, loss=...)` stands beside the peak that torch's allocator sees, for several models
on a CPU, with and without checkpointing.

Each training has a process of its own. The plan is made first, from shapes alone; then three steps run in a block of
`optim8.memory.profile`, and the peak of the last one's forward and backward counts.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lm.model import GPT, Shape
from shared.common import add_json, json_path, origin, provenance, table, write_json
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import optim8

GOAL = 0.05  # largest difference of the whole training's memory
MIB = 2**20
STEPS = 3

Loss = Callable[[nn.Module], Tensor]
Result = Mapping[str, Any]


class Checkpointed(nn.Module):
    """A layer that keeps its input alone, and runs again in the backward."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.layer, x, use_reentrant=False)
        return result


def gpt(layers: int, width: int, context: int, batch: int, checkpointed: bool = False) -> tuple[nn.Module, Loss]:
    model = GPT(Shape(layers, 4, width, context))
    if checkpointed:
        model.blocks = nn.ModuleList(Checkpointed(block) for block in model.blocks)

    def loss(module: Any) -> Tensor:
        tokens = torch.zeros(batch, context, dtype=torch.int64)
        value: Tensor = module.loss(tokens, tokens)
        return value

    return model, loss


def in_bfloat16(training: tuple[nn.Module, Loss]) -> tuple[nn.Module, Loss]:
    model, loss = training

    def narrow(module: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss(module)

    return model, narrow


def convolutional() -> tuple[nn.Module, Loss]:
    """Eight convolutions of 64 channels with batch norms, on 16 images of 64 x 64."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1)]
    for _ in range(8):
        layers += [nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return model, lambda module: module(torch.zeros(16, 3, 64, 64)).square().mean()


TRAININGS: dict[str, Callable[[], tuple[nn.Module, Loss]]] = {
    "GPT of 4 layers of 128, 8 x 128 tokens": lambda: gpt(4, 128, 128, 8),
    "the same, checkpointed": lambda: gpt(4, 128, 128, 8, checkpointed=True),
    "the same, autocast to bfloat16": lambda: in_bfloat16(gpt(4, 128, 128, 8)),
    "GPT of 12 layers of 256, 4 x 256 tokens": lambda: gpt(12, 256, 256, 4),
    "that one, checkpointed": lambda: gpt(12, 256, 256, 4, checkpointed=True),
    "8 convolutions of 64 channels, 16 x 64 x 64 pixels": convolutional,
}


def measure_one(name: str) -> dict[str, Any]:
    """In the process of one training: bytes that are planned, and the peak that torch's allocator sees."""
    torch.manual_seed(0)
    model, loss = TRAININGS[name]()
    planned = optim8.memory.plan(model, loss=loss, beside=False)
    optimizer = optim8.AdamW8bit(model.parameters())
    gc.collect()
    with optim8.memory.profile(model, optimizer) as profile:
        for _ in range(STEPS):
            loss(model).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
    last = [record for record in profile.records if record.step == STEPS - 1]
    return {
        "training": name,
        "parameters": planned.size,
        "planned_bytes": planned.total,
        "planned_activation_bytes": planned.bytes["activations"],
        "measured_bytes": max(record.peak for record in last if record.phase in ("forward", "backward")),
    }


def in_own_process(name: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, "--one", name], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"activations: {name}: {done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def render(result: Result) -> str:
    rows = []
    for row in result["rows"]:
        ratio = row["planned_bytes"] / row["measured_bytes"]
        cells = (f"{row[key] / MIB:.2f}" for key in ("planned_activation_bytes", "planned_bytes", "measured_bytes"))
        rows.append([row["training"], *cells, f"{ratio:.3f}" + ("" if abs(ratio - 1) < GOAL else ", missed")])
    headers = ["training", "activations, planned", "all, planned", "all, measured", "planned / measured"]
    return "\n\n".join(
        [
            table(headers, rows),
            "MiB at the peak of forward and backward, AdamW8bit, on a CPU; measured: what torch's allocator has handed "
            f"out. The goal is a difference of less than {GOAL:.0%}. An operator's own workspace is not planned.",
            origin(result),
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_json(parser, "activations")
    parser.add_argument("--one", choices=TRAININGS, help="measure one training in this process, and print its figures")
    arguments = parser.parse_args(argv)
    if arguments.one:
        print(json.dumps(measure_one(arguments.one)))
        return 0
    result = {**provenance(vars(arguments)), "goal": GOAL, "rows": [in_own_process(name) for name in TRAININGS]}
    path = json_path(arguments, "activations")
    write_json(path, result)
    print(f"\n{render(result)}\n\nWritten: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
