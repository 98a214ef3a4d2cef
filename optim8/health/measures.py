"""What quantization does to the moments of one step.

The new moments before they are quantized are made by the library's own step: on a copy of (a sample of) the parameter,
with the old moments decoded to float32 state. Quantizing them gives the codes that the real step is about to write.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from optim8 import _native, codec
from optim8.codec import BLOCK
from optim8.optim import sharded, states
from optim8.optim.base import BlockwiseOptimizer
from optim8.optim.states import Moment


@dataclass(frozen=True)
class MomentHealth:
    """One moment of one parameter at one step.

    Attributes:
        error: mean of |stored - exact| / |exact| over values that are finite and not 0; each counts at most 1.
        smallest: of the positive values, the share stored as the smallest positive code; None for a signed moment.
        saturated: the share of codes at the ends of the table; at least one in 256, the largest value of each block.
        codes: the codes, uint8 of one dimension.
    """

    error: float
    smallest: float | None
    saturated: float
    codes: torch.Tensor


@dataclass(frozen=True)
class ParameterHealth:
    """One parameter at one step.

    Attributes:
        name: the parameter's name, or its place in the groups.
        nonfinite: how many elements of the gradient are NaN or infinite.
        size, sampled: values of the parameter, and how many of them were looked at.
        moments: by the moment's name; empty for 32-bit state, and where the step is skipped.
    """

    name: str
    nonfinite: int
    size: int
    sampled: int
    moments: dict[str, MomentHealth]


def nonfinite(grad: torch.Tensor) -> int:
    """The number of elements that are NaN or infinite."""
    if bool(torch.isfinite(grad.sum())):
        return 0  # no sum is finite with such an element in it; one that overflows is counted below
    return int(grad.numel() - torch.isfinite(grad).sum())


def moments(
    optimizer: BlockwiseOptimizer, group: dict[str, Any], param: torch.Tensor, grad: torch.Tensor, most: int
) -> tuple[int, dict[str, MomentHealth]]:
    """What the next step of a parameter with 8-bit state loses, over `most` of its values, in whole blocks.

    Args:
        group: the options of the parameter.
        grad: its gradient, the local shard of a DTensor's.

    Returns:
        the number of values looked at, and the result for each moment.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for so few values, waking others takes longer than the work
    try:
        return _moments(optimizer, group, param, grad, most)
    finally:
        torch.set_num_threads(threads)


def _moments(
    optimizer: BlockwiseOptimizer, group: dict[str, Any], param: torch.Tensor, grad: torch.Tensor, most: int
) -> tuple[int, dict[str, MomentHealth]]:
    whole, entry = states.dense(sharded.local(param)), optimizer.state[param]
    chosen = _blocks(whole.numel(), most, whole.device)
    # float32 holds bfloat16 and float16 exactly, and moments do not depend on how the parameter is rounded.
    values = _sample(whole, chosen).float()
    values.grad = _sample(grad if grad.stride() == whole.stride() else _laid_out_as(whole, grad), chosen).float()
    old: dict[str, torch.Tensor] = {"step": sharded.local(entry["step"]).clone()}
    for moment in optimizer.moments:
        codes, absmax = _sample(sharded.local(entry[moment.codes]), chosen), sharded.local(entry[moment.absmax])
        absmax = absmax if chosen is None else absmax[chosen.to(absmax.device)]
        # Paged state of a GPU's parameter is in memory of the host.
        old[moment.name] = codec.dequantize(codes.to(whole.device), absmax.to(whole.device), signed=moment.signed)
    scale = getattr(optimizer, "grad_scale", None)
    table, hyper = _native.cpu().StepTable(), optimizer._hyper(group, scale, None)
    if table.add([values], {values: old}, optimizer.rule, hyper, "monitor", 0, {}).step:
        states.move_steps([(values, old)])  # counted on the device from now on
        table.add([values], {values: old}, optimizer.rule, hyper, "monitor", 0, {})
    _native.run_step(table, "monitor", scale)
    return values.numel(), {moment.name: _compare(moment, old[moment.name]) for moment in optimizer.moments}


def _blocks(size: int, most: int, device: torch.device) -> torch.Tensor | None:
    """Blocks spread evenly over a tensor; None for all of it."""
    count = most // BLOCK
    if size <= most or size // BLOCK <= count:
        return None
    return torch.linspace(0, size // BLOCK - 1, max(1, count), dtype=torch.float64, device=device).long()


def _sample(tensor: torch.Tensor, chosen: torch.Tensor | None) -> torch.Tensor:
    flat = codec.flat(tensor)
    if chosen is None:
        return flat.clone()
    return flat[: flat.numel() // BLOCK * BLOCK].view(-1, BLOCK)[chosen.to(flat.device)].view(-1)


def _laid_out_as(param: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(param.shape, param.stride(), dtype=grad.dtype, device=grad.device).copy_(grad)


def _compare(moment: Moment, exact: torch.Tensor) -> MomentHealth:
    codes = torch.empty_like(exact, dtype=torch.uint8)
    absmax = exact.new_empty(codec.blocks(exact.numel()))
    exact = exact.nan_to_num(nan=0, posinf=0, neginf=0)  # a step stores what is not finite as 0
    codec.quantize(exact, codes, absmax, signed=moment.signed, as_step=True)
    size = exact.abs()
    known = size > 0
    error = ((codec.dequantize(codes, absmax, signed=moment.signed) - exact).abs() / size).clamp(max=1)
    parts = [torch.where(known, error, 0).sum(), known.sum(), (codes == 255).sum()]
    parts += (
        [(codes == 0).sum(), torch.zeros((), dtype=torch.int64)]
        if moment.signed
        else [(codes == 1).sum(), (codes > 0).sum()]
    )
    total, count, top, low, positive = torch.stack([part.to(torch.float64) for part in parts]).tolist()
    return MomentHealth(
        error=total / max(count, 1),
        smallest=None if moment.signed else low / max(positive, 1),
        saturated=(top + (low if moment.signed else 0)) / max(exact.numel(), 1),
        codes=codes,
    )


def trained(optimizer: BlockwiseOptimizer) -> Iterable[tuple[int, int, dict[str, Any], torch.Tensor, torch.Tensor]]:
    """Place in the groups, options (with what overrides change), tensor and (local) gradient of every parameter that
    has one."""
    resolved = optimizer._resolved()
    for index, group in enumerate(optimizer.param_groups):
        for position, param in enumerate(group["params"]):
            if param.grad is not None and param.numel():
                changes = {} if resolved is None else resolved.by_id.get(id(param), {})
                yield index, position, {**group, **changes}, param, sharded.local(param.grad)
