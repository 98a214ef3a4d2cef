"""Running a gathered step on the devices of its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from optim8 import _native


def is_capturing() -> bool:
    """Whether a CUDA graph captures what runs now. Then nothing may read device values, and replays skip this code."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def check_not_capturing(who: str, params: Iterable[torch.Tensor]) -> None:
    """Raise RuntimeError where a CUDA graph captures a step that first makes or moves state of `params`: every replay
    would do that again, and begin with the state of that moment."""
    if any(param.is_cuda for param in params) and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{who}: a step that a CUDA graph captures needs state that is there already. "
            "Make a step with capturable=True before the capture."
        )


def mark_stepped(table: Any) -> None:
    """Tell autograd that the parameters change, as torch's in-place operations do: a graph may have saved them."""
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
    table.run_cpu(_native.threads(), meanwhile=partial(mark_stepped, table))
    launch()


def steps_elsewhere(
    table: Any, who: str, grad_scale: torch.Tensor | None = None, found_inf: torch.Tensor | None = None
) -> Callable[[], None]:
    """The part of run_step for rows that are not on the CPU, with the same arguments and errors. It makes every
    check that it can at once; the function that it returns steps the rows."""
    elsewhere = table.elsewhere()
    modules = [_native.module_for(torch.device("cuda", rows.device), who) for rows in elsewhere]
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
