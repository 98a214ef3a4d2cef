"""Checks of what a user may set on an optimizer or a parameter group."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch

MIN_8BIT_SIZE = 4096

# Set by group; filled in where a checkpoint of another optimizer lacks them.
EXTRA_DEFAULTS = {"min_8bit_size": MIN_8BIT_SIZE, "optim_bits": 8}

# What one parameter may have otherwise than its group, with values that pass every check.
OVERRIDABLE: dict[str, Any] = {"lr": 0.0, "betas": (0.0, 0.0), "eps": 0.0, "weight_decay": 0.0, **EXTRA_DEFAULTS}

# Arguments of bitsandbytes' optimizers: the one value that is honoured, and what to do instead of the others.
_NEUTRAL: dict[str, tuple[Any, str]] = {
    "percentile_clipping": (100, "Clip with torch.nn.utils.clip_grad_norm_."),
    "block_wise": (True, "State is always scaled by blocks of 256 values."),
    "max_unorm": (0.0, "Clip with torch.nn.utils.clip_grad_norm_."),
    "skip_zeros": (False, "Leave parameters without a gradient at grad=None."),
}


def without_neutral(owner: str, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments without those of bitsandbytes that have the value which changes nothing; others are refused."""
    for name, (neutral, advice) in _NEUTRAL.items():
        if name in given and given[name] != neutral:
            raise ValueError(f"{owner}: {name} must be {neutral}, got {given[name]!r}. {advice}")
    return {name: value for name, value in given.items() if name not in _NEUTRAL}


def with_betas(owner: str, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments, with betas written as a string, such as "(0.9, 0.999)", as numbers."""
    betas = given.get("betas")
    if not isinstance(betas, str):
        return given
    try:
        numbers = tuple(float(part) for part in betas.strip().strip("()[]").split(","))
    except ValueError:
        raise ValueError(f'{owner}: betas must be a pair of numbers, or like "(0.9, 0.999)", got {betas!r}.') from None
    return {**given, "betas": numbers}


def completed(owner: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """The defaults of an optimizer from its arguments, with what bitsandbytes also takes (`kwargs`) in our names.

    Raises:
        TypeError: an argument is not known.
        ValueError: an argument cannot be honoured.
    """
    defaults = dict(defaults)
    extra: dict[str, Any] = defaults.pop("kwargs", {})
    args, is_paged = extra.pop("args", None), extra.pop("is_paged", False)
    if args is not None:
        there = [name for name in (*EXTRA_DEFAULTS, *_NEUTRAL) if hasattr(args, name)]
        extra = {**extra, **{name: getattr(args, name) for name in there}}
    for name, value in without_neutral(owner, extra).items():
        if name not in EXTRA_DEFAULTS:
            raise TypeError(f"{owner}: {name!r} is no argument of this optimizer.")
        defaults[name] = value
    if is_paged and defaults.get("paged") is None:
        defaults["paged"] = True
    elif is_paged and not defaults["paged"]:
        raise ValueError(f"{owner}: is_paged=True contradicts paged=False. Leave one out.")
    return with_betas(owner, defaults)


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
    """Raise ValueError where a parameter can never be stepped; what can still change is checked by each step.

    A frozen parameter may be of any kind, such as the integer weights of a quantized model: it gets no gradient.
    """
    if not param.requires_grad:
        return
    if param.layout != torch.strided or param.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        kind = str(param.dtype) if param.layout == torch.strided else str(param.layout)
        raise ValueError(
            f"{owner}: parameter {index} of group {group_index} must be dense and float32, bfloat16 or float16, "
            f"got {kind.removeprefix('torch.')} {tuple(param.shape)}. Convert it, or leave it out."
        )


def wants_8bit(options: dict[str, Any], param: torch.Tensor) -> bool:
    """Whether new state of `param` is 8-bit under these options, those of its group or its own."""
    return bool(options["optim_bits"] == 8 and param.numel() >= options["min_8bit_size"])
