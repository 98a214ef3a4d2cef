"""Restores a state dict as it was saved: takes out what torch.distributed.checkpoint.state_dict has mixed in.

Where torch loads a whole dict, it hands over the optimizer's own state dict, into which it has put the loaded values:
on every rank those under keys that both dicts have, and on rank 0 also those under other keys (inbox.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from optim8.checkpoint.inbox import Inbox, is_nothing
from optim8.codec import blocks
from optim8.rules import Moment
from optim8.state import shards, tiles
from optim8.state.layout import PARAM_LOW, dense_stride
from optim8.step.hypers import EXTRA_DEFAULTS


def sort(
    owner: str,
    moments: Sequence[Moment],
    groups: Sequence[dict[str, Any]],
    state: Mapping[Any, dict[str, Any]],
    state_dict: dict[str, Any],
) -> dict[str, Any]:
    """A state dict as it was saved. One that torch did not mix comes back as it is. Does not check whether it fits.

    Args:
        owner: names the optimizer, for messages.
        moments: the states of the rule.
        groups, state: of the optimizer.
        state_dict: as load_state_dict was given it.

    Raises:
        ValueError: torch handed over a count of steps and nothing else.
    """
    saved, entries = state_dict.get("param_groups"), state_dict.get("state")
    if not isinstance(saved, list) or not isinstance(entries, dict):
        return state_dict
    sorted_, mixed = dict(entries), False
    for group, own in zip(saved, groups):
        ids = group.get("params") if isinstance(group, dict) else None
        for key, param in zip(ids or (), own["params"]):
            entry = entries.get(key)
            if isinstance(entry, dict) and entry:
                present = state.get(param, {})
                sorted_[key] = of_param = _sort_entry(f"{owner}: state[{key!r}]", moments, param, entry, present)
                mixed = mixed or _holds_floats_of_others(moments[0], param, entry, of_param)
    own_options = all(group.get(name) == own[name] for group, own in zip(saved, groups) for name in EXTRA_DEFAULTS)
    if mixed and own_options:
        # Those options are the optimizer's own, then, and the dict is that of another library.
        saved = [{name: v for name, v in group.items() if name not in EXTRA_DEFAULTS} for group in saved]
        counts = [entry["step"] for entry in state.values() if isinstance(entry, dict) and "step" in entry]
        for entry in sorted_.values():
            if any(entry.get("step") is count for count in counts):
                del entry["step"]  # lion-pytorch counts none; this is the optimizer's own
    return {**state_dict, "state": sorted_, "param_groups": saved}


def _sort_entry(
    where: str, moments: Sequence[Moment], param: torch.Tensor, entry: dict[str, Any], present: Mapping[str, Any]
) -> dict[str, Any]:
    sorted_ = dict(entry)
    for moment in moments:
        for key in moment.keys:
            if key in entry:
                sorted_[key] = _unpack(moment, key, entry[key], param)
                if is_nothing(sorted_[key], param):
                    del sorted_[key]
        if moment.root and moment.direct.absmax in sorted_:  # came from an earlier version; the rest is the optimizer's
            own = (moment.codes, moment.low, moment.absmax, *([moment.name] if moment.direct.codes in sorted_ else []))
            sorted_ = {key: value for key, value in sorted_.items() if key not in own}
        if moment.name in sorted_ and moment.codes in sorted_ and present:
            # Both precisions: the optimizer's own, and what came.
            quantized = moment.absmax in present
            del sorted_[moment.codes if quantized else moment.name]
            if quantized and sorted_[moment.name].is_floating_point():
                sorted_.pop(moment.absmax, None)
                sorted_.pop(moment.low, None)
    if PARAM_LOW in entry:
        sorted_[PARAM_LOW] = _unpack(moments[0], PARAM_LOW, entry[PARAM_LOW], param)
        if is_nothing(sorted_[PARAM_LOW], param):
            del sorted_[PARAM_LOW]
    own_count = "step" in present and entry.get("step") is present["step"]
    keys = [key for m in moments for key in m.keys if key in entry]
    for moment in moments:
        # Low bytes of the optimizer's own beside codes that came.
        came = moment.codes in sorted_ and not _is_own(moment.codes, entry, present)
        if came and moment.low in sorted_ and moment.low in present:
            held = _held(entry[moment.low])
            nothing_came = isinstance(held, Inbox) and held.came is not None and is_nothing(held.came, param)
            if nothing_came or _is_own(moment.low, entry, present):
                del sorted_[moment.low]
    untouched = [key for key in keys if not is_nothing(entry[key], param) and _is_own(key, entry, present)]
    missing = [key for key in untouched if key in sorted_]
    if missing and present and not own_count:
        raise ValueError(
            f"{where} has a count of steps, but nothing came for {', '.join(map(repr, missing))}: "
            "set_optimizer_state_dict hands over to all ranks what stands under the keys of optim8 and, for sharded "
            "parameters, of torch.optim. Call optimizer.load_state_dict with the whole dict on every rank instead."
        )
    return sorted_


def _is_own(key: str, entry: dict[str, Any], present: Mapping[str, Any]) -> bool:
    """Whether a tensor is that of the optimizer's own state dict, untouched, in a state that was put together anew."""
    held = _held(entry[key])
    if isinstance(held, Inbox):
        return held.home != id(entry) and not held.touched
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return several and entry is not present and entry[key] is present.get(key)


def _holds_floats_of_others(
    moment: Moment, param: torch.Tensor, entry: dict[str, Any], sorted_: dict[str, Any]
) -> bool:
    """Whether values came beside codes of the optimizer's own, or in a dtype that is never its own."""
    values = sorted_.get(moment.name)
    if not isinstance(values, torch.Tensor) or not values.is_floating_point():
        return False
    own_codes = moment.codes in entry and not is_nothing(entry[moment.codes], param)
    return own_codes or values.dtype != torch.float32


def _held(value: Any) -> Any:
    """The local tensor of a DTensor itself."""
    if not shards.is_dtensor(value):
        return None
    with torch.no_grad():
        return value.to_local()


def _unpack(moment: Moment, key: str, value: Any, param: torch.Tensor) -> Any:
    """What came into an inbox of a sharded state; any other value as it is."""
    held = _held(value)
    # Older versions of torch replace the tensor, and say that it is as large as the one before.
    part = held.came if isinstance(held, Inbox) else held if is_nothing(value, param) else None
    if part is None or is_nothing(part, param) or not shards.is_dtensor(param):
        return value
    shape, stride = tuple(param.shape), dense_stride(param)
    is_absmax = key in (moment.absmax, moment.direct.absmax)
    if is_absmax and part.dim() == 1:
        shape, stride = (blocks(param.numel()),), (1,)
    elif is_absmax:
        shape = tiles.tiled_shape(shape, *shards.tiling_of(param))
        stride = shards.contiguous_stride(shape)
    return shards.wrap(part, shape, stride, param)
