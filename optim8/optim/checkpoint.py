"""Reading state dicts: everything is checked and copied before an optimizer changes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch

from optim8.optim import states
from optim8.optim.states import Moment


def merged_groups(owner: str, groups: list[dict[str, Any]], saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The saved groups with the optimizer's parameters; options that were not saved keep their present values.

    Raises:
        ValueError: number or sizes of the groups differ.
    """
    if len(groups) != len(saved):
        raise ValueError(f"{owner}: param_groups must be {len(groups)} groups, got {len(saved)}.")
    merged = []
    for index, (group, loaded) in enumerate(zip(groups, saved, strict=True)):
        if len(group["params"]) != len(loaded["params"]):
            raise ValueError(
                f"{owner}: param_groups[{index}] must have {len(group['params'])} parameters, "
                f"got {len(loaded['params'])}."
            )
        merged.append({**group, **loaded, "params": group["params"], "saved_ids": loaded["params"]})
    return merged


def loaded_state(
    owner: str, moments: Sequence[Moment], state_dict: dict[str, Any], groups: list[dict[str, Any]]
) -> defaultdict[Any, Any]:
    """State for the optimizer's own parameters, copied from a saved one. Takes `saved_ids` out of the groups."""
    saved_ids = list(chain.from_iterable(group.pop("saved_ids") for group in groups))
    params = list(chain.from_iterable(group["params"] for group in groups))
    by_id = dict(zip(saved_ids, params, strict=True))
    state: defaultdict[Any, Any] = defaultdict(dict)
    present: list[tuple[torch.Tensor, dict[str, Any]]] = []
    for key, entry in state_dict["state"].items():
        if key not in by_id:
            if isinstance(key, int):
                raise ValueError(
                    f"{owner}: state[{key}] is of no parameter in param_groups. Load a complete state dict."
                )
            state[key] = entry  # not of a parameter: kept as it is, as torch.optim does
        elif entry:
            _check_entry(f"{owner}: state[{key!r}]", moments, by_id[key], entry)
            present.append((by_id[key], entry))
    by_device: dict[torch.device, list[tuple[torch.Tensor, dict[str, Any]]]] = {}
    for param, entry in present:
        by_device.setdefault(param.device, []).append((param, entry))
    for pairs in by_device.values():
        fresh = states.allocate(moments, [(param, moments[0].absmax in entry) for param, entry in pairs])
        for (param, entry), target in zip(pairs, fresh, strict=True):
            _copy_entry(moments, entry, target)
            state[param] = target
    return state


def copied_entry(moments: Sequence[Moment], param: torch.Tensor, entry: dict[str, Any]) -> dict[str, Any]:
    """The state of one parameter, laid out as the parameter is now."""
    (fresh,) = states.allocate(moments, [(param, moments[0].absmax in entry)])
    _copy_entry(moments, entry, fresh)
    return fresh


def _expect(where: str, name: str, entry: dict[str, Any], dtypes: Sequence[torch.dtype], shape: Sequence[int]) -> None:
    value = entry.get(name)
    if isinstance(value, torch.Tensor) and value.dtype in dtypes and tuple(value.shape) == tuple(shape):
        return
    types = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    got = "nothing" if name not in entry else type(value).__name__
    if isinstance(value, torch.Tensor):
        got = f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    raise ValueError(
        f"{where}[{name!r}] must be {types} {tuple(shape)}, got {got}. "
        "Load a state dict that this optimizer wrote for the same parameters."
    )


def _check_entry(where: str, moments: Sequence[Moment], param: torch.Tensor, entry: dict[str, Any]) -> None:
    in_8_bits = moments[0].absmax in entry
    known = {"step"}
    if not isinstance(entry.get("step"), (int, float)):
        _expect(where, "step", entry, (torch.float32,), ())
    if not 0 <= float(entry["step"]) < float("inf"):
        raise ValueError(f"{where}['step'] must be a count of steps, got {float(entry['step'])}.")
    for moment in moments:
        known.add(moment.name)
        _expect(where, moment.name, entry, (torch.uint8 if in_8_bits else torch.float32,), tuple(param.shape))
        if in_8_bits:
            known.add(moment.absmax)
            _expect(where, moment.absmax, entry, (torch.float32,), (states.blocks(param.numel()),))
            absmax = entry[moment.absmax]
            if not bool(((absmax >= 0) & absmax.isfinite()).all()):
                raise ValueError(
                    f"{where}[{moment.absmax!r}] must be finite and not negative. The checkpoint is damaged."
                )
    for name in entry:
        if name not in known:
            raise ValueError(
                f"{where}[{name!r}] is not a state of this optimizer (it has {', '.join(sorted(known))}). "
                "Load a state dict that this optimizer wrote."
            )


def _copy_entry(moments: Sequence[Moment], entry: dict[str, Any], target: dict[str, Any]) -> None:
    step = entry["step"]
    target["step"].fill_(float(step))
    for moment in moments:
        source, goal = entry[moment.name], target[moment.name]
        if moment.absmax not in entry:
            goal.copy_(source)
            continue
        if not source.is_contiguous():
            source = source.clone()  # keeps the strides of a dense tensor, and closes the gaps of others
        same_order = source.is_contiguous() if goal.is_contiguous() else source.stride() == goal.stride()
        if same_order:
            goal.copy_(source)
            target[moment.absmax].copy_(entry[moment.absmax])
            continue
        # Blocks run in memory order, so other strides mean other blocks: quantized anew.
        absmax = entry[moment.absmax].to(goal.device).contiguous()
        values = states.dequantize(moment, source.to(goal.device), absmax)
        relaid = torch.empty_strided(tuple(goal.shape), goal.stride(), dtype=torch.float32, device=goal.device)
        states.quantize(moment, relaid.copy_(values), goal, target[moment.absmax])
