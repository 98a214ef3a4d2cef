"""Whole weights of models whose optimizers keep more of them than their parameters have: out, and in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from optim8.checkpoint.adopt import adopt_states
from optim8.optim.base import BlockwiseOptimizer
from optim8.state.layout import PARAM_LOW, dense_stride, master_bits_of
from optim8.state.shards import is_dtensor, local, shard_of, wrap
from optim8.state.weights import join, part
from optim8.step import pending, supply

Optimizers = BlockwiseOptimizer | Iterable[BlockwiseOptimizer]


@torch.no_grad()
def master_state_dict(model: torch.nn.Module, optimizer: Optimizers) -> dict[str, Any]:
    """The state dict of a model with all its weights in float32: with the bits that `master_bits` keeps beside them.

    Args:
        model: whose weights they are, sharded with fully_shard or not.
        optimizer: one, or several, whose parameters are of the model. Others' parameters are only converted.

    Returns:
        What model.state_dict() gives, with copies of floating-point parameters in float32; DTensors stay DTensors.
        Buffers are the model's own.

    Raises:
        TypeError: an optimizer is not one of this library.

    Examples:
        >>> import torch, optim8
        >>> model = torch.nn.Linear(64, 64).bfloat16()
        >>> optimizer = optim8.AdamW8bit(model.parameters(), lr=1e-6, master_bits=24)
        >>> model(torch.ones(1, 64).bfloat16()).sum().backward()
        >>> optimizer.step()
        >>> weights = optim8.master_state_dict(model, optimizer)
        >>> weights["weight"].dtype
        torch.float32
    """
    optimizers = _ready("master_state_dict", optimizer)
    lows = {id(p): entry[PARAM_LOW] for each in optimizers for p, entry in each.state.items() if PARAM_LOW in entry}
    weights: dict[str, Any] = dict(model.state_dict())
    for name, param in model.named_parameters(remove_duplicate=False):
        if name not in weights or not param.is_floating_point():
            continue
        low = lows.get(id(param))
        if low is None:
            weights[name] = param.detach().to(torch.float32, copy=True)
            continue
        wide = join(local(param), local(low))
        weights[name] = wrap(wide, param.shape, dense_stride(param), param) if is_dtensor(param) else wide
    return weights


@torch.no_grad()
def load_master_state_dict(model: torch.nn.Module, optimizer: Optimizers, state_dict: Mapping[str, Any]) -> None:
    """Load weights in float32, as `master_state_dict` gives them, into a model of any dtype: each parameter becomes the
    nearest number of its dtype, and what `master_bits` keeps beside it the rest.

    Args:
        model: whose weights they are, sharded with fully_shard or not.
        optimizer: one, or several, whose parameters are of the model. Moments and counts of steps stay.
        state_dict: the weights, of all parameters and buffers; tensors, or DTensors on the parameters' meshes.

    Raises:
        TypeError: an optimizer is not one of this library.
        ValueError: a name, a shape, or the width of a state's low bits does not fit; nothing was changed.
    """
    who = "load_master_state_dict"
    optimizers = _ready(who, optimizer)
    _check(who, model, state_dict)
    params = dict(model.named_parameters(remove_duplicate=False))
    named = {id(param): name for name, param in params.items()}
    for each in optimizers:
        _check_lows(who, each, named)
    placed = {name: _as_placed(who, params.get(name), name, value) for name, value in state_dict.items()}
    model.load_state_dict(placed)
    for each in optimizers:
        with each.turn, each.memory.rewriting(each.param_groups, each.state):
            _load_lows(who, each, named, state_dict)


def _wide_params(optimizer: Any, named: Mapping[int, str]) -> Iterator[tuple[dict[str, Any], torch.Tensor, int]]:
    """The parameters of the model that have low bits by their options: their group, and the bits of their weights."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            master_bits = supply.moments_wanted(optimizer, group, param).master_bits
            if id(param) in named and master_bits != 16:
                yield group, param, master_bits


def _check_lows(who: str, optimizer: Any, named: Mapping[int, str]) -> None:
    for _, param, master_bits in _wide_params(optimizer, named):
        entry = optimizer.state.get(param)
        if entry and master_bits_of(entry) != master_bits:
            raise ValueError(
                f"{who}: the state of {named[id(param)]!r} must be that of a weight of {master_bits} bits, got "
                f"{master_bits_of(entry)}. Bring it there with optimizer.load_state_dict(optimizer.state_dict()). "
                "Nothing was changed."
            )


def _load_lows(who: str, optimizer: Any, named: Mapping[int, str], state_dict: Mapping[str, Any]) -> None:
    for group, param, _ in _wide_params(optimizer, named):
        if not optimizer.state.get(param):
            supply.allocate_states(optimizer, [(group, param)])
        name, low = named[id(param)], optimizer.state[param][PARAM_LOW]
        value = state_dict[name]
        wide = shard_of(who, name, value, param) if is_dtensor(param) else value
        part(wide.detach().float(), local(param), local(low))


def _as_placed(who: str, param: torch.Tensor | None, name: str, value: Any) -> Any:
    """A weight as load_state_dict takes it: for a DTensor, one that lies as it does."""
    if param is None or not is_dtensor(param):
        return value
    return wrap(shard_of(who, name, value, param), param.shape, dense_stride(param), param)


def _check(who: str, model: torch.nn.Module, state_dict: Mapping[str, Any]) -> None:
    needed = model.state_dict()
    missing, unknown = needed.keys() - state_dict.keys(), state_dict.keys() - needed.keys()
    if missing or unknown:
        lacks, has = (", ".join(map(repr, sorted(names))) or "none" for names in (missing, unknown))
        raise ValueError(
            f"{who}: state_dict must have the names of model.state_dict(); it lacks {lacks} and has {has} besides. "
            "Nothing was changed."
        )
    for name, value in needed.items():
        given = state_dict[name]
        if isinstance(value, torch.Tensor) and tuple(getattr(given, "shape", ())) != tuple(value.shape):
            raise ValueError(
                f"{who}: {name!r} must be a tensor {tuple(value.shape)}, got "
                f"{type(given).__name__} {tuple(getattr(given, 'shape', ()))}. Nothing was changed."
            )


def _ready(who: str, optimizer: Optimizers) -> list[BlockwiseOptimizer]:
    optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
    for each in optimizers:
        if not isinstance(each, BlockwiseOptimizer):
            raise TypeError(f"{who}: optimizer must be one of optim8, or several, got {type(each).__name__}.")
        each.windows.sync()
        adopt_states(each)
        supply.resolve(each)
    pending.wait()
    return optimizers
