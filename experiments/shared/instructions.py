"""Counts the instructions that each kernel executes per value, under valgrind's callgrind.

Valgrind knows no AVX-512, so only the scalar and the AVX2 form can be counted, and on Arm the NEON one. One thread; the
count includes the Python of the call, which is under one instruction per value at the size used here.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from shared.common import ROOT

COUNT = 2**20
ISAS = ("scalar", "neon" if platform.machine() in ("aarch64", "arm64") else "avx2")


def count_instructions() -> dict[str, dict[str, float]]:
    """Instructions per value by instruction set and kernel ("name, dtype"); empty where there is no valgrind."""
    if shutil.which("valgrind") is None or shutil.which("callgrind_control") is None:
        return {}
    return {isa: _count(isa) for isa in ISAS}


def _count(isa: str) -> dict[str, float]:
    paths = os.pathsep.join(filter(None, [str(ROOT / "experiments"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "OPTIM8_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        tool = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/out"]
        done = subprocess.run(
            [*tool, sys.executable, "-m", "shared.instructions"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"count_instructions: the {isa} run under valgrind failed:\n{done.stderr[-2000:]}")
        totals = dict(_total(path) for path in sorted(Path(folder).glob("out.*")))
    return {name: total / COUNT for name, total in totals.items() if name}


def _total(dump: Path) -> tuple[str, int]:
    """Name and number of instructions of a dump; the one that callgrind writes at the end has no name."""
    text = dump.read_text(encoding="utf-8", errors="replace")
    name = re.search(r"^desc: Trigger: dump (.+)$", text, re.MULTILINE)
    total = re.search(r"^totals: (\d+)", text, re.MULTILINE)
    return name.group(1) if name else "", int(total.group(1)) if total else 0


def _worker() -> None:
    """Under valgrind: runs each kernel once with counting switched on, and has callgrind write a dump of its name."""
    import torch

    from shared.kernels import kernels

    def control(*arguments: str) -> None:
        subprocess.run(["callgrind_control", *arguments, str(os.getpid())], check=True, capture_output=True)

    for dtype in (torch.float32, torch.bfloat16):
        for kernel in kernels(COUNT, dtype):
            kernel.call()
            control("-i", "on")
            kernel.call()
            control("-i", "off")
            control("-d", f"{kernel.name}, {kernel.dtype}")


if __name__ == "__main__":
    _worker()
