"""Do bfloat16 weights learn? The same small GPT in bfloat16 with every way of keeping its weights, over several seeds.

All ways start from the same weights and see the same batches; the gradients are those of the bfloat16 model, but for
`float32 model`. AdamW with 8-bit state steps all but torch's and torchao's own. Learning rates are constant: a usual
one, and a small one, at which rounding to nearest stands still. Losses are compared with those of a float32 copy of the
weights, seed by seed.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lm.data import Text, all_batches, load_text, random_batch
from lm.model import GPT, Shape
from shared.common import add_outputs, origin, plural, provenance, table
from shared.plotting import STYLES, new_figure, publish
from shared.subjects import peer_versions
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES = {"steps": 2000, "batch": 4, "layers": 1, "width": 64, "context": 32}
QUICK = {"steps": 4, "batch": 2, "layers": 1, "width": 32, "context": 16}
LAST = 0.1  # the share of steps at the end whose training losses count
DRAWN = 100  # points of a curve
REFERENCE = "float32 copy"
DECAY = 0.01

Step = Callable[[], None]


def _ours(params: list[nn.Parameter], lr: float, **options: Any) -> Step:
    import optim8

    return optim8.AdamW8bit(params, lr=lr, weight_decay=DECAY, min_8bit_size=1024, **options).step


def _with_copy(params: list[nn.Parameter], lr: float, make: Callable[..., Step]) -> Step:
    """Float32 copies of the weights are stepped, and the weights rounded from them."""
    copies = [nn.Parameter(p.detach().float()) for p in params]
    step_copies = make(copies, lr)

    def step() -> None:
        for p, copy in zip(params, copies, strict=True):
            copy.grad = None if p.grad is None else p.grad.float()
        step_copies()
        with torch.no_grad():
            for p, copy in zip(params, copies, strict=True):
                p.copy_(copy)

    return step


def _torch(params: list[nn.Parameter], lr: float) -> Step:
    return torch.optim.AdamW(params, lr=lr, weight_decay=DECAY, fused=True).step


def _torchao(params: list[nn.Parameter], lr: float) -> Step:
    from torchao.optim import AdamW8bit  # type: ignore[import-untyped]

    made: Step = AdamW8bit(params, lr=lr, weight_decay=DECAY, bf16_stochastic_round=True).step
    return made


# By name: the dtype of the model, and what steps its parameters.
WAYS: dict[str, tuple[torch.dtype, Callable[[list[nn.Parameter], float], Step]]] = {
    REFERENCE: (torch.bfloat16, lambda params, lr: _with_copy(params, lr, _ours)),
    "float32 model": (torch.float32, _ours),
    "master_bits=32": (torch.bfloat16, lambda params, lr: _ours(params, lr, master_bits=32)),
    "master_bits=24": (torch.bfloat16, lambda params, lr: _ours(params, lr, master_bits=24)),
    "dithered": (torch.bfloat16, lambda params, lr: _ours(params, lr, param_rounding="dithered")),
    "nearest": (torch.bfloat16, _ours),
    "torch AdamW, float32 copy": (torch.bfloat16, lambda params, lr: _with_copy(params, lr, _torch)),
    "torchao AdamW8bit, random": (torch.bfloat16, _torchao),
}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_outputs(parser, "bf16")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, at least 2")
    parser.add_argument("--rates", default="1e-3,1e-5", help="learning rates")
    parser.add_argument("--ways", help=f"some of {' | '.join(WAYS)}, with | between; by default all that are installed")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="trainings at a time, of one thread each")
    for name, value in SIZES.items():
        parser.add_argument(f"--{name}", type=int, help=f"by default {value}, with --quick {QUICK[name]}")
    arguments = parser.parse_args(argv)
    for name, value in (QUICK if arguments.quick else SIZES).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.seeds < 2 or min(getattr(arguments, name) for name in SIZES) < 1:
        parser.error("--seeds must be at least 2, and sizes at least 1")
    there = [way for way in WAYS if not way.startswith("torchao") or importlib.util.find_spec("torchao")]
    arguments.ways = arguments.ways.split("|") if arguments.ways else there
    if REFERENCE not in arguments.ways or not set(arguments.ways) <= WAYS.keys():
        parser.error(f"--ways must be among {' | '.join(WAYS)}, and {REFERENCE} one of them")
    return arguments


def _validation_loss(model: GPT, text: Text, context: int) -> float:
    with torch.no_grad():
        losses = [float(model.loss(*batch)) for batch in all_batches(text.validation, 32, context)]
    return float(np.mean(losses))


def train(job: tuple[Mapping[str, int], str, float, int]) -> tuple[str, float, int, dict[str, Any]]:
    """One training: (sizes, way, learning rate, seed), and then its figures."""
    sizes, way, lr, seed = job
    torch.set_num_threads(1)
    text, (dtype, make) = load_text(None, sizes["context"]), WAYS[way]
    torch.manual_seed(seed)
    model = GPT(Shape(sizes["layers"], 2, sizes["width"], sizes["context"])).to(torch.bfloat16).to(dtype)
    params = list(model.parameters())
    start = [p.detach().clone() for p in params]
    step, batches = make(params, lr), torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(sizes["steps"]):
        loss = model.loss(*random_batch(text.training, sizes["batch"], sizes["context"], batches))
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        step()
        losses.append(loss.item())
    each = max(1, len(losses) // DRAWN)
    figures = {
        "training_loss": float(np.mean(losses[-max(1, round(LAST * len(losses))) :])),
        "validation_loss": _validation_loss(model, text, sizes["context"]),
        "unmoved": _unmoved(params, start),
        "curve": [float(np.mean(losses[at : at + each])) for at in range(0, len(losses), each)],
    }
    return way, lr, seed, figures


def _unmoved(params: Sequence[Tensor], start: Sequence[Tensor]) -> float:
    same = sum(int((p == s).sum()) for p, s in zip(params, start, strict=True))
    return same / sum(p.numel() for p in params)


def summary(runs: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, Any]:
    """Of one learning rate: for each way its mean losses, and their difference to the reference's."""
    found = {}
    for way, by_seed in runs.items():
        mean = {
            key: float(np.mean([of[key] for of in by_seed.values()]))
            for key in ("training_loss", "validation_loss", "unmoved")
        }
        apart = [of["training_loss"] / runs[REFERENCE][seed]["training_loss"] - 1 for seed, of in by_seed.items()]
        error = float(np.std(apart, ddof=1) / np.sqrt(len(apart)))
        curve = np.mean([of["curve"] for of in by_seed.values()], axis=0).tolist()
        found[way] = {**mean, "difference": float(np.mean(apart)), "standard_error": error, "curve": curve}
    return found


def render(result: Mapping[str, Any]) -> str:
    arguments, tables = result["arguments"], []
    for rate, found in result["rates"].items():
        rows = [
            [
                way,
                f"{of['training_loss']:.4f}",
                f"{of['validation_loss']:.4f}",
                "" if way == REFERENCE else f"{of['difference']:+.2%} ± {of['standard_error']:.2%}",
                f"{of['unmoved']:.1%}",
            ]
            for way, of in found.items()
        ]
        headers = ["weights", "training loss", "validation loss", "against the copy", "weights that never moved"]
        tables.append(f"Learning rate {rate}:\n\n{table(headers, rows)}")
    return "\n\n".join(
        [
            *tables,
            f"GPT of {result['parameters']:,} parameters, {arguments['steps']} steps of "
            f"{arguments['batch'] * arguments['context']} bytes, {plural(arguments['seeds'], 'seed')}; losses in nats "
            f"per byte, of training over the last {LAST:.0%} of the steps. ± is the standard error of the mean.",
            origin(result),
        ]
    )


def draw(result: Mapping[str, Any]) -> Figure:
    """Training loss over the steps, a panel for each learning rate."""
    first = next(iter(result["rates"].values()))
    shown = [way for way in (REFERENCE, "master_bits=24", "dithered", "nearest") if way in first]
    figure, axes = new_figure(len(result["rates"]))
    for axis, (rate, found) in zip(axes, result["rates"].items(), strict=True):
        for style, way in zip(STYLES, shown, strict=False):
            curve = found[way]["curve"]
            steps = np.linspace(0, result["arguments"]["steps"], len(curve), endpoint=False)
            axis.plot(steps, curve, label=way, markevery=max(1, len(curve) // 8), **style.line())
        axis.set_title(f"learning rate {rate}")
        axis.set_xlabel("steps")
        axis.set_ylabel("training loss, nats per byte")
        axis.legend()
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    head = provenance(vars(arguments))
    sizes = {name: getattr(arguments, name) for name in SIZES}
    ways: list[str] = arguments.ways
    rates = arguments.rates.split(",")
    jobs = [(sizes, way, float(rate), seed) for rate in rates for seed in range(arguments.seeds) for way in ways]
    runs: dict[float, dict[str, dict[int, Any]]] = {float(rate): {way: {} for way in ways} for rate in rates}
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        for way, lr, seed, figures in tqdm(pool.imap_unordered(train, jobs), total=len(jobs), unit="training"):
            runs[lr][way][seed] = figures
    model = GPT(Shape(sizes["layers"], 2, sizes["width"], sizes["context"]))
    result = {
        **head,
        "peers": peer_versions(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "rates": {rate: summary(runs[float(rate)]) for rate in rates},
        "runs": {rate: runs[float(rate)] for rate in rates},
    }
    publish("bf16", result, arguments, draw, render)
    return 0


if __name__ == "__main__":
    sys.exit(main())
