"""The operators of steps of one tensor, which change parameter and state; ops.py says what an operator is for."""

from __future__ import annotations

from typing import Any

import torch

from optim8.functional import steps
from optim8.functional.ops import define


def _update_32bit(
    optimizer_name: str,
    g: torch.Tensor,
    p: torch.Tensor,
    state1: torch.Tensor,
    state2: torch.Tensor | None,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    step: int,
    lr: float,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    unorm_vec: torch.Tensor | None = None,
    max_unorm: float = 0.0,
    skip_zeros: bool = False,
) -> None:
    rest = (beta2, beta3, alpha, weight_decay, gnorm_scale, unorm_vec, max_unorm, skip_zeros)
    steps.optimizer_update_32bit(optimizer_name, g, p, state1, beta1, eps, step, lr, state2, *rest)


def _fake_8bit_blockwise(optimizer_name: str, g: torch.Tensor, p: torch.Tensor, *rest: Any, **named: Any) -> None:
    steps.check_tensors("optimizer_update_8bit_blockwise", g, p)


def _fake_32bit(optimizer_name: str, g: torch.Tensor, p: torch.Tensor, *rest: Any, **named: Any) -> None:
    steps.check_tensors("optimizer_update_32bit", g, p)


_TENSORS = "str optimizer_name, Tensor g, Tensor(a!) p, Tensor(b!) state1, Tensor(c!)? state2"
_SCALARS = "float beta1, float beta2, float beta3, float alpha, float eps, int step, float lr"
define(
    f"optimizer_update_8bit_blockwise({_TENSORS}, {_SCALARS}, Tensor qmap1, Tensor? qmap2, Tensor(d!) absmax1, "
    "Tensor(e!)? absmax2, float weight_decay=0.0, float gnorm_scale=1.0, bool skip_zeros=False) -> ()",
    steps.optimizer_update_8bit_blockwise,
    _fake_8bit_blockwise,
)
define(
    f"optimizer_update_32bit({_TENSORS}, {_SCALARS}, float weight_decay=0.0, float gnorm_scale=1.0, "
    "Tensor? unorm_vec=None, float max_unorm=0.0, bool skip_zeros=False) -> ()",
    _update_32bit,
    _fake_32bit,
)
