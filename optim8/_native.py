"""The only importer of the compiled modules. Says what to do when one is missing."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from functools import partial
from types import ModuleType
from typing import Any

import torch  # first, so that the modules share its OpenMP runtime

__all__ = [
    "check_not_capturing",
    "cpu",
    "cpu_or_none",
    "cuda_or_none",
    "mark_stepped",
    "module_for",
    "run_step",
    "steps_elsewhere",
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


def check_not_capturing(who: str, params: Iterable[torch.Tensor]) -> None:
    """Raise RuntimeError where a CUDA graph captures a step that first makes or moves state of `params`: every replay
    would do that again, and begin with the state of that moment."""
    if any(param.is_cuda for param in params) and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{who}: a step that a CUDA graph captures needs state that is there already. "
            "Make a step with capturable=True before the capture."
        )


def mark_stepped(table: Any) -> None:
    """As an in-place operation of torch does: a graph that saved a parameter must notice that it changes."""
    torch.autograd.graph.increment_version(table.params)


def run_step(
    table: Any, who: str, grad_scale: torch.Tensor | None = None, found_inf: torch.Tensor | None = None
) -> None:
    """Step all rows of a native StepTable: those on the CPU, then those of each CUDA device on its current stream.
    To torch, that is an in-place operation on every parameter of the table.

    Args:
        table: the gathered rows.
        who: the caller's name, for messages.
        grad_scale: float32 of one element; rows that count their steps on the device divide gradients by it.
        found_inf: float32 of one element; where it is not 0, those rows are left as they are.

    Raises:
        ValueError, ImportError: there are no kernels for a device; nothing was changed there.
        RuntimeError: CUDA reports an error, or a graph captures a step that is counted on the host.
    """
    launch = steps_elsewhere(table, who, grad_scale, found_inf)
    table.run_cpu(threads(), meanwhile=partial(mark_stepped, table))
    launch()


def steps_elsewhere(
    table: Any, who: str, grad_scale: torch.Tensor | None = None, found_inf: torch.Tensor | None = None
) -> Callable[[], None]:
    """The part of run_step for rows that are not on the CPU, with the same arguments and errors: what can be found
    wrong is found at once, the call that comes back steps the rows."""
    elsewhere = table.elsewhere()
    modules = [module_for(torch.device("cuda", rows.device), who) for rows in elsewhere]
    for rows in elsewhere:
        if not rows.count_on_device and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{who}: a step that a CUDA graph captures must be counted on the device. Pass capturable=True."
            )

    def launch() -> None:
        for rows, module in zip(elsewhere, modules, strict=True):
            scalars = scale = skip = None
            if rows.count_on_device:
                device = torch.device("cuda", rows.device)
                scalars = torch.empty(len(rows) * module.scalars_size, dtype=torch.float32, device=device)
                scale = None if grad_scale is None else grad_scale.to(device, torch.float32, non_blocking=True)
                skip = None if found_inf is None else found_inf.to(device, torch.float32, non_blocking=True)
            module.step(rows.address, len(rows), rows.device, scalars, scale, skip)
            rows.count()

    return launch
