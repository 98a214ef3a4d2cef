"""NAdam with 8-bit state."""

from __future__ import annotations

import torch
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from optim8.optim.base import BlockwiseOptimizer
from optim8.optim.docstring import docstring
from optim8.paging import Pager
from optim8.step.arguments import BitsandbytesArguments
from optim8.step.hypers import MIN_8BIT_SIZE, Betas, Bits, Rounding
from optim8.step.weight_options import MasterBits


class NAdam8bit(BlockwiseOptimizer):
    __doc__ = docstring(
        "torch.optim.NAdam (Dozat 2016, ICLR workshop) with 8-bit blockwise state (arXiv 2110.02861).",
        """
lr: learning rate, a number or a tensor of one element.
betas: decay rates of the two moments, each in [0, 1): any sequence of two, stored as a tuple.
eps: added to the square root of the second moment.
weight_decay: L2 penalty, added to the gradient.
momentum_decay: in step t the momentum is betas[0] * (1 - 0.96 ** (t * momentum_decay) / 2).
decoupled_weight_decay: take weight decay off the parameter instead, which shrinks by 1 - lr * weight_decay.
""",
        "`exp_avg`, `exp_avg_sq`",
    )
    rule = "nadam"

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 2e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
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


class PagedNAdam8bit(NAdam8bit):
    """NAdam8bit whose state lives where `paged`, an optim8.paging.Pager, says; by default in a mapped file."""

    always_paged = True
