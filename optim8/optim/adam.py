"""Adam and AdamW with 8-bit state."""

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

_ARGUMENTS = """
lr: learning rate, a number or a tensor of one element.
betas: decay rates of the two moments, each in [0, 1): any sequence of two, stored as a tuple.
eps: added to the square root of the second moment.
weight_decay: {decay}
amsgrad: divide by the largest second moment so far (arXiv 1904.09237), which is a third state.
"""
_STATES = "`exp_avg`, `exp_avg_sq` (and `max_exp_avg_sq` with `amsgrad`)"


class Adam8bit(BlockwiseOptimizer):
    __doc__ = docstring(
        "torch.optim.Adam (Kingma and Ba, arXiv 1412.6980) with 8-bit blockwise state (arXiv 2110.02861).",
        _ARGUMENTS.format(decay="L2 penalty, added to the gradient."),
        _STATES,
    )
    rule = "adam"

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
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


class AdamW8bit(BlockwiseOptimizer):
    __doc__ = docstring(
        "torch.optim.AdamW (Loshchilov and Hutter, arXiv 1711.05101) with 8-bit blockwise state (arXiv 2110.02861).",
        _ARGUMENTS.format(decay="decoupled weight decay: parameters shrink by the factor 1 - lr * weight_decay."),
        _STATES,
    )
    rule = "adamw"

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
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


class PagedAdam8bit(Adam8bit):
    """Adam8bit whose state lives where `paged`, an optim8.paging.Pager, says; by default in a memory-mapped file."""

    always_paged = True


class PagedAdamW8bit(AdamW8bit):
    """AdamW8bit whose state lives where `paged`, an optim8.paging.Pager, says; by default in a memory-mapped file."""

    always_paged = True


Adam, Adam32bit = in_32_bits(Adam8bit)
AdamW, AdamW32bit = in_32_bits(AdamW8bit)
PagedAdam, PagedAdam32bit = in_32_bits(PagedAdam8bit)
PagedAdamW, PagedAdamW32bit = in_32_bits(PagedAdamW8bit)
