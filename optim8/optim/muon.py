"""Muon with its momentum in 8 bits, and AdamW beside it."""

from __future__ import annotations

import torch
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from optim8.optim.base import BlockwiseOptimizer
from optim8.optim.docstring import docstring
from optim8.paging import Pager
from optim8.step.arguments import BitsandbytesArguments
from optim8.step.hypers import MIN_8BIT_SIZE, Betas, Bits, Rounding
from optim8.step.orthogonal import Adjustment, Coefficients
from optim8.step.weight_options import MasterBits


class Muon8bit(BlockwiseOptimizer):
    __doc__ = docstring(
        "torch.optim.Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) with 8-bit blockwise state (arXiv "
        "2110.02861).",
        """
lr: learning rate, a number or a tensor of one element.
weight_decay: decoupled weight decay: parameters shrink by the factor 1 - lr * weight_decay, without adjust_lr_fn.
momentum: the momentum is the mean of gradients with this rate of decay, at least 0. Where gradients have a low
    rank (few outputs, a small batch), the iteration makes its rounding to 8 bits as large as itself: use
    optim_bits=16 then.
nesterov: orthogonalize the point between gradient and momentum with this weight, instead of the momentum.
ns_coefficients: of the Newton-Schulz iteration, the factors of X, X^3 and X^5.
eps: the least that a matrix is divided by before the iteration; with use_muon=False AdamW's, added to the root.
ns_steps: iterations, from 0 to 99. With 5 of them the singular values of an update are from 0.68 to 1.21, and the
    directions that hardly occur in a matrix are the rounding noise of bfloat16: no update is quite orthogonal.
adjust_lr_fn: by what lr is multiplied for a matrix: "original" or None, sqrt(max(1, rows / columns));
    "match_rms_adamw", 0.2 sqrt(max(rows, columns)); "spectral_unclamped", sqrt(rows / columns).
use_muon: False: the parameters step as AdamW, which embeddings, the head, norms and biases need.
    optim8.muon_groups(model) makes the groups. With True all must be matrices, or of three dimensions: stacks of
    matrices, one for each expert.
betas: with use_muon=False the decay rates of AdamW's two moments, each in [0, 1).
""",
        "`momentum_buffer`, or with use_muon=False `exp_avg`, `exp_avg_sq`",
    )
    rule = "muon"

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Coefficients = (3.4445, -4.775, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: Adjustment | None = None,
        *,
        use_muon: bool = True,
        betas: Betas = (0.9, 0.999),
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


class PagedMuon8bit(Muon8bit):
    """Muon8bit whose state lives where `paged`, an optim8.paging.Pager, says; by default in a memory-mapped file."""

    always_paged = True
