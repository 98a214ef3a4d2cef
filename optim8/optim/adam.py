"""Adam and AdamW with 8-bit state."""

from __future__ import annotations

import torch
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from optim8.optim.base import BlockwiseOptimizer
from optim8.paging import Pager
from optim8.step.hypers import MIN_8BIT_SIZE, Betas, Bits, BitsandbytesArguments

_ARGS = """

    Args:
        params: parameters, named parameters or groups, as for torch.optim. float32, bfloat16 or float16.
        lr: learning rate, a number or a tensor of one element.
        betas: decay rates of the two moments, each in [0, 1): any sequence of two, stored as a tuple.
        eps: added to the square root of the second moment.
        weight_decay: {decay}
        amsgrad, differentiable: must be False.
        foreach, fused: accepted; every step is one fused call over all tensors, whatever they say. Under GradScaler,
            fused=True lets the step take the scale itself, as in torch.optim.
        maximize: ascend instead of descend.
        capturable: for CUDA parameters only.
        min_8bit_size: tensors of fewer values keep 32-bit state.
        optim_bits: 8, or 32 for state in float32.
        paged: True keeps state in a memory-mapped file; an optim8.paging.Pager says where it lives, under which budget.
        **kwargs: what bitsandbytes' optimizers also take: `args`, `is_paged`; `percentile_clipping`, `block_wise`,
            `max_unorm` and `skip_zeros` with the values that change nothing.

    Each but `paged` can be set by parameter group. State: `step`, and `exp_avg`, `exp_avg_sq` as uint8 codes with one
    float32 `_absmax` for each 256 values, or as float32.

    Raises:
        ValueError: an argument cannot be honoured.
        TypeError: an argument is unknown, or no number where one is needed.
"""


class Adam8bit(BlockwiseOptimizer):
    __doc__ = (
        "torch.optim.Adam (Kingma and Ba, arXiv 1412.6980) with 8-bit blockwise state (arXiv 2110.02861)."
        + _ARGS.format(decay="L2 penalty, added to the gradient.")
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
        paged: bool | Pager | None = None,
        **kwargs: Unpack[BitsandbytesArguments],
    ) -> None:
        defaults = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        super().__init__(params, defaults)


class AdamW8bit(BlockwiseOptimizer):
    __doc__ = (
        "torch.optim.AdamW (Loshchilov and Hutter, arXiv 1711.05101) with 8-bit blockwise state (arXiv 2110.02861)."
        + _ARGS.format(decay="decoupled weight decay: parameters shrink by the factor 1 - lr * weight_decay.")
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
