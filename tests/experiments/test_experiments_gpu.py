"""The GPU report where there is no GPU: its parts run in small with the CPU posing as one, and keep to their limit."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import EVERY
from experiments_harness import EXPERIMENTS, read

TESTS = Path(__file__).resolve().parents[1]
FAKE = TESTS / "cuda" / "fake_cuda"

# Leaves a child behind that holds the output open, as a test that starts processes does.
SILENT = "sleep 1000 & echo begun; sleep 1000"


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    from shared import commands

    return commands


def shell(code: str) -> list[str]:
    """A command that begins at once, on a busy machine too."""
    return ["sh", "-c", code]


def test_this_process_has_no_fake_gpu() -> None:
    """Which it gets when a run that reads docstrings imports every file here."""
    assert torch.cuda.Event.__module__ == "torch.cuda.streams"


def left_of(group: int) -> list[str]:
    """Processes of a group that still run a moment later; not those that only wait to be reaped."""
    deadline = time.monotonic() + 20
    while True:
        listed = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout
        rows = [line.split(maxsplit=2) for line in listed.splitlines()]
        left = [" ".join(row) for row in rows if row[0] == str(group) and not row[1].startswith("Z")]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def test_what_is_silent_is_ended_with_its_children_and_the_rest_is_kept(commands: ModuleType) -> None:
    told: list[str] = []
    listed = [
        commands.Command("first", shell("echo one; exit 3")),
        commands.Command("silent", shell(f"echo $$; {SILENT}")),
        commands.Command("never", shell("echo two")),
    ]
    found = commands.run_all(listed, commands.Deadline(3), done=lambda name, outcome: told.append(name))
    assert told == ["first", "silent", "never"]
    assert [outcome.state for outcome in found.values()] == [commands.FINISHED, commands.ENDED, commands.NOT_STARTED]
    assert [outcome.returncode for outcome in found.values()] == [3, None, None]
    assert found["first"].lines == ["one"]
    assert found["silent"].lines[1:] == ["begun"]
    assert left_of(int(found["silent"].lines[0])) == []


def test_a_limit_of_its_own_leaves_time_for_others(commands: ModuleType) -> None:
    listed = [
        commands.Command("silent", shell(SILENT), seconds=1),
        commands.Command("other", shell("echo two")),
    ]
    found = commands.run_all(listed, commands.Deadline(100))
    assert found["silent"].state == commands.ENDED
    assert found["other"].ok


def report(*arguments: object, seconds: float = 300) -> tuple[int, str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FAKE), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(EXPERIMENTS / "gpu_report.py"), *map(str, arguments)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=seconds,
        env={**environment, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def part(path: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = read(path)[name]
    return found


def test_check_compares_all_and_names_what_failed(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    returncode, printed = report("check", "--quick", "--json", path)
    found = part(path, "check")
    states = {name: entry["ok"] for name, entry in found["commands"].items()}
    # No CPU poses as a CUDA graph: the one that fails is named with its last words, the others are kept.
    good = ["steps", "scaler", "streams", "large", "huge", "functions", "matrices", "roots", "quotients"]
    assert states == {**dict.fromkeys(good, True), "graph": False}, printed
    assert returncode == 1
    assert found["complete"]
    assert not found["ok"]
    assert "CUDAGraph" in found["commands"]["graph"]["output"][-1]
    assert found["values"] > 1e5
    assert found["differing"] == []


# Errors of calls that torch itself makes do not count, and every tensor is an allocation of its own.
SANITIZER = """#!/bin/sh
case "$*" in *"--report-api-errors no"*) ;; *) exit 8 ;; esac
[ "$PYTORCH_NO_CUDA_MEMORY_CACHING" = 1 ] || exit 7
[ "$2" = racecheck ] && exit 9
shift 6
exec "$@"
"""


def test_kernels_run_under_each_tool_of_the_sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("OUT", str(tmp_path))
    returncode, printed = report("sanitize", "--quick")
    assert returncode == 1
    found = part(tmp_path / "gpu-fake-gpu.json", "sanitize")
    states = {name: entry["ok"] for name, entry in found["commands"].items()}
    assert states == {"memcheck": True, "racecheck": False, "initcheck": True, "synccheck": True}, printed
    assert found["commands"]["racecheck"]["returncode"] == 9


def test_the_commit_of_a_copy_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    from shared import common

    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.delenv("OPTIM8_COMMIT", raising=False)
    assert common.provenance({})["commit"] is None
    monkeypatch.setenv("OPTIM8_COMMIT", "0123456789")
    assert common.provenance({})["commit"] == "0123456789"


def test_rows_are_heard_while_a_command_runs(commands: ModuleType) -> None:
    told: list[tuple[str, str]] = []

    def heard(name: str, lines: list[str]) -> None:
        told.extend((name, line) for line in lines)

    def done(name: str, outcome: Any) -> None:
        told.append((name, "end"))

    listed = [commands.Command("slow", shell("echo one; sleep 2; echo two")), commands.Command("next", shell("echo"))]
    commands.run_all(listed, commands.Deadline(60), done=done, heard=heard)
    assert told == [("slow", "one"), ("slow", "two"), ("slow", "end"), ("next", ""), ("next", "end")]
    told.clear()
    commands.run_all([commands.Command("endless", shell("echo one; sleep 1000"))], commands.Deadline(5), heard=heard)
    assert told == [("endless", "one")]


def test_measure_gives_shares_and_ratios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "gpu.json"
    # It counts up to 1410 MHz, and has a profiler that does not profile.
    for name, lines in {
        "nvidia-smi": "echo 1000, 2619, 300.5, 40; echo 1410, 2619, [N/A], 41; echo 1410, 2619, 310.5, 42; sleep 1000",
        "ncu": 'while [ "$1" != "-m" ]; do shift; done; echo "page of $*"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    returncode, printed = report("measure", "--quick", "--json", path)
    assert returncode == 0, printed
    found = part(path, "measure")
    assert [name for name, entry in found["commands"].items() if not entry["ok"]] == []
    steps = {(row["workload"], row["dtype"], row["subject"]): row for row in found["steps"] if "workload" in row}
    for (workload, dtype, subject), row in steps.items():
        if "ms" in row:
            assert row["times"] == pytest.approx(row["ms"] / steps[workload, dtype, "optim8 AdamW8bit"]["ms"]), subject
            assert row["of_copy"] == pytest.approx(row["bytes_per_second"] / found["copy_bytes_per_second"])
    ours = [row for row in steps.values() if row["subject"].startswith(("optim8", "torch "))]
    # Those of tensors of any shape, and AdamW in 16 bits; torch's two; where tensors are small, ours also in 8 bits.
    count = len([case for case in EVERY if "use_muon" not in case.always]) + 1
    assert len(ours) == 2 * (2 * (count + 2) + (2 * count + 2))
    assert [row for row in ours if "error" in row] == []
    missing = {row["subject"] for row in found["steps"] if "not installed" in row.get("error", "")}
    assert missing == {"bitsandbytes", "torchao", "flashoptim"}
    # AdamW and Lion are measured before other rules, functions and pages of a profiler.
    order = list(found["commands"])
    assert order[:4] == ["copy", "ceiling", "steps", "launches"]
    assert order.index("rules") > order.index("paged")
    assert (
        "page of -m gpu.measure one --quick --kernel Lion8bit bfloat16"
        in found["commands"]["ncu Lion8bit bfloat16"]["output"]
    )
    assert found["clocks"]["samples"] == 2  # a field that is not told
    assert found["clocks"]["sm_mhz"] == [1000, 1205, 1410]
    # It needs a GPU that is one, and says what is missing; what else is measured stays.
    assert ["error" in row for row in found["ceiling"]] == [True] * 4
    launches = {row["subject"]: row for row in found["launches"]}
    assert launches["step of 64 tensors of a block"]["host_ms"] > 0
    subjects = {row["subject"]: row for row in found["paged"]}
    for dtype in ("float32", "bfloat16"):
        for share in ("0%", "50%", "100%"):
            assert subjects[f"{share} paged, {dtype}"]["ms"] > 0
        assert subjects[f"100% paged, through copies, {dtype}"]["of_link"] > 0
        assert subjects[f"100% paged, through copies, {dtype}"]["state_came_back"]
    trainings = [row for name, row in subjects.items() if name.startswith("training")]
    assert len(trainings) == 2
    assert all(row["learns"] for row in trainings)
    assert "blockwise 256 float32" in printed


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_ceiling_has_the_accesses_of_a_step(arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By packets, and nothing is left out."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    from gpu import ceiling
    from shared import sass

    ceiling.compile_ceiling("nvcc", arch, tmp_path / "ceiling.so")
    ctypes.CDLL(str(tmp_path / "ceiling.so")).optim8_ceiling  # noqa: B018 - it loads without a GPU
    if sass.tool_folder() is None:
        pytest.skip("needs cuobjdump and nvdisasm")
    kernels = sass.kernels_of(EXPERIMENTS / "gpu" / "ceiling.cu", arch, tmp_path)
    assert len(kernels) == 4
    for name, kernel in kernels.items():
        states, wide = (2 if ", 2>" in name else 1), "<float" in name
        # Eight values a lane: two packets of 16 bytes in float32 and one in bfloat16; two words of codes.
        assert kernel.count(r"LDG\..*\.128") == (4 if wide else 2), name
        assert kernel.count(r"STG\..*\.128") == (2 if wide else 1), name
        assert kernel.count(r"LDG") == (4 if wide else 2) + states * ((2 if wide else 1) + 1), name
        assert kernel.count(r"STG") == (2 if wide else 1) + states * ((2 if wide else 1) + 1), name
        assert kernel.count(r"(LDL|STL)\b") == 0


def test_all_parts_together_keep_to_the_total(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that takes all that it may leaves time for those after it, in order of value."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import gpu_report

    assert list(gpu_report.SHARES) == list(gpu_report.PARTS) == ["build", "check", "measure", "sanitize", "test"]
    ran: list[tuple[str, float]] = []
    now = 0.0

    def run_part(command: list[str], seconds: float) -> int:
        nonlocal now
        limit = float(command[-1])
        assert seconds >= limit
        ran.append((command[2], limit))
        now += seconds
        return int(command[2] == "check")

    monkeypatch.setattr(gpu_report, "run_part", run_part)
    monkeypatch.setattr("shared.commands.time.monotonic", lambda: now)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu_report.main(["--total", "520", "--quick"]) == 1
    assert [name for name, _ in ran] == list(gpu_report.PARTS)
    assert now <= 520
    limits = dict(ran)
    assert limits["build"] > 200
    assert limits["check"] > 40
    assert limits["measure"] > 70
    assert min(limits.values()) > 10


def test_a_part_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import gpu_report

    begin = time.monotonic()
    assert gpu_report.run_part(["sleep", "1000"], 0.5) == 1
    assert gpu_report.run_part(["sh", "-c", "exit 3"], 100) == 3
    assert time.monotonic() - begin < 60


def test_tests_run_by_file_and_what_is_not_finished_is_named(tmp_path: Path) -> None:
    files = {
        "test_good.py": "def test_device(request):\n    assert request.config.getoption('--device') == 'cuda'\n",
        "test_bad.py": "def test_it():\n    assert 1 == 2\n",
        "test_endless.py": "import time\n\ndef test_it():\n    time.sleep(1000)\n",
    }
    (tmp_path / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    path = tmp_path / "gpu.json"
    returncode, printed = report(
        "test", "--seconds", 30, "--json", path, "--tests", *[tmp_path / name for name in files]
    )
    assert returncode == 1
    found = part(path, "test")
    assert not found["complete"]
    assert found["unfinished"] == ["test_endless"]
    assert found["files"]["test_good"]["ok"], printed
    assert "1 passed" in found["files"]["test_good"]["summary"]
    assert ["test_bad.py::test_it" in line for line in found["failed"]] == [True]
    assert found["files"]["test_endless"]["state"] == "ended at the limit"


def test_the_whole_suite_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import gpu_report

    names = [path.stem for path in gpu_report.test_files()]
    assert names[0] == "test_distributed"
    assert {"test_memory_plan", "test_monitor", "test_paging_step", "test_optim_step", "test_layers"} <= set(names)
    assert names.index("test_optim_step") < names.index("test_layers")
    assert not [name for name in names if name.startswith(gpu_report.LEFT_OUT)]


def test_a_part_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import gpu_report

    from optim8 import _native

    monkeypatch.setitem(_native._modules, "_cuda", None)
    assert gpu_report.missing() == "this tree's optim8._cuda is not built or does not load"
    monkeypatch.setitem(_native._modules, "_cuda", _native.cpu())
    assert gpu_report.missing() is None
    monkeypatch.setattr(_native, "__file__", "/elsewhere/optim8/_native.py")
    assert "not this tree's but that in /elsewhere/optim8" in gpu_report.missing()


def test_an_interrupt_ends_what_runs(tmp_path: Path) -> None:
    (tmp_path / "test_endless.py").write_text(
        "import os, pathlib, time\n\ndef test_it():\n"
        f"    pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n    time.sleep(1000)\n"
    )
    (tmp_path / "conftest.py").write_text("def pytest_addoption(parser):\n    parser.addoption('--device')\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FAKE), os.environ.get("PYTHONPATH", "")])}
    script = [sys.executable, str(EXPERIMENTS / "gpu_report.py"), "test", "--json", str(tmp_path / "gpu.json")]
    process = subprocess.Popen(
        [*script, "--tests", str(tmp_path / "test_endless.py")], env=environment, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert left_of(int((tmp_path / "pid").read_text())) == []
