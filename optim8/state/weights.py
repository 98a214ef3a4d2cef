"""Weights that are wider than their parameter: bfloat16 or float16, and the low bits beside it (csrc/core/weight.h)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from optim8 import _native
from optim8.state.mapped import copy
from optim8.state.mapped import fill as fill_tensor


def join(param: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """The weights of a parameter and its low bits, float32, contiguous, on the parameter's device."""
    wide = torch.empty(param.shape, dtype=torch.float32)
    with torch.no_grad():
        _native.cpu().join_weights(_plain(param), _plain(low), wide, _native.threads())
    return wide.to(param.device)


def part(wide: torch.Tensor, param: torch.Tensor, low: torch.Tensor) -> None:
    """Bring weights, float32, into a parameter and its low bits, rounded to the nearest that these can tell."""
    to_param, to_low = (torch.empty(wide.shape, dtype=to.dtype) for to in (param, low))
    with torch.no_grad():
        _native.cpu().part_weights(to_param, to_low, _plain(wide), _native.threads())
        param.copy_(to_param)
        copy(low, to_low)


@torch.no_grad()
def low_of(param: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """The low bits, int16, of weights that are `param + rest`. The parameter stays what it is: of a rest of half its
    last bit or more they keep a part, of one that is larger than that bit nothing.

    Args:
        param: bfloat16 or float16.
        rest: of the parameter's shape, in any float dtype.
    """
    exact, rest = param.detach().float(), rest.to(param.device, torch.float32)
    goal = torch.zeros_like(param, dtype=torch.int16)
    left = torch.ones_like(param, dtype=torch.bool)
    # Whole; a tie; one beside the power of two, where the last bit is half as large on one side; and what is more.
    for share in (1.0, 1 - 2.0**-7, 0.5 - 2.0**-7):
        rounded, low = torch.empty_like(param.detach()), torch.empty_like(goal)
        part(exact + share * rest, rounded, low)
        fits = left & (rounded == param)
        goal = torch.where(fits, low, goal)
        left &= ~fits
        if not bool(left.any()):
            break
    return goal


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous()


def fill_low(goal: torch.Tensor, source: torch.Tensor | None) -> None:
    """Bring low bits into those of a state, which may be of another width; None: the parameter is all there is."""
    if source is None:
        fill_tensor(goal, 0)
    elif source.dtype == goal.dtype:
        copy(goal, source)
    else:
        copy(goal, _WIDTHS[goal.dtype](source))


def _to_bytes(low: torch.Tensor) -> torch.Tensor:
    # To nearest; what would round up into the parameter stays as near as it can.
    return ((low.int() + 0x80) >> 8).clamp_(max=0x7F).to(torch.int8).view(torch.uint8)


def _to_pairs(low: torch.Tensor) -> torch.Tensor:
    return low.view(torch.int8).to(torch.int16) * 256


_WIDTHS: dict[torch.dtype, Callable[[torch.Tensor], torch.Tensor]] = {torch.uint8: _to_bytes, torch.int16: _to_pairs}
