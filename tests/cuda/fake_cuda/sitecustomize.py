"""A machine that seems to have a GPU, for processes that have this folder in PYTHONPATH: "cuda" is the CPU.

It is for running the scripts of experiments/gpu_report.py in small; no figure they give here means anything.
"""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

import optim8
from optim8 import _native

_native._modules["_cuda"] = _native.cpu()


def _here(value: object) -> object:
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    return "cpu" if isinstance(value, str) and value.startswith("cuda") else value


class _OnCpu(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: _here(value) for name, value in (kwargs or {}).items()}
        if function is torch.Tensor.cuda:
            return args[0].detach().clone()
        kwargs.pop("pin_memory", None)
        return function(*[_here(value) for value in args], **kwargs)


class _Event:
    def __init__(self, **options: object) -> None:
        self.time = 0.0

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        return 1e3 * (end.time - self.time)


class _Stream:
    cuda_stream = 0

    def wait_stream(self, other: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass


class _CUDAGraph:
    def __init__(self) -> None:
        raise RuntimeError("no CPU poses as a CUDAGraph")


fakes: dict[str, Any] = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_name": lambda *device: "Fake GPU",
    "get_device_capability": lambda *device: (9, 0),
    "mem_get_info": lambda *device: (64 << 30, 64 << 30),
    "set_per_process_memory_fraction": lambda fraction: None,
    "reset_peak_memory_stats": lambda: None,
    "max_memory_allocated": lambda: 0,
    "empty_cache": lambda: None,
    "synchronize": lambda: None,
    "set_sync_debug_mode": lambda mode: None,
    "current_stream": _Stream,
    "is_current_stream_capturing": lambda: False,
    "stream": lambda stream: contextlib.nullcontext(),
    "Stream": _Stream,
    "Event": _Event,
    "CUDAGraph": _CUDAGraph,
}
for name, fake in fakes.items():
    setattr(torch.cuda, name, fake)
# torch's own optimizers ask it for a stream, which a torch that is built for CUDA has only with a driver.
torch.accelerator.current_accelerator = lambda check_available=False: None


def _without_capturable(make: Any) -> Any:
    """Parameters are on the CPU after all, where nothing is captured."""
    return lambda self, *args, capturable=False, **options: make(self, *args, **options)


for name in optim8.__all__:
    if name.endswith("8bit") and not name.startswith("Paged"):
        optimizer = getattr(optim8, name)
        optimizer.__init__ = _without_capturable(optimizer.__init__)
# They would look for a GPU in ways that are not covered here.
for peer in ("bitsandbytes", "torchao", "flashoptim"):
    sys.modules[peer] = None  # type: ignore[assignment]
_OnCpu().__enter__()
