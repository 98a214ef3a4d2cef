"""RMSprop with 8-bit state."""

from __future__ import annotations

import torch
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from optim8.optim.base import BlockwiseOptimizer
from optim8.optim.docstring import docstring
from optim8.optim.precision import in_32_bits
from optim8.paging import Pager
from optim8.step.arguments import BitsandbytesArguments
from optim8.step.hypers import MIN_8BIT_SIZE, Bits, Rounding
from optim8.step.weight_options import MasterBits


class RMSprop8bit(BlockwiseOptimizer):
    __doc__ = docstring(
        "torch.optim.RMSprop (Tieleman and Hinton 2012, lecture 6.5) with 8-bit blockwise state (arXiv 2110.02861).",
        """
lr: learning rate, a number or a tensor of one element.
alpha: decay rate of the averages, in [0, 1).
eps: added to the root of the averaged square, or of the variance.
weight_decay: L2 penalty, added to the gradient.
momentum: factor of the momentum, at least 0. With 0 there is none, and no memory for it.
centered: divide by the standard deviation of the gradient, sqrt(square_avg - grad_avg ** 2). The two averages have 16
    bits where other state has 8. Where a gradient varies by less than some hundredths of its size, their rounding
    decides how far a step goes.
""",
        "`square_avg`, with a momentum `momentum_buffer`, centered `grad_avg`",
    )
    rule = "rmsprop"

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
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


class PagedRMSprop8bit(RMSprop8bit):
    """RMSprop8bit whose state lives where `paged`, an optim8.paging.Pager, says; by default in a mapped file."""

    always_paged = True


RMSprop, RMSprop32bit = in_32_bits(RMSprop8bit)
PagedRMSprop, PagedRMSprop32bit = in_32_bits(PagedRMSprop8bit)
