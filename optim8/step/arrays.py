"""A step of a single array, without an optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from optim8 import _native, rules
from optim8.state.allocation import move_steps
from optim8.step import run


def step_array(
    who: str,
    options: Any,
    param: torch.Tensor,
    grad: torch.Tensor,
    entry: dict[str, Any],
    scale: torch.Tensor | None = None,
    sums: torch.Tensor | None = None,
    pinned_spans: Sequence[tuple[int, int]] = (),
    first: int = 0,
) -> None:
    """One step, in place.

    Args:
        who: the caller's name, for messages.
        options: native StepOptions, which say the rule.
        param: dense, without autograd.
        grad: of the shape and strides of `param`, of its dtype or float32.
        entry: the state under the keys of the rule, with the count of steps before this one.
        scale: float32 of one element; the gradient is divided by it where steps are counted on its device.
        sums: of a rule with norms, those that `measure_array` gave; None: they are measured.
        pinned_spans: host memory that CUDA kernels may use.
        first: where `param` begins in a larger parameter, in values.

    Raises:
        ValueError: a tensor does not fit; nothing was changed.
    """
    table = _native.cpu().StepTable()

    def gather() -> Any:
        table.clear()
        if pinned_spans:
            table.allow_host(pinned_spans)
        return table.add([param], {param: entry}, options, who, 0, {0: grad}, None, {0: first})

    if gather().step:
        move_steps([(param, entry)], rules.every()[options.rule].moments)  # counted on the device from now on
        gather()
    run.run_step(table, who, scale, sums=sums)


def measure_array(
    who: str,
    options: Any,
    param: torch.Tensor,
    grad: torch.Tensor,
    entry: dict[str, Any],
    scale: torch.Tensor | None = None,
    pinned_spans: Sequence[tuple[int, int]] = (),
) -> torch.Tensor | None:
    """The sums of squares that such a step of a rule with norms depends on, float64 [1, 2].

    None: the rule has no norms, or the tensors lie otherwise than a step needs them.

    Args:
        who, options, param, grad, entry, scale: as for step_array; only the count in `entry` may change.
        pinned_spans: host memory that CUDA kernels may use.
    """
    table = _native.cpu().StepTable()
    if pinned_spans:
        table.allow_host(pinned_spans)
    table.add([param], {param: entry}, options, who, 0, {0: grad})
    return run.measure(table, who, scale) if len(table) else None
