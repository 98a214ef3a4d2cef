"""The kernels of csrc/cuda, run on the CPU over a shim, give what csrc/cpu gives, bit for bit; and the shim notices
what it is for. See cuda_on_cpu."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "cuda" / "cuda_on_cpu"))
import build  # noqa: E402

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # ThreadSanitizer of older compilers cannot live with much address randomization.
    still = [shutil.which("setarch") or "", "-R"] if "threads" in program.parts and shutil.which("setarch") else []
    return subprocess.run([*still, str(program), *arguments], capture_output=True, text=True, check=False, timeout=600)


KERNELS = ["step", "blockwise", "fourbit", "int8"]


# To compile the kernels with sanitizers takes minutes. The interpreter of PTX looks at every access of the kernel over
# columns.
@pytest.mark.parametrize(
    "kernels, sanitizer",
    [
        *[(kernels, "plain") for kernels in [*KERNELS, "step-columns"]],
        *[pytest.param(kernels, "memory", marks=pytest.mark.slow) for kernels in KERNELS],
    ],
)
def test_kernels_equal_those_of_the_cpu(kernels: str, sanitizer: str) -> None:
    """Forwards, backwards and at random, one block after the other."""
    result = run(build.program("compare", sanitizer), kernels, "in-turn")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    compared = re.fullmatch(r"(\d+) values compared, 0 differ\n", result.stdout)
    assert compared is not None
    assert int(compared[1]) > 1_000_000


def test_quick_numbers_are_exact_where_they_say_so() -> None:
    result = run(build.program("compare", "plain"), "quick", "forward")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]


@pytest.mark.slow
def test_a_step_long_enough_for_several_blocks_a_warp() -> None:
    result = run(build.program("compare", "plain"), "step-long", "forward")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]


def test_a_wrong_kernel_is_noticed(tmp_path: Path) -> None:
    """The comparison can fail: one code of a lane that is off by one."""
    source = (ROOT / "csrc/cuda/quantize.h").read_text()
    wrong = source.replace("normal.scale, normal.reciprocal);", "normal.scale, normal.reciprocal) ^ (k == 3);", 1)
    assert wrong != source
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda/quantize.h").write_text(wrong)
    build.program("compare", "plain")
    flags = [*build.FLAGS, f"-I{tmp_path}", f"-I{build.HERE / 'shim'}", f"-I{ROOT / 'csrc'}"]
    objects = [str(path) for _, path, _ in build.objects("compare", "plain") if path.name != "blockwise.cuda.o"]
    compiler = str(build.compiler())
    spoiled = str(tmp_path / "blockwise.o")
    kernels = str(ROOT / "csrc/cuda/blockwise.cu")
    subprocess.run([compiler, *flags, "-x", "c++", "-c", kernels, "-o", spoiled], check=True)
    subprocess.run([compiler, *objects, spoiled, "-o", str(tmp_path / "compare")], check=True)
    result = run(tmp_path / "compare", "blockwise", "forward")
    assert result.returncode == 1
    assert ": value" in result.stdout


PLANTED = [
    ("memory", "barrier_not_for_all", "waits at a barrier that"),
    ("memory", "overrun", "heap-buffer-overflow"),
    ("memory", "shared_overrun", "global-buffer-overflow|index 63 out of bounds"),
    ("memory", "misaligned_packet", "misaligned address"),
    ("memory", "mask_without_caller", "whose mask 0000ffff leaves it out"),
    ("memory", "mask_without_source", "reads lane 20, which mask 0000ffff leaves out"),
    ("memory", "mask_with_lanes_that_left", "which has ended|that never come"),
    ("memory", "masks_that_differ", "leaves it out|with another mask"),
    ("threads", "missing_barrier", "data race"),
]


@pytest.mark.parametrize("sanitizer, kernel, message", PLANTED, ids=lambda value: value if "_" in value else "")
def test_a_planted_mistake_is_noticed(sanitizer: str, kernel: str, message: str) -> None:
    result = run(build.program("planted", sanitizer), kernel)
    assert result.returncode != 0
    assert re.search(message, result.stderr), result.stderr


@pytest.mark.parametrize("sanitizer", ["memory", "threads"])
def test_a_right_kernel_is_not_blamed(sanitizer: str) -> None:
    result = run(build.program("planted", sanitizer), "right")
    assert (result.returncode, result.stderr) == (0, "")


def test_only_the_kernel_over_columns_could_have_races() -> None:
    """It alone has a barrier and shared memory. The shim runs its threads in several orders, and the interpreter of PTX
    (test_cuda_ptx.py) notices what is read before it is written; ThreadSanitizer takes no more than 8128 of them."""
    for path in (ROOT / "csrc/cuda").iterdir():
        found = re.findall(r"__shared__|__syncthreads|(?:load|store)_shared", path.read_text())
        assert not found or path.name in ("shared.h", "columns.h"), path.name
