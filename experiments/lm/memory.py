"""Memory of this process: on a CPU its resident set as the kernel counts it, on a GPU what torch allocated there."""

import resource
import sys
from pathlib import Path

import torch

MEANING = {
    "cpu": "largest resident set of a process of its own, Python and torch included",
    "cuda": "largest sum of tensors allocated on the GPU",
}


def current(device: torch.device) -> int:
    """Bytes in use now."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return _status("VmRSS") or peak(device)


def peak(device: torch.device) -> int:
    """Largest number of bytes in use so far.

    VmHWM rather than `ru_maxrss`, which on Linux a process takes over from its parent; other systems have no VmHWM.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":")), None)
