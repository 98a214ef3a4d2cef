"""Lion with 8-bit state."""

from __future__ import annotations

import torch
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from optim8.optim.base import BlockwiseOptimizer
from optim8.paging import Pager
from optim8.step.hypers import MIN_8BIT_SIZE, Betas, Bits, BitsandbytesArguments


class Lion8bit(BlockwiseOptimizer):
    """Lion (Chen et al., arXiv 2302.06675) with 8-bit blockwise state (arXiv 2110.02861).

    Args:
        params: parameters, named parameters or groups, as for torch.optim. float32, bfloat16 or float16.
        lr: learning rate, a number or a tensor of one element; the size of every element's step.
        betas: the weights of momentum in the step and in the new momentum, each in [0, 1): any sequence of two.
        weight_decay: decoupled weight decay: parameters shrink by the factor 1 - lr * weight_decay.
        maximize: ascend instead of descend.
        foreach, fused: accepted; every step is one fused call over all tensors, whatever they say. Under GradScaler,
            fused=True lets the step take the scale itself, as in torch.optim.
        capturable: for CUDA parameters only.
        differentiable: must be False.
        min_8bit_size: tensors of fewer values keep 32-bit state.
        optim_bits: 8, or 32 for state in float32.
        paged: True keeps state in a memory-mapped file; an optim8.paging.Pager says where it lives, under which budget.
        **kwargs: what bitsandbytes' optimizers also take: `args`, `is_paged`; `percentile_clipping`, `block_wise`,
            `max_unorm` and `skip_zeros` with the values that change nothing.

    Each but `paged` can be set by parameter group. State: `step`, and `exp_avg` as uint8 codes with one float32
    `_absmax` for each 256 values, or as float32.

    Raises:
        ValueError: an argument cannot be honoured.
        TypeError: an argument is unknown, or no number where one is needed.
    """

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
        paged: bool | Pager | None = None,
        **kwargs: Unpack[BitsandbytesArguments],
    ) -> None:
        defaults = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        super().__init__(params, defaults)


class PagedLion8bit(Lion8bit):
    """Lion8bit whose state lives where `paged`, an optim8.paging.Pager, says; by default in a memory-mapped file."""

    always_paged = True
