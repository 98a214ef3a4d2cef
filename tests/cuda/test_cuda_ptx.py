"""The PTX in the objects that become optim8._cuda, run by the interpreter of ptx, gives what csrc/cpu gives, bit for
bit. `make cuda-check` runs this once they are compiled, and names their folder in OPTIM8_CUDA_OBJECTS."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cases import EVERY

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (ROOT, ROOT / "tests", ROOT / "experiments")
sys.path.insert(0, str(ROOT / "tests" / "cuda"))
from ptx import link  # noqa: E402

pytestmark = pytest.mark.skipif(
    not os.environ.get("OPTIM8_CUDA_OBJECTS"), reason="needs the objects of `make cuda-check`, which runs it"
)


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ptx")
    link.ptx(folder)
    return folder


def compare(ptx: Path, kernels: str, approximation: str = "nearest") -> subprocess.CompletedProcess[str]:
    architectures = re.findall(r"\.sm_(\d+)", " ".join(path.name for path in ptx.iterdir()))
    if kernels == "step-columns" and not any(int(number) in link.COLUMNS for number in architectures):
        pytest.skip("needs PTX of compute capability 9 or 10, as of OPTIM8_CUDA_ARCHS=90+PTX")
    environment = {**os.environ, "OPTIM8_PTX": str(ptx), "OPTIM8_PTX_APPROXIMATION": approximation}
    environment["OPTIM8_PTX_LAUNCHES"] = str(ptx / "launches")
    command = [str(link.program()), kernels, "forward"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)


# Nothing may depend on how the hardware rounds its approximations: steps have them as low as PTX allows, and as high.
@pytest.mark.parametrize(
    "kernels, approximation",
    [
        *(("step", "low"), ("int8", "mixed"), ("step", "high"), ("blockwise", "mixed"), ("fourbit", "mixed")),
        ("step-columns", "mixed"),
    ],
)
def test_kernels_equal_those_of_the_cpu(ptx: Path, kernels: str, approximation: str) -> None:
    result = compare(ptx, kernels, approximation)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    compared = re.fullmatch(r"(\d+) values compared, 0 differ\n", result.stdout)
    assert compared is not None
    assert int(compared[1]) > 1_000_000
    launched = (ptx / "launches").read_text()
    assert "12step_columns" in launched or kernels != "step-columns"


def test_the_module_on_tensors_that_seem_to_be_on_gpus(ptx: Path) -> None:
    """Its host code too: launches, devices, streams, errors. See ptx_worker."""
    environment = {
        **os.environ,
        "OPTIM8_PTX": str(ptx),
        "PYTHONPATH": os.pathsep.join(map(str, FOLDERS)),
    }
    command = [sys.executable, str(ROOT / "tests/cuda/ptx_worker.py"), str(link.module())]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]
    checks = json.loads(run.stdout.splitlines()[-1])
    assert len(checks) > len(EVERY)
    assert [f"{name}: {problem}" for name, problem in checks.items() if problem] == []


FIRST_THREADS = r"(mov\.u32 (%r\d+), %tid\.x;\n)"
LEAVES = r"\g<1>setp.lt.u32 %p1, \g<2>, 5;\n@%p1 "  # what the first five of them do next
OF_THREADS = "setp.lt.u32 %p1, %tid.x, {};\n@%p1 "
VOTE = "vote.sync.any.pred %p1, %p1, -1;\n"
# What is replaced in the PTX of which source, with what, and what is said about it.
PLANTED = {
    "rounding": ("blockwise", r"add\.rm\.f32", "add.rn.f32", r"\d+ differ"),
    "table": ("blockwise", r"(signed_tablesE\[\d+\] = \{)51", r"\g<1>52", r"\d+ differ"),
    "shuffle": ("fourbit", r"shfl\.sync\.bfly", "shfl.sync.down", r"\d+ differ"),
    "mask": ("fourbit", r"(mov\.u32 %r\d+), -1;", r"\1, 65535;", "a lane is not in its own mask"),
    "sum": ("int8", r"dp4a\.s32\.s32 (%r\d+), (%r\d+), (%r\d+),", r"dp4a.s32.s32 \1, \2, \2,", r"\d+ differ"),
    "exit": ("blockwise", FIRST_THREADS, LEAVES + "ret;\n", "a mask names lanes that have ended"),
    "wait": (
        *("blockwise", FIRST_THREADS, LEAVES + f"bra $here;\n{VOTE}bra $there;\n$here:\n{VOTE}$there:\n"),
        "lanes wait for others that never come",
    ),
    "loop": ("int8", FIRST_THREADS, r"\g<1>$here:\nbra $here;\n", "a warp does not end"),
    "unknown": ("blockwise", r"add\.rm\.f32", "add.rp.f32", r"no instruction add\.rp\.f32 is known"),
    "register": ("int8", r"cvt\.rn\.bf16\.f32 %rs\d+", "cvt.rn.bf16.f32 %r1", "registers of this cvt.rn.bf16.f32"),
    "alignment": ("blockwise", r"(st\.global\.u16 \[%rd\d+\+)14\]", r"\g<1>15]", "is not a multiple of 2"),
    "overrun": ("blockwise", r"(st\.global\.u16 \[%rd\d+\+)14\]", r"\g<1>8206]", "writes memory that is not there"),
    "mark": ("step-columns", r"red\.shared\.or\.b32 [^;]*;\n", "", r"\d+ differ"),
    "column": ("step-columns", r"(ld\.shared\.f32 %f\d+, \[%r\d+)\]", r"\g<1>+-128]", r"\d+ differ"),
    "no barrier": ("step-columns", r"bar\.sync 0;\n", "", "reads shared memory that nobody wrote: ld.shared"),
    "lanes without": (
        *("step-columns", r"bar\.sync 0;\n", OF_THREADS.format(5) + "bra $here;\nbar.sync 0;\n$here:\n"),
        "lanes wait for others that never come",
    ),
    "lanes ended": (
        *("step-columns", r"bar\.sync 0;\n", OF_THREADS.format(5) + "ret;\nbar.sync 0;\n"),
        "step_columns.*lanes ended before a barrier",
    ),
    "warp without": (
        *("step-columns", r"bar\.sync 0;\n", OF_THREADS.format(32) + "ret;\nbar.sync 0;\n"),
        "step_columns.*not all warps come to the same barrier",
    ),
    "shared overrun": (
        *("step-columns", r"(st\.shared\.v4\.u32 \[%r\d+)\]", r"\g<1>+229376]"),
        "writes beyond the shared memory",
    ),
    "shared alignment": (
        *("step-columns", r"(ld\.shared\.v4\.u32 {[^}]*}, \[%r\d+)\]", r"\g<1>+4]"),
        "is not a multiple of 16: ld.shared",
    ),
    "parameters": ("int8", r"(ld\.param\.u64 %rd\d+, \[\w+_param_0\+)8\]", r"\g<1>800]", "reads beyond the parameters"),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_mistake_is_noticed(ptx: Path, planted: str, tmp_path: Path) -> None:
    kernels, pattern, replacement, message = PLANTED[planted]
    shutil.copytree(ptx, tmp_path / "ptx")
    sources = "step_rules.0" if kernels == "step-columns" else kernels  # that of the first rule
    (path,) = (tmp_path / "ptx").glob(f"{sources}.*.ptx")
    wrong, count = re.subn(pattern, replacement, path.read_text())
    assert count > 0
    path.write_text(wrong)
    result = compare(tmp_path / "ptx", kernels)
    assert result.returncode != 0
    assert re.search(message, result.stdout + result.stderr), result.stdout[-4000:] + result.stderr[-4000:]
