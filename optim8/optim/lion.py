"""Lion with 8-bit state."""

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


class Lion8bit(BlockwiseOptimizer):
    __doc__ = docstring(
        "Lion (Chen et al., arXiv 2302.06675) with 8-bit blockwise state (arXiv 2110.02861).",
        """
lr: learning rate, a number or a tensor of one element; the size of every element's step.
betas: the weights of momentum in the step and in the new momentum, each in [0, 1): any sequence of two.
weight_decay: decoupled weight decay: parameters shrink by the factor 1 - lr * weight_decay.
""",
        "`exp_avg`",
    )
    rule = "lion"

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-4,
        betas: Betas = (0.9, 0.99),
        weight_decay: float = 0.0,
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


class PagedLion8bit(Lion8bit):
    """Lion8bit whose state lives where `paged`, an optim8.paging.Pager, says; by default in a memory-mapped file."""

    always_paged = True


Lion, Lion32bit = in_32_bits(Lion8bit)
PagedLion, PagedLion32bit = in_32_bits(PagedLion8bit)
