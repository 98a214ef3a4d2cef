"""What heavyball's AdamW saves (3.2.1): a dict for each view of a parameter, and averages that hold their bias
correction, in float32 or bfloat16, or in 16 bits with the rest in 8 or 16 (`ecc`), as weights may be (`param_ecc`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from optim8.checkpoint.formats import bias_correction, common, groups, rest
from optim8.rules import Moments
from optim8.state import report
from optim8.state.moments import Entry

_PREFIX, _SUFFIX, _REST = "update_by_adam_", "_0", "::ecc"
_PARAM_REST = f"param{_REST}"
# How it runs; what a step or an option that is off leaves behind.
_DROPPED = (
    *("multi_tensor", "storage_dtype", "ecc", "param_ecc", "param_count", "is_preconditioning", "warmup_steps"),
    *("base_lr", "prev_lr", "step_count", "step", "mars_gamma", "beta2_scale"),
)
# Options that change the update, with the value that does not.
_NEUTRAL = {"caution": False, "mars": False, "cautious_weight_decay": False, "palm": False}


def _claims(saved: Sequence[dict[str, Any]], entries: Sequence[dict[str, Any]]) -> bool:
    return any("storage_dtype" in group and "mars" in group for group in saved)


def _unpack(state_dict: dict[str, Any]) -> dict[str, Any]:
    return bias_correction.for_each_state(state_dict, _of_views, ("betas",), "step_count")


def _of_views(group: dict[str, Any], entry: dict[Any, Any]) -> dict[str, Any]:
    """The state of a parameter, of which there is one view: it is split by optimizers that precondition."""
    views = list(entry.values())
    if len(views) != 1 or not isinstance(views[0], dict):
        return {str(key): value for key, value in entry.items()}  # _read_entry names the first
    known = {key: value for key, value in views[0].items() if key not in ("is_initialized", "step")}
    names = {key: key.removeprefix(_PREFIX) for key in known}
    for key, name in names.items():
        if key != name:
            stem, rest = name.removesuffix(_REST), _REST if name.endswith(_REST) else ""
            names[key] = stem.removesuffix(_SUFFIX) + rest
    return {"eps": group.get("eps"), **{names[key]: value for key, value in known.items()}}


def _read_group(where: str, rule: str, group: dict[str, Any]) -> dict[str, Any]:
    for name, neutral in _NEUTRAL.items():
        if group.get(name, neutral) != neutral:
            common.fail(where, f"[{name!r}]", f"is {group[name]!r}, which changes the update", _ADVICE)
    steps, wait = (int(group.get(name) or 0) for name in ("step_count", "warmup_steps"))
    if wait > steps:
        advice = "Set it to 0 in the dict, and warm up with a scheduler of torch.optim.lr_scheduler."
        common.fail(where, "['warmup_steps']", f"is {wait} after {steps} steps, which changes the update", advice)
    read = {name: value for name, value in group.items() if name not in (*_DROPPED, *_NEUTRAL)}
    groups.check(where, rule, read)
    return {**read, "lr": float(group.get("base_lr", group["lr"])), "amsgrad": False}


_ADVICE = "AdamW8bit has no such option: train on without it from a dict that says so."


def _read_entry(where: str, moments: Moments, param: torch.Tensor, entry: dict[str, Any]) -> Entry:
    names = [moment.name for moment in moments]
    known = ["step", "eps", bias_correction.BETAS, _PARAM_REST, *names, *(name + _REST for name in names)]
    common.no_other_keys(where, entry, known)
    floats = {}
    for name in names:
        floats[name] = common.tensor(where, entry, name, common.FLOATS, param.shape)
        if name + _REST in entry:
            floats[name] = floats[name].to(torch.float32) + _rest(where, name + _REST, entry, floats[name])
    read = bias_correction.read(where, moments, entry, floats)
    if _PARAM_REST in entry:
        rest.put(where, _PARAM_REST, moments, param, _rest(where, _PARAM_REST, entry, param), read)
    second, eps = floats[names[-1]], float(entry["eps"] or 0.0)
    report.note(f"{where}[{names[-1]!r}]", lambda: second.sqrt() < 100 * eps, _FLOOR)
    return read


_FLOOR = (
    "have a root below 100 eps: heavyball's eps is the least that it divides by, and here it is added, so their steps "
    "become shorter by 1 % and more, down to a half."
)


def _rest(where: str, key: str, entry: dict[str, Any], value: torch.Tensor) -> torch.Tensor:
    """What `ecc` keeps of 16-bit values."""
    return rest.of_shares(value, common.tensor(where, entry, key, (torch.int8, torch.int16), value.shape))


def _options(rule: str) -> Sequence[str]:
    return ("lr", "betas", "eps", "weight_decay", "caution", "ecc", "param_ecc")


def _has(rule: str) -> bool:
    return rule == "adamw"


FORMAT = common.Format("heavyball", False, _claims, _read_group, _read_entry, _options, _has, unpack=_unpack)
