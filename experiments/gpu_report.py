"""What only a machine with a GPU can show: `python experiments/gpu_report.py PART`, or all parts one after the other.

Parts, what is worth most first: build (installs the project here, without network), check (CPU and CUDA bit for bit),
measure (times beside device copy and the peers, and clocks meanwhile), sanitize (compute-sanitizer), test (the suite
on cuda). All of them end within --total seconds; what is not finished by then is ended and named in the result, what
is finished is kept. The result is written row by row: to --json, or without it to gpu-<name of the GPU>.json in $OUT,
or in experiments/runs. OPTIM8_PEERS names a folder of unpacked packages to measure against; OPTIM8_COMMIT the commit,
where this is no git checkout.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu.results import render, with_ratios
from shared.commands import FINISHED, Command, Deadline, Outcome, run_all
from shared.common import ROOT, add_json, json_path, provenance, write_json

TOTAL_SECONDS = 520.0
# Of what is left of the total, the most that each part takes.
SHARES = {"build": 0.6, "check": 0.3, "measure": 0.6, "sanitize": 0.35, "test": 1.0}
GRACE_SECONDS = 5.0  # of a part, to end what runs and to write
TESTS_AT_ONCE = 6
CHECKS_AT_ONCE = 4
PEER_SECONDS = 150.0  # for each; what one has not measured by then is left out
PROFILE, PROFILE_SECONDS, PROFILE_LINES = "ncu", 20.0, 200
LAST_LINES = 40  # of the output of what failed
NO_TESTS = 5  # what pytest returns for a file all of whose tests need an extra that is not installed
# With it `python -m gpu.check` finds the package.
PATHS = [str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", "")]
SCRIPTS = {"PYTHONPATH": os.pathsep.join(filter(None, PATHS))}

# These compile or install the project anew, or need no GPU and are run where there is none.
LEFT_OUT = ("test_install", "test_cuda_", "test_experiments_gpu")

# Only what kernels do counts as an error: torch itself makes calls that fail, such as asking whose a pointer is. With
# the allocator's cache every tensor would lie in a large block, in which no access beyond it is noticed.
SANITIZER = ("--error-exitcode", "9", "--report-api-errors", "no")
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


class Result:
    """The file that the parts add to. Written after each command, so that an interrupt loses only what runs."""

    def __init__(self, part: str, arguments: argparse.Namespace) -> None:
        name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
        out = os.environ.get("OUT") if arguments.json is None else None
        self.path = Path(out) / f"gpu-{name}.json" if out else json_path(arguments, f"gpu-{name}")
        self.part, self.start = part, time.perf_counter()
        self._head = provenance({"part": part, "quick": arguments.quick, "seconds": arguments.seconds})

    def save(self, ok: bool, complete: bool, **content: Any) -> bool:
        """Replace this part in the file; gives whether all of it was done, and done well."""
        known = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        state = {"ok": ok and complete, "complete": complete, "seconds": time.perf_counter() - self.start}
        known[self.part] = {**self._head, **state, **content}
        write_json(self.path, known)
        return ok and complete


def description(outcome: Outcome) -> dict[str, Any]:
    ok = outcome.returncode in (0, NO_TESTS)
    shown: dict[str, Any] = {"ok": ok, "state": outcome.state, "seconds": outcome.seconds}
    return shown if ok else {**shown, "returncode": outcome.returncode, "output": outcome.lines[-LAST_LINES:]}


def build(arguments: argparse.Namespace, deadline: Deadline) -> bool:
    result = Result("build", arguments)
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-v"]
    major, minor = torch.cuda.get_device_capability()
    only_here = {"OPTIM8_CUDA": "1", "OPTIM8_CUDA_ARCHS": f"{major}{minor}"}
    installed = Command("installed", [sys.executable, "-m", "optim8"])
    found = run_all([Command("install", [*pip, "--editable", "."], only_here), installed], deadline)
    if not found["install"].ok and deadline.left() > 0:  # an environment that cannot be written to, or has no pip
        found["not installed"] = found.pop("install")
        in_place = [sys.executable, "setup.py", "build_ext", "--inplace"]
        found |= run_all([Command("build in place", in_place, only_here), installed], deadline)
    needed = [outcome for name, outcome in found.items() if name != "not installed"]
    return result.save(
        all(outcome.ok for outcome in needed),
        all(outcome.state == FINISHED for outcome in needed),
        commands={name: description(outcome) for name, outcome in found.items()},
        installed=found["installed"].lines,
    )


def test_files() -> list[Path]:
    """First those whose tensors go to the device; the one that starts processes takes longest and begins."""
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if not path.name.startswith(LEFT_OUT)]

    def order(path: Path) -> tuple[bool, bool]:
        return path.stem != "test_distributed", "device: torch.device" not in path.read_text(encoding="utf-8")

    return sorted(files, key=order)


def test(arguments: argparse.Namespace, deadline: Deadline) -> bool:
    """The suite on cuda, a process for each file; test_distributed.py goes through NCCL."""
    result = Result("test", arguments)
    files = [path.resolve() for path in arguments.tests or test_files()]
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--device", "cuda", "-rfE", "--tb=short"]
    threads = {"OMP_NUM_THREADS": str(max(2, (os.cpu_count() or 1) // TESTS_AT_ONCE))}
    commands = [Command(path.stem, [*pytest, str(path)], threads) for path in files]
    found: dict[str, dict[str, Any]] = {}

    def done(name: str, outcome: Outcome) -> None:
        failed = [line for line in outcome.lines if re.match(r"(FAILED|ERROR) ", line)]
        found[name] = {**description(outcome), "summary": outcome.lines[-1] if outcome.lines else "", "failed": failed}
        unfinished = [command.name for command in commands if found.get(command.name, {}).get("state") != FINISHED]
        result.save(
            all(entry["ok"] for entry in found.values()),
            not unfinished,
            unfinished=unfinished,
            failed=[line for entry in found.values() for line in entry["failed"]],
            left_out=[f"tests/**/{prefix}*" for prefix in LEFT_OUT],
            nccl="tests/distributed/test_distributed.py: the scenarios of up to as many processes as there are GPUs, "
            f"{torch.cuda.device_count()}",
            files=found,
        )

    run_all(commands, deadline, TESTS_AT_ONCE, done)
    return len(found) == len(commands) and all(entry["ok"] for entry in found.values())


def sanitizer() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    return shutil.which("compute-sanitizer") or next(
        (str(path) for home in homes if home and (path := Path(home) / "bin/compute-sanitizer").exists()), None
    )


def rows_of(lines: Sequence[str]) -> list[dict[str, Any]]:
    """What a script printed as `ROW` and JSON, also if it was ended before its end."""
    return [json.loads(line[4:]) for line in lines if line.startswith("ROW {") and line.endswith("}")]


def compare(part: str, arguments: argparse.Namespace, deadline: Deadline, commands: Sequence[Command]) -> bool:
    result = Result(part, arguments)
    found: dict[str, dict[str, Any]] = {}

    def done(name: str, outcome: Outcome) -> None:
        found[name] = description(outcome)
        for row in rows_of(outcome.lines):
            found[name].update(row)
        unfinished = [command.name for command in commands if found.get(command.name, {}).get("state") != FINISHED]
        result.save(
            all(entry["ok"] for entry in found.values()),
            not unfinished,
            unfinished=unfinished,
            values=sum(entry.get("values", 0) for entry in found.values()),
            differing=[what for entry in found.values() for what in entry.get("differing", [])],
            commands=found,
        )

    run_all(commands, deadline, CHECKS_AT_ONCE, done)
    return len(found) == len(commands) and all(entry["ok"] for entry in found.values())


def check(arguments: argparse.Namespace, deadline: Deadline) -> bool:
    from gpu import check as checks

    script = [sys.executable, "-m", "gpu.check", *(["--quick"] if arguments.quick else [])]
    commands = [Command(name, [*script, name], SCRIPTS) for name in checks.COMPARISONS]
    return compare("check", arguments, deadline, commands)


def sanitize(arguments: argparse.Namespace, deadline: Deadline) -> bool:
    tool = sanitizer()
    if tool is None:
        return Result("sanitize", arguments).save(True, True, commands={}, not_run="compute-sanitizer is not here")
    script = [sys.executable, "-m", "gpu.check", "--quick", "kernels"]
    options = {**SCRIPTS, **UNCACHED}
    names = ("memcheck", "racecheck", "initcheck", "synccheck")
    commands = [Command(name, [tool, "--tool", name, *SANITIZER, *script], options) for name in names]
    return compare("sanitize", arguments, deadline, commands)


def measure(arguments: argparse.Namespace, deadline: Deadline) -> bool:
    from gpu import clocks
    from gpu import measure as measurements

    result = Result("measure", arguments)
    script = [sys.executable, "-m", "gpu.measure"]
    quick = ["--quick"] if arguments.quick else []
    measurements.add_peers()
    here = [name for name in measurements.PEERS if importlib.util.find_spec(name) is not None]
    peers = [Command(name, [*script, name, *quick], SCRIPTS, PEER_SECONDS) for name in here]
    # One at a time. Of the peers the one that compiles for minutes comes last.
    first = [Command(name, [*script, name, *quick], SCRIPTS) for name in ("copy", "ceiling", "steps", "launches")]
    paged = Command("paged", [sys.executable, "-m", "gpu.paged", *quick], SCRIPTS)
    rest = [Command(name, [*script, name, *quick], SCRIPTS) for name in ("functions", "rules")]
    own = [*first, *profiles(script, quick), paged, *rest]
    commands = [*own, *peers]
    found: dict[str, dict[str, Any]] = {}
    rows: list[dict[str, Any]] = [
        {"measurement": name, "subject": name, "error": "not installed, nor in OPTIM8_PEERS"}
        for name in measurements.PEERS
        if name not in here
    ]

    def save() -> None:
        unfinished = [command.name for command in commands if found.get(command.name, {}).get("state") != FINISHED]
        ok = all(found[command.name]["ok"] for command in own if command.name in found)
        more = {"clocks": watched.summary(), **with_ratios(rows)}
        result.save(ok, not unfinished, unfinished=unfinished, commands=found, **more)

    def heard(name: str, lines: Sequence[str]) -> None:
        fresh = rows_of(lines)
        rows.extend({"measurement": name, **row} for row in fresh)
        if fresh:
            save()

    def done(name: str, outcome: Outcome) -> None:
        found[name] = description(outcome)
        if name.startswith(PROFILE):
            found[name]["output"] = outcome.lines[-PROFILE_LINES:]
        save()

    with clocks.Watch() as watched:
        run_all(commands, deadline, done=done, heard=heard)
    print(render(with_ratios(rows)))
    return all(found[command.name]["ok"] for command in own)


def profiles(script: Sequence[str], quick: Sequence[str]) -> list[Command]:
    """A page of Nsight Compute for the step of each of these kernels, where it is here and may look at counters."""
    from gpu.measure import MAIN_KERNELS

    tool = shutil.which("ncu")
    if tool is None:
        return []
    look = [tool, "--set", "detailed", "--kernel-name", "regex:step_", "--launch-skip", "1", "--launch-count", "1"]
    return [
        Command(f"{PROFILE} {name}", [*look, *script, "one", *quick, "--kernel", name], SCRIPTS, PROFILE_SECONDS)
        for name in MAIN_KERNELS
    ]


PARTS: dict[str, Callable[[argparse.Namespace, Deadline], bool]] = {
    "build": build,
    "check": check,
    "measure": measure,
    "sanitize": sanitize,
    "test": test,
}


def missing() -> str | None:
    """Why the parts after `build` cannot run here yet, or None."""
    try:
        from optim8 import _native
    except ImportError:
        return "optim8 is not installed"
    here = Path(_native.__file__).resolve().parent
    if here != ROOT / "optim8":
        return f"the optim8 that is installed is not this tree's but that in {here}"
    return None if _native.cuda_or_none() is not None else "this tree's optim8._cuda is not built or does not load"


def run_part(command: Sequence[str], seconds: float) -> int:
    """Runs one part. Where this process is ended, or the part goes on beyond its seconds, the part is told, so that it
    ends what it started."""
    process = subprocess.Popen(command)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return 1
    finally:
        process.terminate()
        process.wait()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=list(PARTS), help="one part; all of them where it is left out")
    parser.add_argument("--quick", action="store_true", help="in small: shows that it runs, its figures say nothing")
    add_json(parser, "gpu-NAME")
    parser.add_argument("--total", type=float, default=TOTAL_SECONDS, help="seconds of all parts together")
    parser.add_argument("--seconds", type=float, help="of one part; by default --total")
    parser.add_argument("--tests", type=Path, nargs="+", help="files of the part test; by default all")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu_report: needs a CUDA device that torch sees, and sees none.", file=sys.stderr)
        return 4
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # unwinds: ends what was started
    if arguments.part not in (None, "build") and (why := missing()) is not None:
        print(f"gpu_report: {why}. Run the part `build` first.", file=sys.stderr)
        return 5
    if arguments.part is not None:
        seconds = arguments.total if arguments.seconds is None else arguments.seconds
        ok = PARTS[arguments.part](arguments, Deadline(seconds))
        print(f"{arguments.part}: {'done' if ok else 'not all is well, see the result file'}", flush=True)
        return 0 if ok else 1
    # Each in a process of its own: what `build` installs must be seen by the parts after it.
    given = sys.argv[1:] if argv is None else list(argv)
    script = [sys.executable, str(Path(__file__).resolve())]
    deadline, codes = Deadline(arguments.total), []
    for name, share in SHARES.items():
        seconds = max(0.0, share * deadline.left() - GRACE_SECONDS)
        codes.append(run_part([*script, name, *given, "--seconds", f"{seconds:.0f}"], seconds + GRACE_SECONDS))
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
