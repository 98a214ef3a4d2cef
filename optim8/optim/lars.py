"""LARS with its momentum in 8 bits."""

from __future__ import annotations

import torch
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from optim8.optim.absent import ABSENT
from optim8.optim.base import BlockwiseOptimizer
from optim8.optim.docstring import docstring
from optim8.optim.precision import in_32_bits
from optim8.paging import Pager
from optim8.step.arguments import BitsandbytesArguments
from optim8.step.hypers import MIN_8BIT_SIZE, Bits, Rounding
from optim8.step.weight_options import MasterBits


class LARS8bit(BlockwiseOptimizer):
    __doc__ = docstring(
        """LARS (You et al. 2017, arXiv 1708.03888, algorithm 1) with its momentum in 8 bits (arXiv 2110.02861).

    SGD whose gradient, weight decay included, is scaled for every tensor by
    trust_coefficient * |param| / (|grad| + weight_decay * |param|), or by 1 where the tensor is 0. The learning rate is
    outside of the momentum, so that a change of it acts at once; in the paper it is inside. The norms are those of
    whole DTensors (FSDP2, tensor parallelism): all ranks must then step the same parameters.""",
        """
lr: learning rate, a number or a tensor of one element.
momentum: factor of the momentum, at least 0. With 0 there is no state at all.
dampening: the gradient goes into the momentum with the factor 1 - dampening, but for the first one.
weight_decay: L2 penalty, added to the gradient before it is scaled.
nesterov: step along gradient + momentum * new momentum; needs a momentum and no dampening.
trust_coefficient: how far a tensor moves in a step without momentum, over lr and its norm.
""",
        "`momentum_buffer`",
    )
    rule = "lars"

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0,
        weight_decay: float | torch.Tensor = 0,
        nesterov: bool = False,
        trust_coefficient: float = 1e-3,
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


class PagedLARS8bit(LARS8bit):
    """LARS8bit whose state lives where `paged`, an optim8.paging.Pager, says; by default in a memory-mapped file."""

    always_paged = True


LARS, LARS32bit = in_32_bits(LARS8bit)
PagedLARS, PagedLARS32bit = in_32_bits(PagedLARS8bit)
PytorchLARS = ABSENT["PytorchLARS"]
