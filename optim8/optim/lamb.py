"""LAMB with 8-bit state."""

from __future__ import annotations

import torch
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from optim8.optim.base import BlockwiseOptimizer
from optim8.optim.docstring import docstring
from optim8.optim.precision import in_32_bits
from optim8.paging import Pager
from optim8.step.arguments import BitsandbytesArguments
from optim8.step.hypers import MIN_8BIT_SIZE, Betas, Bits, Rounding
from optim8.step.weight_options import MasterBits


class LAMB8bit(BlockwiseOptimizer):
    __doc__ = docstring(
        """LAMB (You et al. 2020, arXiv 1904.00962, algorithm 2) with 8-bit blockwise state (arXiv 2110.02861).

    Every tensor takes a step of lr times its norm, along Adam's direction with weight decay in it. The bias of both
    moments is corrected; nothing is clipped or capped. A tensor that is 0 takes a step of lr times the direction. The
    norms are those of whole DTensors (FSDP2, tensor parallelism): all ranks must then step the same parameters.""",
        """
lr: learning rate, a number or a tensor of one element.
betas: decay rates of the two moments, each in [0, 1): any sequence of two, stored as a tuple.
eps: added to the square root of the second moment.
weight_decay: added to the direction, times the parameter. Without a gradient a step then shrinks the parameter by the
    factor 1 - lr, however small it is.
""",
        "`exp_avg`, `exp_avg_sq`",
    )
    rule = "lamb"

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        min_8bit_size: int = MIN_8BIT_SIZE,
        optim_bits: Bits = 8,
        rounding: Rounding = "dithered",
        master_bits: MasterBits = 16,
        param_rounding: Rounding = "nearest",
        paged: bool | Pager | None = None,
        **kwargs: Unpack[BitsandbytesArguments],
    ) -> None:
        defaults = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        super().__init__(params, defaults)


class PagedLAMB8bit(LAMB8bit):
    """LAMB8bit whose state lives where `paged`, an optim8.paging.Pager, says; by default in a memory-mapped file."""

    always_paged = True


LAMB, LAMB32bit = in_32_bits(LAMB8bit)
PagedLAMB, PagedLAMB32bit = in_32_bits(PagedLAMB8bit)
