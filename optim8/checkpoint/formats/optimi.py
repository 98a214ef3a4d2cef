"""What optimi's Adam and AdamW save (torch-optimi 0.3.3): averages that hold their bias correction, one count of steps
for a group, and for 16-bit weights with Kahan summation the part that did not fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from optim8.checkpoint.formats import bias_correction, common, groups, rest
from optim8.rules import Moments
from optim8.state import report
from optim8.state.moments import Entry

_REST = "kahan_comp"
# How it runs, and what is read from the group otherwise.
_DROPPED = ("kahan_sum", "triton", "gradient_release", "setup", "step", "foreach")
_DECAY = ("decouple_wd", "decouple_lr", "max_lr")
_BETAS = ("beta1", "beta2")


def _claims(saved: Sequence[dict[str, Any]], entries: Sequence[dict[str, Any]]) -> bool:
    return any("decouple_lr" in group and "gradient_release" in group for group in saved)


def _unpack(state_dict: dict[str, Any]) -> dict[str, Any]:
    return bias_correction.for_each_state(state_dict, lambda group, entry: entry, _BETAS, "step")


def _read_group(where: str, rule: str, group: dict[str, Any]) -> dict[str, Any]:
    read = {name: value for name, value in group.items() if name not in (*_DROPPED, *_DECAY, *_BETAS)}
    if all(name in group for name in _BETAS):
        read["betas"] = tuple(group[name] for name in _BETAS)
    # By the learning rate's share of its largest value: lr / max_lr * weight_decay.
    decoupled = bool(group.get("decouple_wd") or group.get("decouple_lr"))
    if group.get("decouple_lr") and group.get("weight_decay"):
        read["weight_decay"] = float(group["weight_decay"]) / float(group["max_lr"])
    groups.check(where, rule, {**read, "decoupled_weight_decay": decoupled})
    return {**read, "amsgrad": False}


def _read_entry(where: str, moments: Moments, param: torch.Tensor, entry: dict[str, Any]) -> Entry:
    common.no_other_keys(where, entry, ["step", _REST, bias_correction.BETAS, *(moment.name for moment in moments)])
    floats = {m.name: common.tensor(where, entry, m.name, common.FLOATS, param.shape) for m in moments}
    read = bias_correction.read(where, moments, entry, floats)
    if entry.get(_REST) is not None:
        kahan = common.tensor(where, entry, _REST, common.FLOATS, param.shape)
        rest.put(where, _REST, moments, param, kahan, read)
    report.note(where, lambda: torch.ones((), dtype=torch.bool).expand(param.shape), _ALIKE)
    return read


_ALIKE = "are taken for Adam's: the dict of optimi's RAdam has the same keys, and nothing tells it apart."


def _options(rule: str) -> Sequence[str]:
    return ("lr", *_BETAS, "eps", "weight_decay", "decouple_wd")


def _has(rule: str) -> bool:
    return rule in ("adam", "adamw")


FORMAT = common.Format("optimi", False, _claims, _read_group, _read_entry, _options, _has, unpack=_unpack)
