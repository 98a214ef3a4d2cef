"""What a 16-bit weight has beside its parameter, in the libraries that keep it, and what becomes of it here."""

from __future__ import annotations

import torch

from optim8.rules import Moments
from optim8.state import report
from optim8.state.layout import PARAM_LOW
from optim8.state.moments import Entry
from optim8.state.weights import low_of


def of_shares(value: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """What is beside 16-bit values, float32, from shares of half their last bit.

    Args:
        value: bfloat16 or float16.
        share: int8 or int16, of the same shape; the largest number is all of that half.
    """
    kind = torch.finfo(value.dtype)
    power = (value.detach().to(torch.float32).view(torch.int32) & 0x7F800000).view(torch.float32)  # of two, below it
    last_bit = power.clamp(min=kind.tiny) * kind.eps
    return share.to(torch.float32) / torch.iinfo(share.dtype).max * (last_bit / 2)


def put(where: str, key: str, moments: Moments, param: torch.Tensor, rest: torch.Tensor, read: Entry) -> None:
    """Put what a weight has beside its parameter into a state that is read, where it has a place for it.

    Args:
        key: of the dict, for a report.
        rest: weight - parameter, of the parameter's shape.
    """
    plain = type(param.data) is torch.Tensor and type(rest) is torch.Tensor  # not of a DTensor
    if moments.master_bits != 16 and plain:
        read[PARAM_LOW] = low_of(param, rest)
    else:
        leave(where, key, rest)


def leave(where: str, key: str, rest: torch.Tensor) -> None:
    """Note in a report that it is left out; `rest`: as of `put`, or anything else that is 0 where there is none."""
    report.note(f"{where}[{key!r}]", lambda: rest != 0, _LOST)


_LOST = (
    "are a part of their weight beside the parameter, and are left out: make the optimizer with master_bits=24 or 32, "
    "and load the model, in the dtype that it was saved in, before the optimizer, to go on with them."
)
