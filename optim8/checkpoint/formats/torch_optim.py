"""What the namesakes in torch.optim save, and lion-pytorch's Lion: moments in a float dtype."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from optim8 import rules
from optim8.checkpoint.formats import common, groups
from optim8.rules import Moments
from optim8.state import report
from optim8.state.moments import Entry, values

# Options that say how torch runs a step. This optimizer decides that for itself, so it keeps its own values.
WAYS_TO_RUN = ("foreach", "fused", "capturable", "differentiable")

# Whose groups say in the namesake how weight decay works, which the rule says here.
_DECOUPLED = {"adam": False, "adamw": True}
# What the count of steps is where the library counts none, by the state: Lion's rule needs no count, nor does Muon's,
# and that of torch's SGD only tells the first step, which makes the state.
_UNCOUNTED = {"exp_avg": 0.0, "momentum_buffer": 1.0}

# Options of Muon for groups that it does not have in torch.optim.
_OURS = {"muon": ("use_muon", "betas")}
# What not every library writes whose Muon is torch's: those of muon-optimizer have neither nesterov nor eps, those of
# pytorch_optimizer no ns_coefficients. Where they are missing the optimizer keeps its own.
_MAY_LACK = {"muon": ("momentum", "nesterov", "eps", *groups.BESIDE["muon"])}
# All that muon-optimizer writes for Muon. Signed, quasi-hyperbolic and accelerated SGD have the same state.
_BARE = {"muon": ("lr", "momentum", "weight_decay")}


def _claims(groups: Sequence[dict[str, Any]], entries: Sequence[dict[str, Any]]) -> bool:
    names = {moment.name for rule in rules.every().values() for moment in rule.moments}
    return not entries or any(not names.isdisjoint(entry) for entry in entries)


def written(rule: str) -> tuple[str, ...]:
    """The options of the update that the namesake writes."""
    hypers = (hyper.name for hyper in rules.rule(rule).hypers if hyper.name not in _OURS.get(rule, ()))
    return (*hypers, *groups.BESIDE.get(rule, ()))


def read_group(where: str, rule: str, group: dict[str, Any]) -> dict[str, Any]:
    """A group's options; those that this rule cannot honour are refused, and so are those of another optimizer."""
    families = (other.family for other in rules.every().values() if other.torch_name)
    # Adam and AdamW write it since version 2.7.
    decoupled = tuple({"decoupled_weight_decay"} & group.keys())
    known = {name: (*written(name), *(decoupled if name in _DECOUPLED else ())) for name in (rule, *families)}
    known[rule] = (*known[rule], *_OURS.get(rule, ()))  # muon-optimizer also has groups for its AdamW
    groups.check_owner(where, rule, group, known)
    groups.check(where, rule, group)
    if rule in _BARE and group.keys().isdisjoint((*groups.BESIDE[rule], *_OURS[rule])):
        groups.check_only(where, group, _BARE[rule])
    return {name: value for name, value in groups.known_only(rule, group).items() if name not in WAYS_TO_RUN}


def options(rule: str) -> tuple[str, ...]:
    """What the namesake has written in every version; amsgrad tells Adam and AdamW from RAdam and NAdam."""
    return tuple(name for name in written(rule) if name not in _MAY_LACK.get(rule, ()))


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
    note_zeros(where, moments, read)
    return read


def note_zeros(where: str, moments: Moments, read: Entry) -> None:
    """Note in a report the second moments that float16 made 0; `read`: has floats."""
    if len(moments) > 1 and moments[0].signed and moments[1].root and read[moments[1].name].dtype == torch.float16:
        first, second = (read[moment.name] for moment in moments[:2])
        report.note(f"{where}[{moments[1].name!r}]", lambda: (second == 0) & (first != 0), _LOST)


_LOST = (
    "are 0 where the first moment is not: float16 has nothing between 0 and 6e-8. Their first steps are up to lr / eps "
    "times the first moment. Go on with a larger eps, or leave the state out."
)


FORMAT = common.Format("torch.optim or lion-pytorch", False, _claims, read_group, _read_entry, options, _has)


def write_group(where: str, rule: str, group: dict[str, Any]) -> dict[str, Any]:
    """A group as the other library writes it; `group` has no options that exist only here."""
    if rule == "lion":
        who, theirs = "lion-pytorch's Lion", set(written(rule))
    else:
        who, theirs = f"torch.optim.{rules.rule(rule).torch_name}", _arguments(where, rule)
    if group["maximize"] and "maximize" not in theirs:
        common.fail(where, "['maximize']", "must be False, got True", f"{who} only descends.")
    if group.get("use_muon") is False:
        advice = "torch.optim has AdamW for such groups: make them an AdamW8bit, and convert each."
        common.fail(where, "['use_muon']", f"must be True, got False: {who} has no such groups", advice)
    dropped = {*WAYS_TO_RUN, "maximize", *_OURS.get(rule, ())} - theirs
    kept = {name: value for name, value in group.items() if name not in dropped}
    return {**kept, "decoupled_weight_decay": _DECOUPLED[rule]} if rule in _DECOUPLED else kept


def _arguments(where: str, rule: str) -> set[str]:
    """Those of the namesake in this version of torch."""
    name = str(rules.rule(rule).torch_name)
    cls = getattr(torch.optim, name, None)
    if cls is None:
        common.fail(where, "rule", f"is {rule}, and torch {torch.__version__} has no torch.optim.{name}")
    return set(inspect.signature(cls).parameters)


def initial_entry(moments: Moments, param: torch.Tensor, group: dict[str, Any]) -> dict[str, Any] | None:
    """What the namesake has for a parameter before its first step; None: nothing, as most have."""
    if not any(moment.initial for moment in moments):
        return None
    new: dict[str, Any] = {"step": torch.tensor(0.0, dtype=torch.float32)}
    for moment in moments:
        value = float(group[moment.initial]) if moment.initial else 0.0
        new[moment.name] = torch.full_like(param, value, dtype=torch.float32, requires_grad=False)
    return new


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
