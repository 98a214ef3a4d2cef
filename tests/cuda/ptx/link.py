"""Links the objects that nvcc made of csrc/cuda with the runtime and the interpreter of this folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path[:0] = [str(ROOT / "tests" / "cuda" / "cuda_on_cpu"), str(ROOT / "experiments")]
from shared import sass  # noqa: E402

import build as on_cpu  # noqa: E402

FOLDER = ROOT / "build" / "cuda_on_cpu" / "plain"  # whose objects are taken
# Compute capabilities for which csrc/cuda/step_columns.h has its kernel.
COLUMNS = range(90, 120)
FLAGS = ["-std=c++20", "-O2", "-march=native", *on_cpu.PIC]


def objects() -> list[Path]:
    """What setup.py linked into optim8._cuda; empty where `make cuda-check` did not name its folder."""
    folder = os.environ.get("OPTIM8_CUDA_OBJECTS")
    if not folder:
        return []
    plan = (Path(folder) / "build.ninja").read_text()
    (inputs,) = re.findall(r"^build \S*_cuda\S*\.so: link (.*)$", plan, re.MULTILINE)
    return [Path(path) for path in inputs.split()]


def is_kernel(path: Path) -> bool:
    return path.name.endswith(".cu.o")


def ptx(folder: Path) -> None:
    """Puts the PTX in the objects into files in this folder."""
    tools = sass.tool_folder()
    if tools is None:
        raise RuntimeError("needs cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    for path in filter(is_kernel, objects()):
        command = [str(tools / "cuobjdump"), "-xptx", "all", str(path)]
        subprocess.run(command, cwd=folder, capture_output=True, check=True)
    if not any(folder.iterdir()):
        raise RuntimeError("the objects have no PTX: an architecture of OPTIM8_CUDA_ARCHS must end in +PTX")


def parameter_bytes() -> dict[str, set[int]]:
    """What the machine code in the objects takes as parameters, by the names of kernels: for each architecture."""
    tools, found = sass.tool_folder(), dict[str, set[int]]()
    assert tools is not None  # else `ptx` would have said so
    of_kernel = re.compile(r"^\.nv\.info\.(\w+)$|EIATTR_CBANK_PARAM_SIZE\n.*\n\tValue:\t(0x[0-9a-f]+)", re.MULTILINE)
    for path in filter(is_kernel, objects()):
        dumped = subprocess.run(
            [str(tools / "cuobjdump"), "-elf", str(path)], capture_output=True, text=True, check=True
        )
        kernel = ""
        for name, size in of_kernel.findall(dumped.stdout):
            kernel = name or kernel
            if size:
                found.setdefault(kernel, set()).add(int(size, 16))
    return found


def _headers() -> Path:
    """The folder of CUDA's headers, which nvcc knows."""
    command = ["nvcc", "--dryrun", "-E", "-x", "cu", os.devnull]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    (top,) = re.findall(r"^#\$ TOP=(.*)$", run.stderr, re.MULTILINE)
    found = [*Path(top).glob("include/cuda_runtime_api.h"), *Path(top).glob("targets/*/include/cuda_runtime_api.h")]
    return found[0].parent.resolve()


def _runtime(*left_out: str) -> list[on_cpu.Object]:
    include = _headers()
    sources = [source for source in sorted(HERE.glob("*.cpp")) if source.name not in left_out]
    loops = {"arithmetic": ["-O3"]}  # over lanes
    return [
        (source, FOLDER / f"{source.stem}.ptx.o", [*FLAGS, *loops.get(source.stem, []), f"-isystem {include}"])
        for source in sources
    ]


def program() -> Path:
    """The comparison of cuda_on_cpu, with nvcc's kernels in the place of those over the shim."""
    compared = [path for path in on_cpu.objects("compare", "plain") if not path[1].name.endswith(".cuda.o")]
    return on_cpu.link(FOLDER / "compare_ptx", [*compared, *_runtime()], [], filter(is_kernel, objects()))


def module() -> Path:
    """The path of optim8._cuda of the same objects as the one for GPUs, with this runtime in the place of CUDA's."""
    return on_cpu.link(FOLDER / "ptx_cuda.so", _runtime("memory.cpp"), ["-shared"], objects())
