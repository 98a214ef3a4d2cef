"""AdEMAMix with 8-bit state."""

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


class AdEMAMix8bit(BlockwiseOptimizer):
    __doc__ = docstring(
        "AdEMAMix (Pagliardini, Ablin and Grangier, arXiv 2409.03137) with 8-bit blockwise state (arXiv 2110.02861).",
        """
lr: learning rate, a number or a tensor of one element.
betas: decay rates of the fast first moment, the second moment and the slow first moment, each in [0, 1): any
    sequence of three. The slow moment has 16 bits where other state has 8.
alpha: weight of the slow moment, which has no bias correction, in a step.
t_alpha: alpha grows from 0 over so many steps; None: it is there from the first.
t_beta3: the half-life of the slow moment grows from that of the fast one over so many steps; None: it does not.
eps: added to the square root of the second moment.
weight_decay: decoupled weight decay: parameters shrink by the factor 1 - lr * weight_decay.
""",
        "`exp_avg`, `exp_avg_slow`, `exp_avg_sq`",
    )
    rule = "ademamix"

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: Betas = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
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


class PagedAdEMAMix8bit(AdEMAMix8bit):
    """AdEMAMix8bit whose state lives where `paged`, an optim8.paging.Pager, says; by default in a mapped file."""

    always_paged = True


AdEMAMix, AdEMAMix32bit = in_32_bits(AdEMAMix8bit)
PagedAdEMAMix, PagedAdEMAMix32bit = in_32_bits(PagedAdEMAMix8bit)
