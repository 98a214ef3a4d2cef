"""What the optimizers here save: codes and their scales, or float32; and what others keep with a parameter's state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from optim8 import codec, rules
from optim8.checkpoint.formats import common, groups
from optim8.rules import Moments
from optim8.state.layout import (
    LOW_DTYPES,
    PARAM_LOW,
    bits_of,
    dense,
    is_earlier,
    moments_in,
    moments_of,
    under_present_names,
)
from optim8.state.moments import Codes, Entry, Tiled, check_low, check_scales
from optim8.step.hypers import EXTRA_DEFAULTS

# The key of the dimensions of codes, the outermost in memory first, as torch.Tensor.dim_order gives them.
# It is saved where that is not their order: not all file formats keep strides, and blocks run in memory order.
_DIM_ORDER = "dim_order"


def _claims(saved: Sequence[dict[str, Any]], entries: Sequence[dict[str, Any]]) -> bool:
    quantized = any(str(key).endswith("_absmax") for entry in entries for key in entry)
    return quantized or any("optim_bits" in group for group in saved)


def _options(rule: str) -> tuple[str, ...]:
    return tuple(hyper.name for hyper in rules.rule(rule).hypers)


# A group that lacks some of EXTRA_DEFAULTS, as one of an earlier version does, may lack this too and takes the value of
# the optimizer that loads. Without it a group of today is LAMB's, which has the states and the other options of Adam.
_LATER = ("amsgrad",)


def _required(rule: str) -> tuple[str, ...]:
    return tuple(name for name in _options(rule) if name not in _LATER)


def _read_group(where: str, rule: str, group: dict[str, Any]) -> dict[str, Any]:
    known = dict.fromkeys((rule, *(other.family for other in rules.every().values())))
    groups.check_owner(where, rule, group, {name: _options(name) for name in known})
    if group.keys() >= EXTRA_DEFAULTS.keys():
        groups.check_complete(where, "optim8", group, [name for name in _options(rule) if name in _LATER])
    return group


def _read_entry(where: str, moments: Moments, param: torch.Tensor, entry: dict[str, Any]) -> Entry:
    entry = under_present_names(moments, entry)
    moments = moments_in(moments, entry)
    bits = bits_of(moments, entry)
    if not isinstance(entry.get("step"), (int, float)):
        common.tensor(where, entry, "step", (torch.float32,), ())
    scalars = [scalar.name for scalar in moments.scalars]
    read: Entry = {"step": common.step(where, entry), **{name: common.number(where, entry, name) for name in scalars}}
    known = ["step", *scalars]
    order = None
    if bits != 32 and _DIM_ORDER in entry:
        known.append(_DIM_ORDER)
        order = _read_order(where, entry[_DIM_ORDER], param.dim())
    for moment in moments:
        key, kind = moment.key(bits), torch.float32 if bits == 32 else torch.uint8
        known.append(key)
        read[moment.name] = values = common.tensor(where, entry, key, (kind,), param.shape)
        if bits != 32:
            low = None
            if moment.low in moment.keys_in(bits):
                known.append(moment.low)
                low = common.tensor(where, entry, moment.low, (kind,), param.shape)
                low = low if order is None else _laid_out(low, order)
            values = values if order is None else _laid_out(values, order)
            known.append(moment.absmax)
            scales = entry.get(moment.absmax)
            if isinstance(scales, torch.Tensor) and scales.dim() > 1:
                read[moment.name] = Tiled(values, scales, moment.root, low)
                continue
            scales = common.tensor(where, entry, moment.absmax, (torch.float32,), (codec.blocks(param.numel()),))
            checked = common.absmax(where, moment.absmax, scales)
            read[moment.name] = Codes(values, checked, root=moment.root, low=low)
            if type(values) is type(scales) is torch.Tensor:  # those of DTensors are looked at shard by shard
                check_scales(where, moment, codec.flat(dense(values)), scales.to(values.device))
            if low is not None and type(values) is type(low) is torch.Tensor:
                check_low(where, moment, values, low)
    if PARAM_LOW in entry:
        known.append(PARAM_LOW)
        # float16: as sharded dicts have it.
        dtypes = (*LOW_DTYPES.values(), torch.float16)
        read[PARAM_LOW] = common.tensor(where, entry, PARAM_LOW, dtypes, param.shape)
    for key, value in entry.items():
        if key not in known:
            if _is_of_moments(key):  # of another rule, or one that was renamed
                common.no_other_keys(where, entry, [other for other in entry if other != key])
            read[key] = value  # kept with the parameter by others
    return read


def _is_of_moments(key: Any) -> bool:
    """Whether a key contains the name of a state of any rule."""
    return any(moment.name in str(key) for rule in rules.every().values() for moment in rule.moments)


def _read_order(where: str, value: Any, dims: int) -> list[int]:
    order = value.tolist() if isinstance(value, torch.Tensor) and not value.is_floating_point() else None
    if not isinstance(order, list) or sorted(order) != list(range(dims)):
        got = common.describe(value) if order is None else order
        common.fail(where, f"[{_DIM_ORDER!r}]", f"must be whole numbers, an order of {dims} dimensions, got {got}")
    return order


def _laid_out(tensor: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """The same values with dimensions in this order in memory, without gaps."""
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return tensor.permute(*order).contiguous().permute(*inverse)


def with_dim_order(moments: Moments, entry: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state to be saved: where codes do not lie row after row, the dict says how."""
    moments = moments_of(moments, entry)
    if not moments or bits_of(moments, entry) == 32 or moments[0].values(entry).is_contiguous():
        return entry
    strides = moments[0].values(entry).stride()
    order = sorted(range(len(strides)), key=lambda dim: -strides[dim])
    return {**entry, _DIM_ORDER: torch.tensor(order, dtype=torch.int64, device="cpu")}


def is_own(moments: Moments, entry: dict[str, Any], bits: int) -> bool:
    """Whether a state that somebody put into an optimizer can be stepped as it is; the step looks at it closely."""
    if is_earlier(moments, entry):
        return False
    moments = moments_of(moments, entry)
    if bits_of(moments, entry) != 32:
        return _DIM_ORDER not in entry  # which only a saved one has
    own = {moment.name for moment in moments} | {scalar.name for scalar in moments.scalars}
    of_rules = [each.moments for each in rules.every().values()]
    others = {moment.name for each in of_rules for moment in each} | {s.name for each in of_rules for s in each.scalars}
    others -= own
    tensors = [entry.get(name) for name in ("step", *own)]
    in_float32 = all(isinstance(t, torch.Tensor) and t.dtype == torch.float32 for t in tensors)
    return in_float32 and bits == 32 and others.isdisjoint(entry)


FORMAT = common.Format("optim8", True, _claims, _read_group, _read_entry, _required)
