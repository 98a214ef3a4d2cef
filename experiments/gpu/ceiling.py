"""What the memory allows a step: its accesses without its arithmetic (ceiling.cu), compiled here by nvcc."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from shared import sass

BLOCK = 256
FLAGS = (*sass.NVCC_FLAGS, "-shared", "-Xcompiler", "-fPIC")


def compile_ceiling(nvcc: str, arch: str, target: Path) -> None:
    """Raises RuntimeError with the compiler's words."""
    source = str(Path(__file__).with_suffix(".cu"))
    done = subprocess.run(
        [nvcc, *FLAGS, f"-arch={arch}", source, "-o", str(target)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"nvcc cannot compile {Path(source).name}: {done.stderr[-400:]}")


@functools.cache
def _function() -> Callable[..., int]:
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = shutil.which("nvcc") or (shutil.which("nvcc", path=str(Path(CUDA_HOME) / "bin")) if CUDA_HOME else None)
    if nvcc is None:
        raise RuntimeError("there is no nvcc on PATH or in CUDA_HOME")
    major, minor = torch.cuda.get_device_capability()
    with tempfile.TemporaryDirectory() as folder:  # what is loaded stays
        target = Path(folder) / "ceiling.so"
        compile_ceiling(nvcc, f"sm_{major}{minor}", target)
        found: Callable[..., int] = ctypes.CDLL(str(target)).optim8_ceiling
    return found


class Ceiling:
    """Buffers as of one step over `size` values, a multiple of 256, with `states` states in 8 bits.

    Calling it reads and writes `nbytes` bytes, and changes nothing.
    """

    def __init__(self, size: int, dtype: torch.dtype, states: int) -> None:
        self.param, self.grad = (torch.randn(size, device="cuda", dtype=dtype) for _ in range(2))
        self.codes = [torch.randint(256, (size,), device="cuda", dtype=torch.uint8) for _ in range(states)]
        self.absmax = [torch.rand(size // BLOCK, device="cuda") for _ in range(states)]
        self.states, self.blocks = states, size // BLOCK
        both = [self.param, *self.codes, *self.absmax]
        self.nbytes = self.grad.nbytes + 2 * sum(each.nbytes for each in both)
        self._run = _function()

    def __call__(self) -> None:
        arrays = [self.param, self.grad, self.codes[0], self.codes[-1], self.absmax[0], self.absmax[-1]]
        pointers = [ctypes.c_void_p(array.data_ptr()) for array in arrays]
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        width = self.param.element_size()
        error = self._run(width, self.states, *pointers, ctypes.c_int64(self.blocks), stream)
        if error:
            raise RuntimeError(f"the ceiling kernel was not launched: CUDA error {error}")
