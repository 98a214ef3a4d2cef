"""Trains the same small GPT with several optimizers, from the same start on the same batches, and compares them.

Each optimizer trains in a process of its own, so that its peak memory is its own. `--resume` continues what an
interrupted run left: finished optimizers keep their figures, the others go on from their checkpoint, saved half way.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from lm import memory
from lm.data import Text, load_text
from lm.optimizers import RECIPES
from lm.report import checks, describe, draw_loss, draw_memory, results_table
from lm.train import Run, Settings, checkpoint_path, require_same_settings
from shared.common import RUNS, provenance, write_json
from shared.plotting import save


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--optimizers", default="adamw,adamw8bit,lion8bit", help=f"some of {','.join(RECIPES)}")
    parser.add_argument("--text", type=Path, help="file to train on; without it, Python's language reference")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8, help="sequences per step")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--context", type=int, default=64, help="bytes per sequence")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the parameters")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RUNS / "train_lm", help="folder for everything the run writes")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument("--json", type=Path, help="write the result to this file too")
    parser.add_argument("--one", choices=tuple(RECIPES), help=argparse.SUPPRESS)  # the child process of one optimizer
    arguments = parser.parse_args()
    unknown = [name for name in arguments.optimizers.split(",") if name not in RECIPES]
    if unknown:
        parser.error(f"--optimizers: must be among {', '.join(RECIPES)}, got {', '.join(unknown)}")
    for name in ("steps", "batch", "layers", "heads", "width", "context", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}: must be at least 1, got {getattr(arguments, name)}")
    return arguments


def settings_of(arguments: argparse.Namespace, optimizer: str, text: Text) -> Settings:
    names = ("steps", "batch", "layers", "heads", "width", "context", "dtype", "seed", "device", "threads")
    return Settings(optimizer=optimizer, text_sha256=text.sha256, **{name: getattr(arguments, name) for name in names})


def figures_path(out: Path, optimizer: str) -> Path:
    return out / f"{optimizer}.json"


def train_one(arguments: argparse.Namespace, optimizer: str, text: Text) -> None:
    """In the child process: trains with one optimizer and writes its figures."""
    run = Run(settings_of(arguments, optimizer, text), text, arguments.out)
    checkpoint = checkpoint_path(arguments.out, optimizer)
    if arguments.resume and checkpoint.exists():
        run.load(checkpoint)
    write_json(figures_path(arguments.out, optimizer), run.train())


def train_in_child(arguments: argparse.Namespace, optimizer: str, text: Text) -> dict[str, Any]:
    """Figures of one optimizer: those of a finished run that is resumed, or of a new process."""
    finished = figures_path(arguments.out, optimizer)
    if not arguments.resume:
        finished.unlink(missing_ok=True)
        checkpoint_path(arguments.out, optimizer).unlink(missing_ok=True)
    if not finished.exists():
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--one", optimizer], check=True)
    figures: dict[str, Any] = json.loads(finished.read_text(encoding="utf-8"))
    require_same_settings(finished, figures["settings"], settings_of(arguments, optimizer, text))
    return figures


def compare(arguments: argparse.Namespace, text: Text) -> bool:
    """Trains with every optimizer, writes and prints the comparison; False where a check failed."""
    head = provenance(vars(arguments))
    runs = {name: train_in_child(arguments, name, text) for name in arguments.optimizers.split(",")}
    first = next(iter(runs.values()))
    result = {
        **head,
        "text": {"name": text.name, "bytes": len(text.training) + len(text.validation), "sha256": text.sha256},
        "model": {"parameters": first["parameters"], "dtype": arguments.dtype},
        "memory": memory.MEANING[torch.device(arguments.device).type],
        "checks": checks(runs),
        "runs": runs,
    }
    written = [arguments.out / "result.json", *([arguments.json] if arguments.json else [])]
    for path in written:
        write_json(path, result)
    pictures = [arguments.out / "loss.png", arguments.out / "memory.png"]
    for picture, draw in zip(pictures, (draw_loss, draw_memory)):
        save(draw(result), picture)
    print(f"\n{first['parameters']:,} parameters, {arguments.dtype}, {arguments.steps} steps, text {text.name}\n")
    print(results_table(runs))
    print(f"\nLosses in nats per byte. Peak memory: {result['memory']}.")
    for check in result["checks"]:
        print(describe(check))
    print("Written: " + ", ".join(str(path) for path in [*written, *pictures]))
    print(f"Curves: tensorboard --logdir {arguments.out / 'tensorboard'}")
    return all(check["passed"] is not False for check in result["checks"])


def main() -> int:
    arguments = parse_arguments()
    try:
        text = load_text(arguments.text, arguments.context)
        if arguments.one:
            train_one(arguments, arguments.one, text)
            return 0
        return 0 if compare(arguments, text) else 1
    except (ValueError, OSError, ImportError) as error:
        print(f"train_lm: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:  # the child has said why
        return error.returncode if error.returncode > 0 else 1
    except KeyboardInterrupt:
        if not arguments.one:
            print("\nInterrupted. The same command with --resume continues.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
