"""Renders the tables of the documents from the result files.

A document holds pairs of `<!-- table:NAME -->` and `<!-- /table -->`; what stands between them is made from
experiments/results/NAME.json. `--check` changes nothing and fails where a document says something else.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, origin, table
from lm.report import describe, results_table
from roofline import rows_table
from subjects import REFERENCE

Result = dict[str, Any]

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
    cells = [[*key, *(row.get(subject, "") for subject in subjects)] for key, row in rows.items()]
    return f"{table(['case', 'dtype', 'threads', *subjects], cells)}\n\n{origin(result)}"


def bench_functional(result: Result) -> str:
    rows = [
        [
            timing["name"],
            str(timing["threads"]),
            f"{timing['optim8_timing']['median_ms']:.2f} ms",
            f"{timing['peer_timing']['median_ms']:.2f} ms",
            timing["peer"],
            f"{timing['speed_ratio']:.2f}",
        ]
        for timing in result["timings"]
    ]
    return f"{table(['function', 'threads', 'optim8', 'peer', 'which', 'ratio'], rows)}\n\n{origin(result)}"


def roofline(result: Result) -> str:
    parts = []
    for measured in result["measured"]:
        limits = ", ".join(f"{name} {limit / 1e9:.1f} GB/s" for name, limit in measured["limits"].items())
        parts += [
            f"{measured['threads']} thread{'s'[: measured['threads'] > 1]}: {limits}.",
            rows_table(measured, result["instructions_per_value"]),
        ]
    return "\n\n".join([*parts, origin(result)])


RENDERERS: dict[str, Callable[[Result], str]] = {
    "train_lm": train_lm,
    "bench_step": bench_step,
    "bench_functional": bench_functional,
    "roofline": roofline,
}


def render(name: str, results: Path) -> str:
    """What stands between the marks of table `name`, nothing without a result; `bench_step-avx2` is a `bench_step`."""
    renderer = RENDERERS.get(name.partition("-")[0])
    if renderer is None:
        raise ValueError(f"report: a table must be one of {', '.join(RENDERERS)}, got {name}. Mend the mark.")
    path = results / f"{name}.json"
    return renderer(json.loads(path.read_text(encoding="utf-8"))) + "\n" if path.exists() else ""


def rendered(document: str, results: Path) -> str:
    """`document` with the text between all marks renewed."""
    return MARKED.sub(lambda found: f"{found[1]}{render(found['name'], results)}{found[3]}", document)


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only tell whether every table is up to date")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("documents", nargs="*", type=Path, help="by default README.md and docs/*.md")
    arguments = parser.parse_args()
    stale = []
    for path in arguments.documents or documents():
        before = path.read_text(encoding="utf-8")
        after = rendered(before, arguments.results)
        if after != before:
            stale.append(path.name)
            if not arguments.check:
                path.write_text(after, encoding="utf-8")
    if stale:
        what = "differs from the result files, run experiments/report.py" if arguments.check else "renewed"
        print(f"{', '.join(stale)}: {what}", file=sys.stderr if arguments.check else sys.stdout)
    return 1 if arguments.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
