"""Adadelta with 8-bit state."""

from __future__ import annotations

import torch
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from optim8.optim.base import BlockwiseOptimizer
from optim8.optim.docstring import docstring
from optim8.paging import Pager
from optim8.step.arguments import BitsandbytesArguments
from optim8.step.hypers import MIN_8BIT_SIZE, Bits, Rounding
from optim8.step.weight_options import MasterBits


class Adadelta8bit(BlockwiseOptimizer):
    __doc__ = docstring(
        "torch.optim.Adadelta (Zeiler, arXiv 1212.5701) with 8-bit blockwise state (arXiv 2110.02861).",
        """
lr: learning rate, a number or a tensor of one element.
rho: decay rate of both averages, in [0, 1).
eps: added to both averages, under their roots. With 0 nothing moves.
weight_decay: L2 penalty, added to the gradient.
""",
        "`square_avg`, `acc_delta`",
    )
    rule = "adadelta"

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
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


class PagedAdadelta8bit(Adadelta8bit):
    """Adadelta8bit whose state lives where `paged`, an optim8.paging.Pager, says; by default in a mapped file."""

    always_paged = True
