"""SGD with momentum in 8 bits."""

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


class SGD8bit(BlockwiseOptimizer):
    __doc__ = docstring(
        "torch.optim.SGD with its momentum in 8-bit blockwise state (arXiv 2110.02861).",
        """
lr: learning rate, a number or a tensor of one element.
momentum: factor of the momentum, at least 0. With 0 there is no state at all. Where it is set later, the momentum
    begins with the gradient of that step; set to 0 later, it stays as it is.
dampening: the gradient goes into the momentum with the factor 1 - dampening, but for the first one.
weight_decay: L2 penalty, added to the gradient.
nesterov: step along gradient + momentum * new momentum; needs a momentum and no dampening.
""",
        "`momentum_buffer`",
    )
    rule = "sgd"

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | torch.Tensor = 0,
        nesterov: bool = False,
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


class PagedSGD8bit(SGD8bit):
    """SGD8bit whose state lives where `paged`, an optim8.paging.Pager, says; by default in a memory-mapped file."""

    always_paged = True


SGD, SGD32bit = in_32_bits(SGD8bit)
PagedSGD, PagedSGD32bit = in_32_bits(PagedSGD8bit)
