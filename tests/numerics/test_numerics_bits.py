"""The same bits from every instruction set and any number of threads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import child_environment

from optim8 import _native

HERE = Path(__file__).parent
THREADS = ("1", "2", "5")  # for one instruction set: how work is split is the same for all


def _run(isa: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = child_environment(OPTIM8_CPU_ISA=isa)
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, cwd=HERE)


@pytest.fixture(scope="module")
def hashes() -> dict[str, dict[str, dict[str, str]]]:
    """Instruction set -> threads -> case -> SHA-256 of the results, from one process per instruction set."""
    found = {}
    available = _native.cpu().isa_info()["available"]
    for isa in available:
        done = _run(isa, "bits_worker.py", *(THREADS if isa == available[-1] else THREADS[:1]))
        assert done.returncode == 0, f"{isa}: {done.stderr}"
        answer = json.loads(done.stdout)
        assert answer["used"] == isa, "OPTIM8_CPU_ISA is not honoured"
        found[isa] = answer["by_threads"]
    return found


def test_every_instruction_set_and_thread_count_gives_the_same_bits(
    hashes: dict[str, dict[str, dict[str, str]]],
) -> None:
    reference = hashes["scalar"]["1"]
    differing = [
        f"{isa}, {threads} threads: {case}"
        for isa, by_threads in hashes.items()
        for threads, table in by_threads.items()
        for case, digest in table.items()
        if digest != reference[case]
    ]
    assert not differing, "\n".join(["differ from scalar, 1 thread:", *differing])
    # Adam and AdamW are the same without weight decay; any other two cases that agree would mean a table too tame.
    told_apart = {(case.split()[0], digest) for case, digest in reference.items()}
    assert len(told_apart) == len(reference)


@pytest.mark.slow
def test_every_float32_pattern_has_the_same_code_everywhere() -> None:
    """2^30 patterns, signed and unsigned."""
    digests = {}
    for isa in _native.cpu().isa_info()["available"]:
        done = _run(isa, "bits_worker.py", "every-pattern")
        assert done.returncode == 0, f"{isa}: {done.stderr}"
        digests[isa] = done.stdout
    assert len(set(digests.values())) == 1, digests


@pytest.mark.parametrize("isa", ["sse9", "AVX2 "])
def test_an_unknown_instruction_set_is_an_error_that_names_the_choices(isa: str) -> None:
    done = _run(isa, "-c", "from optim8 import _native; _native.cpu()")
    assert done.returncode != 0
    assert "OPTIM8_CPU_ISA" in done.stderr
    assert isa in done.stderr
    assert "scalar" in done.stderr
