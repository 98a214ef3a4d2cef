"""What experiments write: nothing for --help, and no run replaces a result that the documents quote unless told to."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
from experiments_harness import EXPERIMENTS, read

WORKERS = {"shared/instructions", "paged_proof"}  # started by another script, in a process of their own
SCRIPTS = sorted(
    {
        str(path.relative_to(EXPERIMENTS).with_suffix(""))
        for path in EXPERIMENTS.rglob("*.py")
        if "__main__" in path.read_text(encoding="utf-8")
    }
    - WORKERS
)

# One process for all: importing torch takes longer than all that is looked at here. What a script would start, fails.
HELP = """
import contextlib, io, os, runpy, subprocess, sys
import torch  # which may look for libraries of CUDA by a process of its own

def refuse(*arguments, **_):
    raise AssertionError(f"--help runs {arguments}")

subprocess.Popen = subprocess.run = refuse
folder, *names = sys.argv[1:]
sys.path.insert(0, folder)
for name in names:
    sys.argv = [name, "--help"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            runpy.run_path(f"{folder}/{name}.py", run_name="__main__")
        except SystemExit as end:
            assert not end.code, name
        else:
            raise AssertionError(f"{name} --help runs the experiment")
    assert printed.getvalue().startswith("usage: "), name
"""


def test_help_does_no_work() -> None:
    assert {"gpu_budget", "gpu/check", "bench_step", "paged", "report"} < set(SCRIPTS)
    done = subprocess.run([sys.executable, "-c", HELP, EXPERIMENTS, *SCRIPTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))


def test_results_are_replaced_only_where_json_says_so(scripts: None) -> None:
    from shared.common import RUNS, json_path

    assert json_path(argparse.Namespace(json=None, quick=False), "x") == RUNS / "x.json"
    assert json_path(argparse.Namespace(json=None, quick=True), "x") == RUNS / "x-quick.json"
    assert json_path(argparse.Namespace(json=Path("y.json"), quick=True), "x") == Path("y.json")
    for path in EXPERIMENTS.rglob("*.py"):
        if path.name not in ("common.py", "report.py"):
            assert "RESULTS" not in path.read_text(encoding="utf-8"), path.name


def test_the_budget_of_a_gpu_is_written_where_it_is_told(
    scripts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_budget
    from shared import common

    monkeypatch.setattr(gpu_budget.sass, "step_kernels", lambda *_: {})
    monkeypatch.setattr(common, "RUNS", tmp_path / "runs")
    gpu_budget.main([])
    gpu_budget.main(["--json", str(tmp_path / "asked.json")])
    assert read(tmp_path / "runs" / "gpu_budget.json")["measured"] is False
    assert read(tmp_path / "asked.json")["kernels"] == []
