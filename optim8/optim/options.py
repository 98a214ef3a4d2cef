"""Checks of what a user may set on an optimizer or a parameter group."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch

MIN_8BIT_SIZE = 4096

# Set by group; filled in where a checkpoint of another optimizer lacks them.
EXTRA_DEFAULTS = {"min_8bit_size": MIN_8BIT_SIZE, "optim_bits": 8}


def _number(owner: str, name: str, value: Any, least: float, below: float = math.inf) -> None:
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(f"{owner}: {name} must have one element when it is a tensor, got {value.numel()}.")
        if value.device.type != "cpu":
            return  # looking at it would wait for the device
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{owner}: {name} must be a number, got {value!r}.")
    if not least <= float(value) < below:
        end = " and finite" if below == math.inf else f" and below {below:g}"
        raise ValueError(f"{owner}: {name} must be at least {least:g}{end}, got {value!r}.")


def check_group(owner: str, group: dict[str, Any]) -> None:
    """Raise ValueError or TypeError for the first option of a parameter group that cannot be honoured."""
    _number(owner, "lr", group["lr"], 0.0)
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"{owner}: betas must be a pair of numbers, got {betas!r}.")
    for i, beta in enumerate(betas):
        _number(owner, f"betas[{i}]", beta, 0.0, 1.0)
    _number(owner, "weight_decay", group["weight_decay"], 0.0)
    if "eps" in group:
        _number(owner, "eps", group["eps"], 0.0)
    if group.get("amsgrad"):
        raise ValueError(
            f"{owner}: amsgrad=True is not supported (it needs a third state). "
            "Use amsgrad=False, or torch.optim.AdamW(amsgrad=True) for these parameters."
        )
    if group.get("differentiable"):
        raise ValueError(
            f"{owner}: differentiable=True is not supported: quantized state has no gradient. "
            "Use differentiable=False, or the torch.optim optimizer for these parameters."
        )
    if group.get("fused") and group.get("foreach"):
        raise ValueError(f"{owner}: fused and foreach cannot both be True. Leave both out: a step is always one call.")
    size = group["min_8bit_size"]
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise ValueError(f"{owner}: min_8bit_size must be a whole number of values, 0 or more, got {size!r}.")
    if group["optim_bits"] not in (8, 32):
        raise ValueError(f"{owner}: optim_bits must be 8 or 32, got {group['optim_bits']!r}.")


def check_param(owner: str, group_index: int, index: int, param: torch.Tensor) -> None:
    """Raise ValueError where a parameter can never be stepped; what can still change is checked by each step."""
    if param.layout != torch.strided or param.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        kind = str(param.dtype) if param.layout == torch.strided else str(param.layout)
        raise ValueError(
            f"{owner}: parameter {index} of group {group_index} must be dense and float32, bfloat16 or float16, "
            f"got {kind.removeprefix('torch.')} {tuple(param.shape)}. Convert it, or leave it out."
        )
