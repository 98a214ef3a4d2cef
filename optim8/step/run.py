"""Running a gathered step on the devices of its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch

from optim8 import _native
from optim8.step.norms import Reduce, measured
from optim8.step.pending import is_captured


def is_capturing() -> bool:
    """Whether a CUDA graph captures what runs now. Then nothing may read device values, and replays skip this code."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def check_not_capturing(who: str, params: Iterable[torch.Tensor]) -> None:
    """Raise RuntimeError where a CUDA graph captures a step that first makes or moves state of `params`: every replay
    would do that again, and begin with the state of that moment."""
    if any(map(is_captured, {param.get_device() for param in params if param.is_cuda})):
        raise RuntimeError(
            f"{who}: a step that a CUDA graph captures needs state that is there already. "
            "Make a step with capturable=True before the capture."
        )


def mark_stepped(table: Any) -> None:
    """Tell autograd that the parameters change, as torch's in-place operations do: a graph may have saved them."""
    torch.autograd.graph.increment_version(table.params)


def run_step(
    table: Any,
    who: str,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    reduce: Reduce | None = None,
    sums: torch.Tensor | None = None,
) -> None:
    """Step all rows of a native StepTable: those on the CPU, then those of each CUDA device on its current stream.
    To torch, that is an in-place operation on every parameter of the table.

    Args:
        table: the gathered rows.
        who: the caller's name, for messages.
        grad_scale: float32 of one element; rows that count their steps on the device divide gradients by it.
        found_inf: float32 of one element; where it is not 0, those rows are left as they are.
        reduce: for a rule with norms, what adds up those of shards; None: there are none.
        sums: for a table of one row and a rule with norms, its sums where they are known (`measure`).

    Raises:
        ValueError, ImportError: there are no kernels for a device; nothing was changed there.
        RuntimeError: CUDA reports an error, or a graph captures a step that is counted on the host.
    """
    launch = steps_elsewhere(table, who, grad_scale, found_inf, reduce, sums)
    rows = table.on_cpu()
    if rows is not None and sums is not None:
        rows.take_sums(sums.data_ptr())
    elif rows is not None and reduce is not None and rows.has_norms:
        sums = measured(rows, reduce, partial(rows.measure, _native.threads()))
    table.run_cpu(_native.threads(), meanwhile=partial(mark_stepped, table))
    launch()


def measure(table: Any, who: str, grad_scale: torch.Tensor | None = None) -> torch.Tensor | None:
    """The sums of squares of a table's one row, float64 [1, 2] on its device; None for a rule without norms. Nothing is
    changed but the count of steps, where the device counts."""
    rows = table.on_cpu()
    if rows is not None:
        return measured(rows, None, partial(rows.measure, _native.threads())) if rows.has_norms else None
    (rows,) = table.elsewhere()
    if not rows.has_norms:
        return None
    module = _native.module_for(torch.device("cuda", rows.device), who)
    return _measured_elsewhere(rows, module, _on_device(rows, module, grad_scale, None), None)


def _on_device(
    rows: Any, module: Any, grad_scale: torch.Tensor | None, found_inf: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """What a step of rows takes from their device: room for scalars; where it counts there, scale and found_inf."""
    if not rows.count_on_device and not rows.has_norms:
        return None, None, None
    device = torch.device("cuda", rows.device)
    scalars = torch.empty(len(rows) * module.scalars_size, dtype=torch.float32, device=device)
    if not rows.count_on_device:
        return scalars, None, None
    scale = None if grad_scale is None else grad_scale.to(device, torch.float32, non_blocking=True)
    return scalars, scale, None if found_inf is None else found_inf.to(device, torch.float32, non_blocking=True)


def _measured_elsewhere(rows: Any, module: Any, inputs: Sequence[Any], reduce: Reduce | None) -> torch.Tensor:
    """Do what `measured` does for rows of a CUDA device, on its current stream; where it counts steps, they count."""
    device = torch.device("cuda", rows.device)
    sums = torch.zeros(len(rows), 2, dtype=torch.float64, device=device)
    of_blocks = torch.empty(2 * rows.blocks, dtype=torch.float64, device=device)
    module.measure(rows.address, len(rows), rows.device, *inputs, sums.data_ptr(), of_blocks.data_ptr())
    if reduce is not None:
        reduce(sums, rows.places)
    return sums


def steps_elsewhere(
    table: Any,
    who: str,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    reduce: Reduce | None = None,
    sums: torch.Tensor | None = None,
) -> Callable[[], None]:
    """The part of run_step for rows that are not on the CPU, with the same arguments and errors. It makes every
    check that it can at once; the function that it returns steps the rows."""
    elsewhere = table.elsewhere()
    modules = [_native.module_for(torch.device("cuda", rows.device), who) for rows in elsewhere]
    for rows in elsewhere:
        if not rows.count_on_device and is_captured(rows.device):
            raise RuntimeError(
                f"{who}: a step that a CUDA graph captures must be counted on the device. Pass capturable=True."
            )

    def launch() -> None:
        for rows, module in zip(elsewhere, modules, strict=True):
            inputs = _on_device(rows, module, grad_scale, found_inf)
            if rows.has_norms:
                known = _measured_elsewhere(rows, module, inputs, reduce) if sums is None else sums
                module.step(rows.address, len(rows), rows.device, *inputs, known.data_ptr(), counted=sums is None)
            else:
                module.step(rows.address, len(rows), rows.device, *inputs)
            rows.count()

    return launch
