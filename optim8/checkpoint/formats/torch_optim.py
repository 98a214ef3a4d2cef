"""What the namesakes in torch.optim save, and lion-pytorch's Lion: moments in a float dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from optim8 import rules
from optim8.checkpoint.formats import common, groups
from optim8.rules import Moments
from optim8.state import report
from optim8.state.moments import Entry, values

# Options that say how torch runs a step. This optimizer decides that for itself, so it keeps its own values.
_WAYS_TO_RUN = ("foreach", "fused", "capturable", "differentiable")

# Whose groups say in the namesake how weight decay works, which the rule says here.
_DECOUPLED = {"adam": False, "adamw": True}
_UNWRITTEN = {"sgd": ("capturable",)}  # options that the namesake does not have
# What the count of steps is where the library counts none, by the state: Lion's rule needs no count, and that of
# torch's SGD only tells the first step, which makes the state.
_UNCOUNTED = {"exp_avg": 0.0, "momentum_buffer": 1.0}


def _claims(groups: Sequence[dict[str, Any]], entries: Sequence[dict[str, Any]]) -> bool:
    names = {moment.name for rule in rules.every().values() for moment in rule.moments}
    return not entries or any(not names.isdisjoint(entry) for entry in entries)


def read_group(where: str, rule: str, group: dict[str, Any]) -> dict[str, Any]:
    """A group's options; those that this rule cannot honour are refused."""
    if group.get("amsgrad") and not rules.rule(rule).has("amsgrad"):
        common.fail(where, "['amsgrad']", "must be False, got True", "The dict is of Adam or AdamW.")
    if rule == "lion" and "eps" in group:
        common.fail(where, "['eps']", "is no option of Lion", "The dict is of another optimizer, such as Adam.")
    groups.check(where, rule, group)
    dropped = (*_WAYS_TO_RUN, *(() if rules.rule(rule).has("amsgrad") else ("amsgrad",)))
    return {name: value for name, value in groups.known_only(group).items() if name not in dropped}


def options(rule: str) -> tuple[str, ...]:
    """What the namesake has written in every version; amsgrad tells Adam and AdamW from RAdam and NAdam."""
    return tuple(hyper.name for hyper in rules.rule(rule).hypers)


def _has(rule: str) -> bool:
    return rule == "lion" or rules.rule(rule).torch_name is not None


def _read_entry(where: str, moments: Moments, param: torch.Tensor, entry: dict[str, Any]) -> Entry:
    scalars = [scalar.name for scalar in moments.scalars]
    common.no_other_keys(where, entry, ["step", *scalars, *(moment.name for moment in moments)])
    uncounted = _UNCOUNTED.get(moments[0].name) if len(moments) == 1 and "step" not in entry else None
    read: Entry = {"step": common.step(where, entry) if uncounted is None else uncounted}
    read.update({name: common.number(where, entry, name) for name in scalars})
    for moment in moments:
        read[moment.name] = common.tensor(where, entry, moment.name, common.FLOATS, param.shape)
    if len(moments) > 1 and read[moments[1].name].dtype == torch.float16:
        first, second = (read[moment.name] for moment in moments)
        report.note(f"{where}[{moments[1].name!r}]", lambda: (second == 0) & (first != 0), _LOST)
    return read


_LOST = (
    "are 0 where the first moment is not: float16 has nothing between 0 and 6e-8. Their first steps are up to lr / eps "
    "times the first moment. Go on with a larger eps, or leave the state out."
)


FORMAT = common.Format("torch.optim or lion-pytorch", False, _claims, read_group, _read_entry, options, _has)


def write_group(where: str, rule: str, group: dict[str, Any]) -> dict[str, Any]:
    """A group as the other library writes it; `group` has no options that exist only here."""
    if rule in _DECOUPLED:
        return {**group, "decoupled_weight_decay": _DECOUPLED[rule]}
    if rule != "lion":
        return {name: value for name, value in group.items() if name not in _UNWRITTEN.get(rule, ())}
    if group["maximize"]:
        common.fail(where, "['maximize']", "must be False, got True", "lion-pytorch's Lion only descends.")
    return {name: value for name, value in group.items() if name not in (*_WAYS_TO_RUN, "maximize")}


def write_entry(moments: Moments, entry: Entry) -> dict[str, Any]:
    """A state in float32, in memory of its own."""
    written: dict[str, Any] = {
        scalar.name: torch.tensor(float(entry[scalar.name]), dtype=torch.float32) for scalar in moments.scalars
    }
    if moments[0].name not in _UNCOUNTED or len(moments) > 1:
        written["step"] = torch.tensor(float(entry["step"]), dtype=torch.float32)
    for moment in moments:
        source = entry[moment.name]
        device = source.device if isinstance(source, torch.Tensor) else source.codes.device
        floats = values(moment, source, device)
        written[moment.name] = floats.clone() if floats is source else floats
    return written
