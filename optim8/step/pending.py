"""Steps that GPUs may still run over state in memory of the host. A step does not wait; whoever reads, writes or frees
such memory on the host waits here first."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch

# By device and stream; an event is recorded anew behind each step, so there are no more than streams.
_events: dict[tuple[int, int], Any] = {}
# Devices on which a CUDA graph has captured such a step: nobody tells when it is replayed.
_captured: set[int] = set()


def is_captured(device: int) -> bool:
    """Whether a CUDA graph captures the current stream of a device, which need not be the current device."""
    if device == torch.cuda.current_device():
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def note(devices: Iterable[int]) -> None:
    """A step over state in pinned memory was launched on the current streams of CUDA devices."""
    for device in devices:
        if is_captured(device):
            _captured.add(device)
            continue
        stream = torch.cuda.current_stream(device)
        event = _events.setdefault((device, stream.cuda_stream), torch.cuda.Event())  # type: ignore[no-untyped-call]
        event.record(stream)


def wait() -> None:
    """Wait for all steps that were noted, of every optimizer: a state dict may hold another one's tensors."""
    for device in list(_captured):
        torch.cuda.synchronize(device)
    for event in list(_events.values()):
        event.synchronize()


def _forget() -> None:
    _events.clear()
    _captured.clear()


os.register_at_fork(after_in_child=_forget)  # CUDA does not work in a fork
