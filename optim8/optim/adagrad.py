"""Adagrad with 8-bit state."""

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


class Adagrad8bit(BlockwiseOptimizer):
    __doc__ = docstring(
        "torch.optim.Adagrad (Duchi, Hazan and Singer, JMLR 12, 2011) with 8-bit blockwise state (arXiv 2110.02861).",
        """
lr: learning rate, a number or a tensor of one element.
lr_decay: in step t the learning rate is lr / (1 + (t - 1) * lr_decay).
weight_decay: L2 penalty, added to the gradient.
initial_accumulator_value: what the sums of squares start as, at least 0.
eps: added to the root of the sum.
""",
        "`sum`",
    )
    rule = "adagrad"

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
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


class PagedAdagrad8bit(Adagrad8bit):
    """Adagrad8bit whose state lives where `paged`, an optim8.paging.Pager, says; by default in a mapped file."""

    always_paged = True


Adagrad, Adagrad32bit = in_32_bits(Adagrad8bit)
PagedAdagrad, PagedAdagrad32bit = in_32_bits(PagedAdagrad8bit)
