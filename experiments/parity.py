"""Does 8-bit state train as well as 32-bit state? The same small GPT over several seeds, with confidence intervals.

For each seed, an 8-bit optimizer and the same optimizer with 32-bit state start from the same parameters and see the
same batches, so their losses are compared pair by pair: the mean of the relative differences, with its interval from
Student's distribution (one less degree of freedom than seeds). Runs that are finished are kept for `--resume`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lm.data import Text, load_text
from lm.optimizers import COUNTERPART, RECIPES
from lm.train import Run, Settings, require_same_settings
from shared.common import RUNS, add_outputs, origin, plural, provenance, table, write_json
from shared.plotting import STYLES, new_figure, publish
from tqdm import tqdm  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONFIDENCE = 0.95
SIZES = {"steps": 800, "batch": 8, "layers": 2, "heads": 4, "width": 128, "context": 64}
QUICK = {"steps": 5, "batch": 32, "layers": 1, "heads": 2, "width": 64, "context": 64}

Result = Mapping[str, Any]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_outputs(parser, "parity")
    parser.add_argument("--optimizers", default="adamw8bit,lion8bit", help=f"some of {', '.join(COUNTERPART)}")
    parser.add_argument("--seeds", type=int, default=8, help="number of seeds, at least 2")
    parser.add_argument("--text", type=Path, help="file to train on; without it, Python's language reference")
    for name, value in SIZES.items():
        parser.add_argument(f"--{name}", type=int, help=f"by default {value}, with --quick {QUICK[name]}")
    parser.add_argument("--threads", type=int, default=1, help="part of the result: sums are split over them")
    parser.add_argument("--out", type=Path, default=RUNS / "parity", help="folder for what the trainings write")
    parser.add_argument("--resume", action="store_true", help="keep the trainings in --out that are finished")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.optimizers.split(",") if name not in COUNTERPART]
    if unknown:
        parser.error(f"--optimizers: must be among {', '.join(COUNTERPART)}, got {', '.join(unknown)}")
    if arguments.seeds < 2:
        parser.error(f"--seeds: an interval needs at least 2 seeds, got {arguments.seeds}")
    for name, value in (QUICK if arguments.quick else SIZES).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}: must be at least 1, got {getattr(arguments, name)}")
    return arguments


def train(arguments: argparse.Namespace, name: str, seed: int, text: Text) -> dict[str, Any]:
    """Figures of one training; those of a finished one where `--resume` finds them."""
    sizes = {key: getattr(arguments, key) for key in SIZES}
    settings = Settings(
        optimizer=name,
        **sizes,
        dtype="float32",
        seed=seed,
        device="cpu",
        threads=arguments.threads,
        text_sha256=text.sha256,
    )
    folder = arguments.out / f"seed-{seed}"
    finished = folder / f"{name}.json"
    if arguments.resume and finished.exists():
        figures: dict[str, Any] = json.loads(finished.read_text(encoding="utf-8"))
        require_same_settings(finished, figures["settings"], settings)
        return figures
    figures = Run(settings, text, folder).train(leave_bar=False)
    write_json(finished, figures)
    return figures


def confidence_interval(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation and the bounds of the mean's 95 % confidence interval."""
    from scipy.stats import t  # type: ignore[import-untyped]

    count = len(values)
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    half = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * deviation / count**0.5
    return {"mean": mean, "deviation": deviation, "lower": mean - half, "upper": mean + half}


def compared(name: str, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """An 8-bit optimizer against its counterpart: the losses by seed, and both intervals."""
    other = COUNTERPART[name]
    ours, theirs = ([run["validation_loss"] for run in runs[key]] for key in (name, other))
    differences = [a / b - 1 for a, b in zip(ours, theirs)]
    return {
        "optimizer": name,
        "counterpart": other,
        "relative_differences": differences,
        "relative_difference": confidence_interval(differences),
    }


def results_table(result: Result) -> str:
    labels = {name: found["label"] for name, found in result["optimizers"].items()}
    rows = []
    for name, found in result["optimizers"].items():
        loss = found["validation_loss"]
        pair = next((pair for pair in result["pairs"] if pair["optimizer"] == name), None)
        cells = ["(the reference)", "", ""]
        if pair:
            d = pair["relative_difference"]
            spread = f"{min(pair['relative_differences']):+.2%} to {max(pair['relative_differences']):+.2%}"
            cells = [f"{d['mean']:+.2%}", f"{d['lower']:+.2%} to {d['upper']:+.2%}", spread]
        rows.append(
            [labels[name], f"{loss['mean']:.4f}", f"{loss['lower']:.4f} to {loss['upper']:.4f}", *cells],
        )
    interval = f"{CONFIDENCE:.0%} interval"
    headers = ["optimizer", "validation loss", interval, "against 32-bit state", interval, "smallest to largest"]
    return table(headers, rows)


def render(result: Result) -> str:
    arguments, text = result["arguments"], result["text"]
    return "\n\n".join(
        [
            results_table(result),
            f"Means over {plural(len(result['seeds']), 'seed')}; losses in nats per byte. GPT of "
            f"{result['parameters'] / 1e6:.2f} M parameters, float32, {arguments['steps']} steps of "
            f"{arguments['batch'] * arguments['context']} bytes of {text['name']}.",
            origin(result),
        ]
    )


def draw(result: Result) -> Figure:
    """Left: validation loss during training, mean and interval. Right: the difference of every seed, with the mean."""
    figure, (left, right) = new_figure(columns=2)
    for style, found in zip(STYLES, result["optimizers"].values()):
        steps = [point["step"] for point in found["validation_curve"]]
        means = [point["mean"] for point in found["validation_curve"]]
        below = [point["mean"] - point["lower"] for point in found["validation_curve"]]
        left.errorbar(steps, means, yerr=below, label=found["label"], capsize=4, **style.line())
    left.set_xlabel("optimizer step")
    left.set_ylabel("validation loss (nats per byte)")
    left.set_title(f"mean of {plural(len(result['seeds']), 'seed')} and its {CONFIDENCE:.0%} interval")
    left.legend()
    names = list(result["optimizers"])
    for at, pair in enumerate(result["pairs"]):
        style = STYLES[names.index(pair["optimizer"])]
        found = pair["relative_difference"]
        percent = [100 * value for value in pair["relative_differences"]]
        right.plot([at - 0.15] * len(percent), percent, color="#777777", linestyle="", marker="_", markersize=14)
        half = 100 * (found["upper"] - found["mean"])
        right.errorbar([at + 0.1], [100 * found["mean"]], yerr=[half], capsize=8, **style.line(markersize=9))
    right.axhline(0, color="black", linewidth=1)
    right.set_xticks(
        range(len(result["pairs"])),
        [
            f"{RECIPES[pair['optimizer']].label}\nagainst {RECIPES[pair['counterpart']].label}"
            for pair in result["pairs"]
        ],
    )
    right.set_xlim(-0.6, len(result["pairs"]) - 0.4)
    right.set_ylabel("difference of the final validation loss (%)")
    right.set_title("each seed (dashes), mean and interval")
    return figure


def measure(arguments: argparse.Namespace, text: Text) -> dict[str, Any]:
    names = list(dict.fromkeys(key for name in arguments.optimizers.split(",") for key in (COUNTERPART[name], name)))
    seeds = range(arguments.seeds)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    pairs = [(seed, name) for seed in seeds for name in names]
    for seed, name in tqdm(pairs, desc="trainings", unit="training"):
        runs[name].append(train(arguments, name, seed, text))
    optimizers = {
        name: {
            "label": RECIPES[name].label,
            "learning_rate": RECIPES[name].lr,
            "weight_decay": RECIPES[name].weight_decay,
            "validation_losses": [run["validation_loss"] for run in found],
            "validation_loss": confidence_interval([run["validation_loss"] for run in found]),
            "training_losses": [run["training_loss"] for run in found],
            "validation_curve": [
                {"step": points[0][0], **confidence_interval([loss for _, loss in points])}
                for points in zip(*(run["validation_curve"] for run in found))
            ],
            "state_bytes_per_parameter": found[0]["state_bytes_per_parameter"],
        }
        for name, found in runs.items()
    }
    return {
        "text": {"name": text.name, "bytes": len(text.training) + len(text.validation), "sha256": text.sha256},
        "parameters": runs[names[0]][0]["parameters"],
        "seeds": list(seeds),
        "confidence": CONFIDENCE,
        "optimizers": optimizers,
        "pairs": [compared(name, runs) for name in arguments.optimizers.split(",")],
    }


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    head = provenance(vars(arguments))
    try:
        text = load_text(arguments.text, arguments.context)
        result = {**head, **measure(arguments, text)}
    except (ValueError, OSError) as error:
        print(f"parity: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted. The same command with --resume continues.", file=sys.stderr)
        return 130
    publish("parity", result, arguments, draw, render)
    return 0


if __name__ == "__main__":
    sys.exit(main())
