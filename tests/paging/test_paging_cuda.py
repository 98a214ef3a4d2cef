"""State of CUDA parameters in memory of the host: bits, waits and refusals, with CUDA's kernels over a shim."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import child_environment

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cuda" / "cuda_on_cpu"))
import build


@pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")
def test_state_in_memory_of_the_host() -> None:
    """All checks of paging_cuda_worker.py, in a process of its own: it makes torch believe in a GPU."""
    command = [sys.executable, "paging_cuda_worker.py", str(build.module())]
    environment = child_environment()
    run = subprocess.run(
        command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert len(found) >= 33
    failed = {name: why for name, why in found.items() if why}
    assert not failed, "\n".join(f"{name}:\n{why}" for name, why in failed.items())
