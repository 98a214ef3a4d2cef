"""The only importer of the compiled modules. Says what to do when one is missing."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch  # first, so that the modules share its OpenMP runtime

__all__ = [
    "cpu",
    "cpu_or_none",
    "cuda_or_none",
    "module_for",
    "threads",
]

_modules: dict[str, ModuleType | None] = {}
_causes: dict[str, str] = {}


def _load(name: str) -> ModuleType | None:
    if name not in _modules:
        try:
            _modules[name] = importlib.import_module(f"optim8.{name}")
        except ImportError as error:  # not built, built for another machine, or OPTIM8_CPU_ISA names what is not here
            _modules[name], _causes[name] = None, str(error).rstrip(".")
    return _modules[name]


def cpu_or_none() -> ModuleType | None:
    """The module of CPU kernels, or None where it was not built or does not load."""
    return _load("_cpu")


def cuda_or_none() -> ModuleType | None:
    """The module of CUDA kernels, or None where it was not built or does not load."""
    return _load("_cuda")


def cpu() -> ModuleType:
    """The module of CPU kernels.

    Raises:
        ImportError: it was not built or does not load; the message says why, and what to do.
    """
    module = cpu_or_none()
    if module is None:
        raise ImportError(
            f"optim8 needs its compiled module optim8._cpu, which is missing or does not load: {_causes['_cpu']}. "
            "Unless that says what to do, build it anew: `pip install .` in the source tree, or `make env`."
        )
    return module


def module_for(device: torch.device, who: str) -> ModuleType:
    """The kernels for tensors on `device`; the one place where a device chooses code.

    Raises:
        ValueError: there are none for such a device.
        ImportError: they were not built or do not load.
    """
    if device.type == "cpu":
        return cpu()
    if device.type == "cuda":
        module = cuda_or_none()
        if module is None:
            raise ImportError(
                f"{who}: CUDA tensors need the compiled module optim8._cuda, which is missing or does not load: "
                f"{_causes['_cuda']}. "
                "Reinstall with nvcc on the PATH (OPTIM8_CUDA=1 makes that a condition), or use CPU tensors."
            )
        return module
    raise ValueError(f"{who}: tensors must be on cpu or cuda, got one on {device}. Move it with .to('cpu').")


def threads() -> int:
    """The number of threads that kernels on the CPU use: torch's."""
    return torch.get_num_threads()
