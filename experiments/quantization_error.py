"""What quantization does to the state of a trained model: linear, quantile and dynamic code, tensor-wise and blockwise.

A small GPT is trained with 32-bit AdamW; its moments are then quantized to 8 bits in every way and decoded again. The
method is that of Dettmers et al. 2021 (arXiv 2110.02861), who compare codes by two errors: that of the moments, and
that of the update which the decoded moments would make. Nothing here is about the error that adds up in training, as
`parity.py` is: every scheme sees the same exact moments.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lm.data import Text, load_text
from lm.optimizers import RECIPES
from lm.train import Run, Settings
from shared.common import add_outputs, origin, plural, provenance, table
from shared.plotting import STYLES, new_figure, publish
from shared.schemes import BLOCKSIZES, CODES, OURS, Moments, schemes
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMALLEST = 4096  # values of a tensor that is quantized; optim8's default `min_8bit_size`
SIZES = {"steps": 400, "batch": 8, "layers": 4, "heads": 4, "width": 256, "context": 64}
QUICK = {"steps": 5, "batch": 32, "layers": 1, "heads": 2, "width": 64, "context": 64}
ERRORS = {
    "exp_avg": "error of the first moment",
    "exp_avg_sq": "error of the second moment",
    "update": "error of the update",
}

Result = Mapping[str, Any]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_outputs(parser, "quantization_error")
    parser.add_argument("--seeds", type=int, default=3, help="number of models")
    parser.add_argument("--steps", type=int, help=f"by default {SIZES['steps']}, with --quick {QUICK['steps']}")
    parser.add_argument("--text", type=Path, help="file to train on; without it, Python's language reference")
    parser.add_argument("--threads", type=int, default=1, help="part of the result: sums are split over them")
    arguments = parser.parse_args(argv)
    for name, value in (QUICK if arguments.quick else SIZES).items():
        if getattr(arguments, name, None) is None:
            setattr(arguments, name, value)
    for name in ("seeds", "steps", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}: must be at least 1, got {getattr(arguments, name)}")
    return arguments


def trained_moments(arguments: argparse.Namespace, seed: int, text: Text) -> tuple[list[Moments], float]:
    """The moments of every large tensor after the last step, and the validation loss of the model."""
    settings = Settings(
        optimizer="adamw",
        **{name: getattr(arguments, name) for name in SIZES},
        dtype="float32",
        seed=seed,
        device="cpu",
        threads=arguments.threads,
        text_sha256=text.sha256,
    )
    with tempfile.TemporaryDirectory() as folder:
        run = Run(settings, text, Path(folder))
        figures = run.train(leave_bar=False)
    states = [run.optimizer.state[p] for p in run.model.parameters() if p.numel() >= SMALLEST]
    return [{name: state[name] for name in ("exp_avg", "exp_avg_sq")} for state in states], figures["validation_loss"]


def update(moments: Moments, step: int) -> Tensor:
    """Adam's update per unit of learning rate, float64, from the moments after `step` steps (arXiv 1412.6980)."""
    defaults = torch.optim.AdamW([torch.zeros(1)]).defaults
    beta1, beta2, eps = (float(value) for value in (*defaults["betas"], defaults["eps"]))
    m, v = (moments[key].double() for key in ("exp_avg", "exp_avg_sq"))
    return m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + eps)


def errors(exact: Moments, found: Moments, step: int) -> dict[str, float]:
    """Mean error of each moment over its mean magnitude, and mean relative error of the elements of the update."""
    u, found_u = update(exact, step), update(found, step)
    moved = u != 0
    return {
        **{
            key: ((found[key].double() - exact[key].double()).abs().mean() / exact[key].double().abs().mean()).item()
            for key in exact
        },
        "update": ((found_u - u).abs()[moved] / u.abs()[moved]).mean().item(),
    }


def measure(arguments: argparse.Namespace, text: Text) -> dict[str, Any]:
    """`rows`: for each scheme and error the mean over the values of a model, one number for each seed."""
    rows: dict[tuple[str, int | None], dict[str, list[float]]] = {}
    losses, count, tensors = [], 0, 0
    for seed in tqdm(range(arguments.seeds), desc="models", unit="model"):
        states, loss = trained_moments(arguments, seed, text)
        losses.append(loss)
        count, tensors = sum(state["exp_avg"].numel() for state in states), len(states)
        for moments in tqdm(states, desc="tensors", unit="tensor", leave=False):
            weight = moments["exp_avg"].numel() / count
            for name, blocksize, found in schemes(moments):
                sums = rows.setdefault((name, blocksize), {key: [0.0] * arguments.seeds for key in ERRORS})
                for key, error in errors(moments, found, arguments.steps).items():
                    sums[key][seed] += weight * error
    return {
        "text": {"name": text.name, "bytes": len(text.training) + len(text.validation), "sha256": text.sha256},
        "model": {name: getattr(arguments, name) for name in SIZES},
        "optimizer": {"label": RECIPES["adamw"].label, "lr": RECIPES["adamw"].lr},
        "values": count,
        "tensors": tensors,
        "validation_losses": losses,
        "rows": [{"code": name, "blocksize": blocksize, **sums} for (name, blocksize), sums in rows.items()],
    }


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def percent(value: float) -> str:
    """A share with three significant digits."""
    return f"{100 * value:.3g} %" if value < 10 else f"{100 * value:.0f} %"


def render(result: Result) -> str:
    rows = []
    for row in result["rows"]:
        spread = f"{percent(min(row['update']))} to {percent(max(row['update']))}"
        rows.append(
            [
                row["code"],
                row["blocksize"] or "tensor",
                f"{8 + 32 / row['blocksize']:.3f}" if row["blocksize"] else "8",
                *(percent(mean(row[key])) for key in ERRORS),
                spread,
            ]
        )
    headers = ["code", "block size", "bits per value", *ERRORS.values(), "smallest to largest"]
    model, losses = result["model"], result["validation_losses"]
    return "\n\n".join(
        [
            table(headers, rows),
            f"Moments: mean error over mean magnitude. Update: mean of the relative errors of its elements. "
            f"{result['tensors']} tensors, {result['values'] / 1e6:.1f} M values, after {model['steps']} steps "
            f"(validation loss {mean(losses):.2f}); mean of {plural(len(losses), 'model')}, and the smallest and "
            "largest error of the update among them.",
            origin(result),
        ]
    )


def draw(result: Result) -> Figure:
    """A panel for each error, over the block size; a line for each code, and optim8's own state as a point."""
    figure, panels = new_figure(columns=len(ERRORS), width=6.0, sharex=True)
    places = {blocksize: at for at, blocksize in enumerate((*BLOCKSIZES, None))}
    for panel, (key, title) in zip(panels, ERRORS.items()):
        for style, name in zip(STYLES, (*CODES, OURS)):
            rows = sorted((row for row in result["rows"] if row["code"] == name), key=lambda r: places[r["blocksize"]])
            x = [places[row["blocksize"]] for row in rows]
            panel.plot(x, [100 * mean(row[key]) for row in rows], label=name, **style.line())
        if key == "update":
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter("{x:g}")
        else:
            panel.set_ylim(bottom=0)
        panel.set_xticks(range(len(places)), [str(size or "tensor") for size in places], rotation=45)
        panel.set_xlabel("block size (values)")
        panel.set_ylabel(f"{title} (%)")
    panels[0].legend()
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    head = provenance(vars(arguments))
    try:
        text = load_text(arguments.text, arguments.context)
        result = {**head, **measure(arguments, text)}
    except (ValueError, OSError) as error:
        print(f"quantization_error: {error}", file=sys.stderr)
        return 2
    publish("quantization_error", result, arguments, draw, render)
    return 0


if __name__ == "__main__":
    sys.exit(main())
