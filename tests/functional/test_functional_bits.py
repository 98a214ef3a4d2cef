"""The same bits from every instruction set and any number of threads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from support.processes import child_environment

from optim8 import _native

HERE = Path(__file__).parent


def test_every_instruction_set_and_thread_count_gives_the_same_bits() -> None:
    found: dict[str, dict[str, str]] = {}
    for isa in _native.cpu().isa_info()["available"]:
        environment = child_environment(OPTIM8_CPU_ISA=isa)
        command = [sys.executable, "functional_bits_worker.py"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE)
        assert done.returncode == 0, f"{isa}: {done.stderr}"
        found[isa] = json.loads(done.stdout)
    reference = found["scalar"]
    differing = [
        f"{isa}: {case}"
        for isa, table in found.items()
        for case, digest in table.items()
        if digest != reference[case.split(", ")[0] + ", 1 threads"]
    ]
    assert not differing, "\n".join(["differ from scalar, 1 thread:", *differing])
    single = [digest for case, digest in reference.items() if case.endswith("1 threads")]
    assert len(set(single)) == len(single)  # a table in which cases agree would be too tame
