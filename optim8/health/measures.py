"""What quantization does to the moments of one step.

The new moments before they are quantized are made by the library's own step: on a copy of (a sample of) the parameter,
with the old moments decoded to float32 state. Quantizing them gives the codes that the real step is about to write.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from optim8 import codec
from optim8.codec import BLOCK
from optim8.optim.base import BlockwiseOptimizer
from optim8.rules import Moment
from optim8.state import shards
from optim8.state.layout import moments_of
from optim8.step import supply


@dataclass(frozen=True)
class MomentHealth:
    """One moment of one parameter at one step, or the square root of a second moment: what codes stand for.

    Attributes:
        error: mean of |stored - exact| / |exact| over values that are finite and not 0; each counts at most 1.
        smallest: of the positive values, the share stored as the smallest positive code; None for a signed moment.
        saturated: the share of codes at the ends of the table; at least one in 256, the largest value of each block.
        unseen: the share of values that this step changes by less than it takes to get another nearest code: what
            rounding to nearest loses, and dithered rounding keeps in the mean.
        drift: the sum of the stored magnitudes over that of the exact ones, less 1: what rounding adds in this step.
        spread: what 1 % of the positive values do not exceed, each over the largest of its block. None where there are
            none, and for a signed moment: that passes through 0, so its small values tell when, not where.
        below: of the values that are not 0, the share of those smaller than the smallest positive code of their block.
            If they are positive by kind they are lifted to it, so that elements move too little; those of a signed
            moment get it or 0, which dithered rounding keeps in the mean.
        codes: the codes, uint8 of one dimension.
    """

    error: float
    smallest: float | None
    saturated: float
    unseen: float
    drift: float
    spread: float | None
    below: float
    codes: torch.Tensor


@dataclass(frozen=True)
class Advice:
    """The precision of a parameter's state that its moments ask for; its text says it with what it takes.

    Attributes:
        bits: as of optim_bits; 8: nothing to do.
        added: bytes of state more than in 8 bits, of the local shard of a sharded parameter.
        reason: what 8 bits miss; "" where they suffice.
    """

    bits: int
    added: int
    reason: str

    def __str__(self) -> str:
        return "8 bits are enough" if self.bits == 8 else f"optim_bits={self.bits} ({self.added:,} bytes more)"


@dataclass(frozen=True)
class ParameterHealth:
    """One parameter at one step.

    Attributes:
        name: the parameter's name, or its place in the groups.
        nonfinite: how many elements of the gradient are NaN or infinite.
        size: values of the parameter.
        sampled: how many of them were looked at.
        moments: by the moment's name, those of 8 bits: others are kept in 16 bits beside them, or all in 32. Empty
            where there are none, and where the step is skipped.
        advice: the precision to use; None where `moments` is empty.
    """

    name: str
    nonfinite: int
    size: int
    sampled: int
    moments: dict[str, MomentHealth]
    advice: Advice | None


def nonfinite(grad: torch.Tensor) -> int:
    """The number of elements that are NaN or infinite."""
    if bool(torch.isfinite(grad.sum())):
        return 0  # no sum is finite with such an element in it; one that overflows is counted below
    return int(grad.numel() - torch.isfinite(grad).sum())


def moments(
    optimizer: BlockwiseOptimizer, group: dict[str, Any], param: torch.Tensor, most: int
) -> tuple[int, dict[str, MomentHealth]]:
    """What the next step of a parameter with 8-bit state loses, over `most` of its values, in whole blocks.

    Args:
        group: the options of the parameter.
        param: has a gradient.

    Returns:
        the number of values looked at, and the result for each moment.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for so few values, waking others takes longer than the work
    try:
        return _moments(optimizer, group, param, most)
    finally:
        torch.set_num_threads(threads)


def _moments(
    optimizer: BlockwiseOptimizer, group: dict[str, Any], param: torch.Tensor, most: int
) -> tuple[int, dict[str, MomentHealth]]:
    local = shards.local(param)
    chosen = _blocks(local.numel(), most, local.device)
    scale = getattr(optimizer, "grad_scale", None)
    old, new = optimizer.stepper.preview(optimizer, group, param, chosen, scale)
    size = local.numel() if chosen is None else chosen.numel() * BLOCK
    blocks = torch.arange(codec.blocks(size), dtype=torch.int64) if chosen is None else chosen
    if shards.is_dtensor(param):
        blocks = blocks + shards.first_of(param) // BLOCK
    step = int(shards.local(optimizer.state[param]["step"])) + 1
    seen = {}
    for place, moment in enumerate(moments_of(optimizer.moments, optimizer.state[param])):
        if moment.low in optimizer.state[param]:
            continue
        # A step stores what is not finite as 0.
        exact, before = new[moment.name].nan_to_num(nan=0, posinf=0, neginf=0), old[moment.name]
        if moment.root:
            exact, before = codec.square_root(exact), codec.square_root(before)
        dithered = group["rounding"] == "dithered"
        if dithered:
            codes, absmax = codec.quantize_dithered(exact, blocks, signed=moment.signed, step=step, place=place)
        else:
            codes = torch.empty_like(exact, dtype=torch.uint8)
            absmax = exact.new_empty(codec.blocks(size))
            codec.quantize(exact, codes, absmax, signed=moment.signed, as_step=True)
        seen[moment.name] = _compare(moment, before, exact, codes, absmax, 254 if dithered else 255)
    return size, seen


def _blocks(size: int, most: int, device: torch.device) -> torch.Tensor | None:
    """Blocks spread evenly over a tensor; None for all of it."""
    count = most // BLOCK
    if size <= most or size // BLOCK <= count:
        return None
    return torch.linspace(0, size // BLOCK - 1, max(1, count), dtype=torch.float64, device=device).long()


def _compare(
    moment: Moment, old: torch.Tensor, exact: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, highest: int
) -> MomentHealth:
    """`highest`: the code of the largest value of a block."""
    stored, size = codec.dequantize(codes, absmax, signed=moment.signed), exact.abs()
    known = size > 0
    error = ((stored - exact).abs() / size).clamp(max=1)
    scale = absmax.repeat_interleave(BLOCK)[: exact.numel()]
    table = codec.code_table(moment.signed, exact.device)
    middle = (table[1:] + table[:-1]) / 2
    scaled = exact / scale
    unseen = torch.bucketize(scaled, middle) == torch.bucketize(old / scale, middle)
    share = scaled.abs_()
    top = codes >= highest
    low = codes == 0 if moment.signed else codes == 1
    parts = [
        torch.where(known, error, 0).sum(),
        known.sum(),
        top.sum(),
        low.sum(),
        (codes > 0).sum(),
        (unseen & (exact != old)).sum(),
        (known & (share < table[moment.zero + 1])).sum(),
        stored.abs().sum(dtype=torch.float64),
        size.sum(dtype=torch.float64),
    ]
    total, count, top_, low_, positive, unseen_, below, after, before = torch.stack(
        [part.to(torch.float64) for part in parts]
    ).tolist()
    spread = None
    if count and not moment.signed:
        least = torch.where(known, share, torch.inf).kthvalue(math.ceil(count / 100)).values
        spread = float(least / table[highest])
    return MomentHealth(
        error=total / max(count, 1),
        smallest=None if moment.signed else low_ / max(positive, 1),
        saturated=(top_ + (low_ if moment.signed else 0)) / max(exact.numel(), 1),
        unseen=unseen_ / max(exact.numel(), 1),
        drift=after / before - 1 if before else 0.0,
        spread=spread,
        below=below / max(count, 1),
        codes=codes,
    )


def trained(optimizer: BlockwiseOptimizer) -> Iterable[tuple[int, int, dict[str, Any], torch.Tensor, torch.Tensor]]:
    """Place in the groups, options (with what overrides change), tensor and (local) gradient of every parameter that
    has one."""
    supply.resolve(optimizer)
    for index, group in enumerate(optimizer.param_groups):
        for position, param in enumerate(group["params"]):
            if param.grad is not None and param.numel():
                changes = supply.changes_of(optimizer, param)
                yield index, position, {**group, **changes}, param, shards.local(param.grad)
