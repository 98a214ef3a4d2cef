"""What every experiment shares: where results go, who measured them, how to time fairly, how to print a table."""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "experiments" / "results"  # committed, the figures that the documents quote: written where --json asks
RUNS = ROOT / "experiments" / "runs"  # ignored by git: whatever a run leaves behind

_ISA_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512vbmi", "avx512_bf16", "asimd", "sve")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path` to write to; only a block that ends without an error replaces `path` by it.

    So `path` is always absent, the old file, or the new file in full, also after an interrupt or a power cut.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files private; a result is an ordinary file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes `content` to `path`, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def provenance(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Machine, software, commit and arguments: the head of every result file. Holds no path and no host name."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "machine": _machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **_commit(),
        "arguments": {key: value for key, value in arguments.items() if not isinstance(value, Path)},
    }


def _machine() -> dict[str, Any]:
    model, flags = platform.processor() or platform.machine(), ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            if key == "model name":
                model = value
            elif key in ("flags", "Features"):
                flags = value
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpu": model,
        "flags": [flag for flag in _ISA_FLAGS if flag in flags.split()],
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _commit() -> dict[str, Any]:
    """`commit`: outside a git checkout what OPTIM8_COMMIT says, or None. `dirty`: does a tracked file (no result,
    picture or prose) differ?"""

    def git(*arguments: str) -> str | None:
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
            return done.stdout.strip()
        return None

    changes = git(
        "status", "--porcelain", "--untracked-files=no", "--", ".", ":!experiments/results", ":!docs/figures", ":!*.md"
    )
    commit = git("rev-parse", "HEAD") or os.environ.get("OPTIM8_COMMIT")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def add_outputs(parser: argparse.ArgumentParser, name: str) -> None:
    """The options that an experiment with a picture has: `--quick`, `--json` and `--png`."""
    parser.add_argument("--quick", action="store_true", help="in small: shows that it runs, its figures say nothing")
    add_json(parser, name)
    parser.add_argument("--png", type=Path, default=RUNS / f"{name}.png", help="picture")


def add_json(parser: argparse.ArgumentParser, name: str) -> None:
    """The option `--json`, without which no run replaces what the documents quote (`json_path`)."""
    text = f"result file, by default in experiments/runs; the documents quote experiments/results/{name}.json"
    parser.add_argument("--json", type=Path, help=text)


def json_path(arguments: argparse.Namespace, name: str) -> Path:
    """Where the result goes: to `--json`, else to a file in runs, another one where `--quick`."""
    chosen: Path = arguments.json or RUNS / f"{name}{'-quick' if getattr(arguments, 'quick', False) else ''}.json"
    return chosen


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and number of the timings, in milliseconds."""
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return {
        "median_ms": 1e3 * statistics.median(ordered),
        "lower_quartile_ms": 1e3 * ordered[round(last * 0.25)],
        "upper_quartile_ms": 1e3 * ordered[round(last * 0.75)],
        "repeats": len(ordered),
    }


def time_interleaved(
    subjects: Mapping[str, Callable[[], object]], repeats: int, seconds_per_subject: float = 6.0
) -> dict[str, dict[str, Any]]:
    """Times the subjects in turn, one call each per round, so that a disturbance meets all of them alike.

    Each is called once before, unmeasured. One that would need longer than `seconds_per_subject` for `repeats` calls
    is called fewer times, at least 3; its `repeats` in the result says so. Gives `spread` per name.
    """
    allowed = {}
    for name, call in subjects.items():
        call()
        start = time.perf_counter()
        call()
        once = time.perf_counter() - start
        allowed[name] = max(3, min(repeats, int(seconds_per_subject / max(once, 1e-9))))
    timings: dict[str, list[float]] = {name: [] for name in subjects}
    for turn in range(repeats):
        for name, call in subjects.items():
            if turn < allowed[name]:
                start = time.perf_counter()
                call()
                timings[name].append(time.perf_counter() - start)
    return {name: spread(values) for name, values in timings.items()}


def origin(result: Mapping[str, Any]) -> str:
    """Where the figures of a result come from, in a line: machine, versions (the peers' too), commit and date."""
    machine = result["machine"]
    isa = f" ({result['isa']})" if "isa" in result else ""
    commit = (result["commit"] or "unknown")[:10] + (" with uncommitted changes" if result["dirty"] else "")
    peers = "".join(f", {library} {version}" for library, version in result.get("peers", {}).items())
    return (
        f"{machine['cpu']}{isa}, {machine['cores']} cores, torch {result['torch']}{peers}; commit {commit}, "
        f"{result['date'].split()[0]}."
    )


def not_measured(result: Mapping[str, Any]) -> str:
    """The subjects that a result has no figures for, and why; empty where it has all."""
    return " ".join(f"Not measured: {name} ({reason})." for name, reason in result["not_measured"].items())


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """An aligned Markdown table, first column to the left and the others to the right; reads well in a terminal too."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(3, *(len(row[i]) for row in [list(headers), *cells])) for i in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        padded = [cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths))]
        return "| " + " | ".join(padded) + " |"

    rule = "| " + " | ".join("-" * (w - 1) + ":" if i else "-" * w for i, w in enumerate(widths)) + " |"
    return "\n".join([line(headers), rule, *(line(row) for row in cells)])
