"""Which precision a parameter's state needs, by what 8 bits were seen to do to it, and what that takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch

from optim8.health.measures import Advice, MomentHealth
from optim8.rules import Moments
from optim8.state.layout import layout_of
from optim8.step import hypers


@dataclass(frozen=True)
class _Precision:
    """What a precision below float32 reaches.

    bits: as of optim_bits.
    cells: its steps from one 8-bit code to the next.
    reach: where elements with gradients of this share of their block's largest still move as with 32-bit state.
    """

    bits: int
    cells: int
    reach: float


# In order of bytes. Those count that optim_bits takes; float32, its last, keeps everything. With 8 bits, dithered,
# steps of elements at 1e-4 of their block are 3 % too long, at 1e-5 11 %, at 1e-6 65 % (docs/numerics.md).
# 16 bits, a code and a byte for the place between two codes, are precise until codes end, at 3e-7 of the largest.
_PRECISIONS = (_Precision(8, 1, 1e-4), _Precision(16, 256, 1e-6))


def choose(
    moments: Mapping[str, MomentHealth], limit: float, known: Sequence[int] = get_args(hypers.Bits)
) -> tuple[int, str]:
    """The first precision that suffices, and why 8 bits do not; "" where they do.

    Args:
        moments: what 8 bits do, by the moment's name.
        limit: of the relative error.
        known: what optim_bits may be.
    """
    reason = ""
    for precision in _PRECISIONS:
        if precision.bits in known:
            missed = next(filter(None, (_missed(precision, name, of, limit) for name, of in moments.items())), "")
            reason = reason or missed
            if not missed:
                return precision.bits, reason
    return max(known), reason


def _missed(precision: _Precision, name: str, of: MomentHealth, limit: float) -> str:
    if of.spread is not None and of.spread < precision.reach:
        return (
            f"1 % of what the codes of {name} stand for is under {of.spread:.1e} of the largest of its block, and "
            f"{precision.bits} bits reach down to {precision.reach:.0e}"
        )
    # Finer cells leave a part of the error, and what lies under the codes may be lost whole.
    if min(of.error, of.below + of.error / precision.cells) > limit:
        return f"the relative error of {name} is {of.error:.1%}, limit {limit:.1%}"
    return ""


def advise(moments: Moments, shard: torch.Tensor, seen: Mapping[str, MomentHealth], limit: float) -> Advice | None:
    """The precision to use for a parameter whose state is in 8 bits; None where nothing was seen.

    Args:
        moments: of the parameter's state.
        shard: the parameter, or its local shard.
        seen: what 8 bits do, by the moment's name.
        limit: of the relative error.
    """
    if not seen:
        return None
    bits, reason = choose(seen, limit)
    return Advice(bits, layout_of(moments, shard, bits).nbytes - layout_of(moments, shard, 8).nbytes, reason)
