"""State that comes to an optimizer: state dicts, what an earlier run left, and checks of what was there."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch

from optim8 import codec, rules
from optim8.checkpoint import adopt, arrivals, formats, read
from optim8.checkpoint.optimizer import Checkpointed
from optim8.state.layout import dense_stride, moments_of, others, own_keys
from optim8.state.moments import check_low
from optim8.state.moments import check_scales as check_scales_of
from optim8.step import hypers, pending, supply
from optim8.step.run import is_capturing


def resume(optimizer: Checkpointed, first: int) -> None:
    """Bring what an earlier run kept to the parameter groups from `first` on: options and state."""
    for param, entry in optimizer.memory.resume(optimizer.param_groups, first):
        adopt.put(optimizer, param, entry)


def load_state_dict(optimizer: Any, state_dict: dict[str, Any]) -> None:
    """Do what BlockwiseOptimizer.load_state_dict describes."""
    owner, rule = f"{type(optimizer).__name__}.load_state_dict", rules.rule(optimizer.rule)
    if not isinstance(state_dict, dict):
        raise TypeError(
            f"{owner}: state_dict must be a dict, as state_dict() gives it, got {type(state_dict).__name__}."
        )
    pending.wait()
    optimizer.windows.sync()
    state_dict = state_dict.copy()
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        changed = pre_hook(optimizer, state_dict)
        if changed is not None:
            state_dict = changed
    state_dict = arrivals.sort(owner, rule.moments, optimizer.param_groups, optimizer.state, state_dict)
    known = formats.recognise(owner, rule.name, state_dict)
    saved = [
        known.read_group(f"{owner}: param_groups[{index}]", rule.name, group)
        for index, group in enumerate(state_dict["param_groups"])
    ]
    groups = read.merge_groups(owner, optimizer.param_groups, deepcopy(saved))
    for group in groups:
        group.update({**hypers.EXTRA_DEFAULTS, **group})
        hypers.normalize_group(owner, rule, group)
    with optimizer.turn:
        supply.resolve(optimizer)
        state = read.read_state(owner, optimizer, known, known.unpack(state_dict), groups)
        optimizer.__setstate__({"state": state, "param_groups": groups})
        optimizer.known_overrides = None
        optimizer.state_checked = True
        optimizer.memory.end_loading()
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def check_before_step(optimizer: Checkpointed) -> None:
    """Check once the state that was there before the first step, since any code may have changed it, and what others
    keep with it.

    Raises:
        ValueError: scales were lost, parameters are not those of a kept directory, or it would lose what others keep.
    """
    if not optimizer.state_checked and not is_capturing():
        _check_scales(optimizer)
        optimizer.state_checked = True
    optimizer.memory.check_before_step(optimizer.param_groups)
    if optimizer.memory.is_paged:
        _check_others(optimizer)


def _check_scales(optimizer: Checkpointed) -> None:
    for at, group in enumerate(optimizer.param_groups):
        for index, param in enumerate(group["params"]):
            entry = optimizer.state.get(param) or {}
            where = f"{type(optimizer).__name__}: {hypers.name_of(group, index)} of group {at}: state"
            for moment in moments_of(optimizer.moments, entry):
                codes, absmax = entry.get(moment.codes), entry.get(moment.absmax)
                if not (type(codes) is type(absmax) is torch.Tensor and codes.dtype == torch.uint8):
                    continue  # the step itself reports what else is wrong
                if absmax.shape == (codec.blocks(codes.numel()),) and codes.stride() == dense_stride(codes):
                    check_scales_of(where, moment, codec.flat(codes), absmax)
                low = entry.get(moment.low)
                if type(low) is torch.Tensor and low.shape == codes.shape:
                    check_low(where, moment, codes, low)


def _check_others(optimizer: Checkpointed) -> None:
    own = own_keys(optimizer.moments)
    for number, group in enumerate(optimizer.param_groups):
        for index, param in enumerate(group["params"]):
            entry = optimizer.state.get(param)
            if entry and not own.issuperset(entry):
                where = f"{type(optimizer).__name__}: parameter {index} of group {number}: state"
                optimizer.memory.check_others(where, others(optimizer.moments, entry))
