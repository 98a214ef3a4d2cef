"""Renders the tables and the figures of the documents from the result files.

A document holds pairs of `<!-- table:NAME -->` and `<!-- /table -->`; what stands between them is made from
experiments/results/NAME.json, or from the several results that COMPARISONS names. A picture figures/NAME.png that a
document shows is drawn from the results that FIGURES names, unless it shows that already. `--check` changes nothing and
fails where a document or a picture says something else.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import activations
import arm_instructions
import bench_monitoring
import bf16
import bf16_movement
import comparison
import gpu_budget
import memory_choices
import memory_models
import memory_profile
import muon_share
import paged
import published
import quantization_error
import rarity.report
import roofline
import slow_state.report
import slow_state.spread
import small_gradients
import suite
from lm import parity_report
from lm.report import describe, draw_loss, results_table
from shared.common import RESULTS, ROOT, origin, plural, table
from shared.plotting import is_current, save
from shared.subjects import PEERS, REFERENCE, with_version

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = Mapping[str, Any]

FOLDER = ROOT / "docs" / "figures"
SHOWN = re.compile(r"!\[[^\]]*\]\((?:docs/)?figures/(?P<name>[^)]+)\.png\)")
MARKED = re.compile(r"(<!-- table:(?P<name>[\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def train_lm(result: Result) -> str:
    arguments, text = result["arguments"], result["text"]
    batch = arguments["batch"] * arguments["context"]
    return "\n\n".join(
        [
            results_table(result["runs"]),
            f"{result['model']['parameters'] / 1e6:.1f} M parameters, {result['model']['dtype']}; {arguments['steps']} "
            f"steps of {batch} bytes of {text['name']} ({text['bytes'] / 1e3:.0f} kB). Losses in nats per byte. Peak "
            f"memory: {result['memory']}. " + " ".join(f"{describe(check)}." for check in result["checks"]),
            origin(result),
        ]
    )


def bench_step(result: Result) -> str:
    """One row per case, dtype, number of threads and kind of state; one column per subject."""
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    subjects: dict[str, None] = {}
    for timing in result["timings"]:
        subject, _, variant = timing["subject"].partition(" min_8bit_size")
        case = f"{timing['case']}, 8-bit state" if variant else timing["case"]
        row = rows.setdefault((case, timing["dtype"], str(timing["threads"])), {})
        gigabytes = f"{timing['bytes_per_second'] / 1e9:.1f} GB/s"
        if subject == REFERENCE:
            row[subject] = f"{timing['median_ms']:.1f} ms ({gigabytes})"
        else:
            row[subject] = f"{timing['speed_ratio']:.2f} ({gigabytes})"
        subjects[subject] = None
    cells = [[*key, *(row.get(subject, "not measured") for subject in subjects)] for key, row in rows.items()]
    headers = ["case", "dtype", "threads", *(with_version(subject, result["peers"]) for subject in subjects)]
    return "\n\n".join(
        [
            table(headers, cells),
            f"{REFERENCE} in milliseconds, the others as how many times as fast. {absent(result)}".rstrip(),
            origin(result),
        ]
    )


def gpu_budget_table(result: Result) -> str:
    assumed, commit = result["assumed"], (result["commit"] or "unknown")[:10]
    copies = " and ".join(f"{rate / 1e12:.2f} TB/s ({card} SXM)" for card, rate in assumed["copy_bandwidth"].items())
    return (
        f"{gpu_budget.rows_table(result['kernels'])}\n\nNot measured. Counted from the machine code for sm_90; assumed "
        f"{assumed['multiprocessors']} multiprocessors at {assumed['clock'] / 1e9:.2f} GHz and a copy of "
        f"{copies}, and that {assumed['usable']:.0%} of a pipe's peak "
        f"can be reached; commit {commit}, {result['date'].split()[0]}."
    )


def bench_functional(result: Result) -> str:
    rows = [
        [
            timing["name"],
            str(timing["threads"]),
            f"{timing['optim8_timing']['median_ms']:.2f} ms",
            f"{timing['peer_timing']['median_ms']:.2f} ms",
            with_version(timing["peer"], result["peers"]),
            f"{timing['speed_ratio']:.2f}",
            "" if timing["of_copy"] is None else f"{timing['of_copy']:.0%}",
        ]
        for timing in result["timings"]
    ]
    headers = ["function", "threads", "optim8", "peer", "which", "ratio", "of a copy"]
    return f"{table(headers, rows)}\n\n{origin(result)}"


def absent(result: Result) -> str:
    """The peers that a result of `bench_step.py` says nothing of, and why."""
    reasons = {library: "left out, or not installed" for library in PEERS if library not in result["peers"]}
    return " ".join(f"Not measured: {name} ({why})." for name, why in {**reasons, **result["failed"]}.items())


def kernels(result: Result) -> str:
    parts = []
    for measured in result["measured"]:
        limits = ", ".join(f"{name} {limit / 1e9:.1f} GB/s" for name, limit in measured["limits"].items())
        parts += [
            f"{plural(measured['threads'], 'thread')}: {limits}.",
            roofline.rows_table(measured, result["instructions_per_value"]),
        ]
    return "\n\n".join([*parts, origin(result)])


TABLES: dict[str, Callable[[Result], str]] = {
    "train_lm": train_lm,
    "activations": activations.render,
    "bench_step": bench_step,
    "bench_functional": bench_functional,
    "bench_monitoring": bench_monitoring.render,
    "bf16": bf16.render,
    "bf16_movement": bf16_movement.render,
    "gpu_budget": gpu_budget_table,
    "instructions": arm_instructions.render,
    "long_run": slow_state.report.render,
    "roofline": kernels,
    "memory_choices": memory_choices.render,
    "memory_models": memory_models.render,
    "memory_profile": memory_profile.render,
    "muon_share": muon_share.render,
    "paged": paged.render,
    "parity": parity_report.render,
    "published": published.render,
    "quantization_error": quantization_error.render,
    "rare_updates": rarity.report.render,
    "small_gradients": small_gradients.render,
}

# Other tables of these results, of several, or of none: the results' names, and by what.
COMPARISONS: dict[str, tuple[tuple[str, ...], Callable[..., str]]] = {
    "optimizers": ((), suite.render),
    "memory_choices-bytes": (("memory_choices",), memory_choices.render_bytes),
    "long_run-16bit": (("long_run-16bit",), slow_state.report.render16),
    "steps": (("bench_step", "bench_step-avx2", "bench_step-peers"), comparison.steps),
    "suite": (("bench_step-suite",), comparison.suite),
    "spread": (("long_run",), slow_state.spread.render),
    "peers": (
        ("memory_profile", "bench_step-peers", "bench_step-avx2", "small_gradients", "long_run", "bf16_movement"),
        comparison.peers,
    ),
}

# The picture's name: the results it is drawn from, and by what.
FIGURES: dict[str, tuple[tuple[str, ...], Callable[..., Figure]]] = {
    "train_lm-loss": (("train_lm",), draw_loss),
    "bf16": (("bf16",), bf16.draw),
    "roofline": (("roofline",), roofline.draw),
    "long_run": (("long_run",), slow_state.report.draw),
    "long_run-spread": (("long_run",), slow_state.spread.draw),
    "memory_models": (("memory_models",), memory_models.draw),
    "memory_profile": (("memory_profile",), memory_profile.draw),
    "paged": (("paged",), paged.draw),
    "parity": (("parity",), parity_report.draw),
    "parity-long": (("parity-long",), parity_report.draw),
    "parity-long-shift": (("parity-long-shift",), parity_report.draw),
    "peers": (("long_run", "bf16_movement"), comparison.draw),
    "quantization_error": (("quantization_error",), quantization_error.draw),
    "rare_updates": (("rare_updates",), rarity.report.draw),
    "small_gradients": (("small_gradients",), small_gradients.draw),
}


def render(name: str, results: Path) -> str:
    """What stands between the marks of table `name`; `bench_step-avx2` is a `bench_step`."""
    if name in COMPARISONS:
        sources, renderer = COMPARISONS[name]
    elif name.partition("-")[0] in TABLES:
        sources, renderer = (name,), TABLES[name.partition("-")[0]]
    else:
        known = ", ".join([*TABLES, *COMPARISONS])
        raise ValueError(f"report: a table must be one of {known}, got {name}. Mend the mark.")
    paths = [results / f"{source}.json" for source in sources]
    if not all(path.exists() for path in paths):
        return "Not measured yet.\n"
    return renderer(*(json.loads(path.read_text(encoding="utf-8")) for path in paths)) + "\n"


def renew(document: str, results: Path) -> str:
    """`document` with the text between all marks renewed."""
    return MARKED.sub(lambda found: f"{found[1]}{render(found['name'], results)}{found[3]}", document)


def figure(name: str, results: Path) -> Figure:
    """The figure `name`, drawn from its results."""
    if name not in FIGURES:
        raise ValueError(f"report: a figure must be one of {', '.join(FIGURES)}, got {name}. Mend the link.")
    sources, draw = FIGURES[name]
    paths = [results / f"{source}.json" for source in sources]
    for path in paths:
        if not path.exists():
            raise ValueError(f"report: figure {name} needs {path.name}, which is not there. Run its script first.")
    return draw(*(json.loads(path.read_text(encoding="utf-8")) for path in paths))


def renew_documents(paths: Iterable[Path], results: Path, check: bool) -> list[str]:
    """Names of the documents that were out of date; renewed unless `check`."""
    stale = []
    for path in paths:
        before = path.read_text(encoding="utf-8")
        after = renew(before, results)
        if after != before:
            stale.append(path.name)
            if not check:
                path.write_text(after, encoding="utf-8")
    return stale


def renew_figures(paths: Iterable[Path], results: Path, folder: Path, check: bool) -> list[str]:
    """Names of the pictures in these documents that were out of date or missing; renewed unless `check`."""
    stale = []
    names = {found["name"] for path in paths for found in SHOWN.finditer(path.read_text(encoding="utf-8"))}
    for name in sorted(names):
        drawn = figure(name, results)
        picture = folder / f"{name}.png"
        if not is_current(drawn, picture):
            stale.append(picture.name)
            if not check:
                save(drawn, picture)
    return stale


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only tell whether every table and picture is up to date")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--figures", type=Path, default=FOLDER, help="folder of the pictures")
    parser.add_argument("documents", nargs="*", type=Path, help="by default README.md and docs/*.md")
    arguments = parser.parse_args()
    paths = arguments.documents or documents()
    try:
        stale = renew_documents(paths, arguments.results, arguments.check)
        stale += renew_figures(paths, arguments.results, arguments.figures, arguments.check)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if stale:
        what = "differs from the result files, run experiments/report.py" if arguments.check else "renewed"
        print(f"{', '.join(stale)}: {what}", file=sys.stderr if arguments.check else sys.stdout)
    return 1 if arguments.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
