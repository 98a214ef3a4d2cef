"""Does 8-bit state train as well as 32-bit state? The same small GPT over several seeds, with confidence intervals.

For each seed, an 8-bit optimizer and the same optimizer with 32-bit state start from the same parameters and see the
same batches, so their losses are compared pair by pair: the mean of the relative differences, with its interval from
Student's distribution (one less degree of freedom than seeds). Runs that are finished are kept for `--resume`.

`--long` trains a smaller model for longer, at two learning rates, with a learning rate that ends at 0, and also with
state rounded to nearest and with bitsandbytes; with `--shift` the text is another one from half of the steps on, so
that the scales of gradients change.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm.data import Text, load_source, load_text
from lm.optimizers import COUNTERPART, MIN_8BIT_SIZE, RECIPES, missing_library
from lm.parity_report import draw, render
from lm.train import Run, Settings, require_same_settings
from shared.common import RUNS, add_outputs, provenance, write_json
from shared.plotting import publish
from shared.subjects import PEERS, peer_versions
from tqdm import tqdm  # type: ignore[import-untyped]

CONFIDENCE = 0.95
SIZES = {"steps": 800, "batch": 8, "layers": 2, "heads": 4, "width": 128, "context": 64}
QUICK = {"steps": 5, "batch": 32, "layers": 1, "heads": 2, "width": 64, "context": 64}
LONG = {"steps": 4000, "batch": 4, "layers": 1, "heads": 2, "width": 64, "context": 32}
# What else `--long` changes: which optimizers, multiples of their learning rates, and two of `lm.train.Settings`. The
# smallest matrix of the model has 2048 values.
OTHERS: dict[str, Any] = {"optimizers": "adamw8bit,lion8bit", "rates": "1", "end": 0.1, "min_8bit_size": MIN_8BIT_SIZE}
OTHERS_LONG: dict[str, Any] = {
    "optimizers": "adamw8bit,adamw8bit-nearest,bitsandbytes-adamw8bit",
    "rates": "1,3",
    "end": 0.0,
    "min_8bit_size": 1024,
}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_outputs(parser, "parity")
    parser.set_defaults(png=None)
    parser.add_argument("--long", action="store_true", help="the defaults of the longer comparison")
    parser.add_argument("--shift", action="store_true", help="train on Python's source from half of the steps on")
    parser.add_argument("--optimizers", help=f"some of {', '.join(COUNTERPART)}; {_defaults('optimizers')}")
    parser.add_argument("--rates", help=f"multiples of each optimizer's learning rate; {_defaults('rates')}")
    parser.add_argument("--end", type=float, help=f"last learning rate, as a share of the largest; {_defaults('end')}")
    parser.add_argument("--min-8bit-size", type=int, help=f"smaller tensors: 32 bits; {_defaults('min_8bit_size')}")
    parser.add_argument("--seeds", type=int, default=8, help="number of seeds, at least 2")
    parser.add_argument("--peer-seeds", type=int, help="number of seeds of other libraries, by default all")
    parser.add_argument("--text", type=Path, help="file to train on; without it, Python's language reference")
    for name, value in SIZES.items():
        help_text = f"by default {value}, with --long {LONG[name]}, with --quick {QUICK[name]}"
        parser.add_argument(f"--{name}", type=int, help=help_text)
    parser.add_argument("--threads", type=int, default=1, help="part of the result: sums are split over them")
    parser.add_argument("--out", type=Path, help="folder for what the trainings write, by default in experiments/runs")
    parser.add_argument("--resume", action="store_true", help="keep the trainings in --out that are finished")
    arguments = parser.parse_args(argv)
    sizes, others = (LONG, OTHERS_LONG) if arguments.long else (SIZES, OTHERS)
    for name, value in {**(QUICK if arguments.quick else sizes), **others}.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    arguments.peer_seeds = arguments.seeds if arguments.peer_seeds is None else arguments.peer_seeds
    arguments.out = arguments.out or RUNS / result_name(arguments)
    arguments.png = arguments.png or RUNS / f"{result_name(arguments)}.png"
    _check(parser, arguments)
    return arguments


def _defaults(name: str) -> str:
    return f"by default {OTHERS[name]}, with --long {OTHERS_LONG[name]}"


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Ends with a message where the arguments cannot be honoured; makes `rates` a list."""
    names = arguments.optimizers.split(",")
    unknown = [name for name in names if name not in COUNTERPART]
    if unknown:
        parser.error(f"--optimizers: must be among {', '.join(COUNTERPART)}, got {', '.join(unknown)}")
    for name in names:
        if library := missing_library(name):
            parser.error(f"--optimizers: {name} needs {library}, which is not installed. pip install .[peers] does it.")
    for name in ("seeds", "peer_seeds"):
        if getattr(arguments, name) < 2:
            option = name.replace("_", "-")
            parser.error(f"--{option}: an interval needs at least 2 seeds, got {getattr(arguments, name)}")
    for name in SIZES:
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}: must be at least 1, got {getattr(arguments, name)}")
    try:
        arguments.rates = [float(rate) for rate in arguments.rates.split(",")]
    except ValueError:
        parser.error(f"--rates: must be numbers with commas between, got {arguments.rates}")


def result_name(arguments: argparse.Namespace) -> str:
    """`parity`, `parity-long`, `parity-shift` or `parity-long-shift`."""
    return "parity" + ("-long" if arguments.long else "") + ("-shift" if arguments.shift else "")


def train(
    arguments: argparse.Namespace, name: str, rate: float, seed: int, text: Text, later: Text | None
) -> dict[str, Any]:
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
        rate=rate,
        end=arguments.end,
        min_8bit_size=arguments.min_8bit_size,
        later_text_sha256=later.sha256 if later else None,
    )
    folder = arguments.out / (f"seed-{seed}" if rate == 1 else f"seed-{seed}-rate-{rate:g}")
    finished = folder / f"{name}.json"
    if arguments.resume and finished.exists():
        figures: dict[str, Any] = json.loads(finished.read_text(encoding="utf-8"))
        require_same_settings(finished, figures["settings"], settings)
        return figures
    figures = Run(settings, text, folder, later).train(leave_bar=False)
    write_json(finished, figures)
    return figures


def confidence_interval(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation and the bounds of the mean's 95 % confidence interval."""
    from scipy.stats import t  # type: ignore[import-untyped]

    count = len(values)
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    half = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * deviation / count**0.5
    return {"mean": mean, "deviation": deviation, "lower": mean - half, "upper": mean + half}


def key(name: str, rate: float) -> str:
    """How a result names an optimizer at a multiple of its learning rate."""
    return name if rate == 1 else f"{name} x{rate:g}"


def compared(name: str, rate: float, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """An 8-bit optimizer against its counterpart: the losses by seed, and both intervals."""
    names = {"optimizer": key(name, rate), "counterpart": key(COUNTERPART[name], rate)}
    ours, theirs = ([run["validation_loss"] for run in runs[found]] for found in names.values())
    differences = [a / b - 1 for a, b in zip(ours, theirs)]
    return {**names, "relative_differences": differences, "relative_difference": confidence_interval(differences)}


def summary(name: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Losses of an optimizer at one learning rate, over the seeds."""
    return {
        "label": RECIPES[name].label,
        "learning_rate": runs[0]["learning_rate"],
        "weight_decay": RECIPES[name].weight_decay,
        "validation_losses": [run["validation_loss"] for run in runs],
        "validation_loss": confidence_interval([run["validation_loss"] for run in runs]),
        "training_losses": [run["training_loss"] for run in runs],
        "validation_curve": [
            {"step": points[0][0], **confidence_interval([loss for _, loss in points])}
            for points in zip(*(run["validation_curve"] for run in runs))
        ],
        "state_bytes_per_parameter": runs[0]["state_bytes_per_parameter"],
    }


def measure(arguments: argparse.Namespace, text: Text, later: Text | None) -> dict[str, Any]:
    asked = arguments.optimizers.split(",")
    names = list(dict.fromkeys(found for name in asked for found in (COUNTERPART[name], name)))
    seeds, rates = range(arguments.seeds), arguments.rates
    runs: dict[str, list[dict[str, Any]]] = {key(name, rate): [] for rate in rates for name in names}
    trainings = [
        (seed, rate, name)
        for seed in seeds
        for rate in rates
        for name in names
        if seed < arguments.peer_seeds or not name.startswith(PEERS)
    ]
    for seed, rate, name in tqdm(trainings, desc="trainings", unit="training"):
        runs[key(name, rate)].append(train(arguments, name, rate, seed, text, later))
    return {
        "peers": {library: version for library, version in peer_versions().items() if library in arguments.optimizers},
        "text": described(text),
        **({"later_text": described(later)} if later else {}),
        "parameters": next(iter(runs.values()))[0]["parameters"],
        "seeds": list(seeds),
        "confidence": CONFIDENCE,
        "optimizers": {key(name, rate): summary(name, runs[key(name, rate)]) for rate in rates for name in names},
        "pairs": [compared(name, rate, runs) for rate in rates for name in asked],
    }


def described(text: Text) -> dict[str, Any]:
    return {"name": text.name, "bytes": len(text.training) + len(text.validation), "sha256": text.sha256}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    head = provenance(vars(arguments))
    try:
        text = load_text(arguments.text, arguments.context)
        later = load_source(arguments.context) if arguments.shift else None
        result = {**head, **measure(arguments, text, later)}
    except (ValueError, OSError) as error:
        print(f"parity: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted. The same command with --resume continues.", file=sys.stderr)
        return 130
    publish(result_name(arguments), result, arguments, draw, render)
    return 0


if __name__ == "__main__":
    sys.exit(main())
