"""The groups of bitsandbytes' optimizers: what stands in `betas` and `eps` for each, and what it can honour."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optim8.checkpoint.formats import common, groups

# What `betas` holds there, by our names: None is what the optimizer does not use.
_BETAS: dict[str, tuple[str | None, str | None]] = {
    "sgd": ("momentum", None),
    "rmsprop": ("alpha", None),
    "adagrad": (None, None),
}
# Values that an option must have, since bitsandbytes knows no other.
_FIXED: dict[str, dict[str, Any]] = {
    "adam": {"amsgrad": False},
    "adamw": {"amsgrad": False},
    "sgd": {"dampening": 0.0, "nesterov": False},
    "rmsprop": {"momentum": 0.0, "centered": False},
    "adagrad": {"lr_decay": 0.0, "initial_accumulator_value": 0.0},
}
_RUN = ("maximize", "foreach", "fused", "capturable", "differentiable")


def has(rule: str) -> bool:
    """Whether bitsandbytes has an optimizer with this rule."""
    return rule in ("adam", "adamw", "lion", "ademamix", *_BETAS)


def options(rule: str) -> tuple[str, ...]:
    """What the groups have in every version."""
    return ("lr", "betas", "weight_decay", *(() if rule == "lion" else ("eps",)))


def read(where: str, rule: str, group: dict[str, Any]) -> dict[str, Any]:
    """A group's options under our names; those of an optimizer with another rule are refused."""
    count = 3 if rule == "ademamix" else 2
    if len(group.get("betas", (0,) * count)) != count:
        what = "three numbers, as AdEMAMix has" if count == 3 else "two numbers"
        common.fail(where, "['betas']", f"must be {what}, got {group['betas']}")
    if rule == "ademamix":
        groups.check(where, rule, group)
        # Without a schedule in the dict the optimizer keeps its own, which it was given for this run.
        return {name: value for name, value in groups.known_only(rule, group).items() if value is not None}
    group = {name: value for name, value in group.items() if name != "alpha" or value}  # 0 is none of AdEMAMix
    groups.check(where, rule, {"t_alpha": None, **group})  # which older versions do not write
    read = groups.known_only(rule, group)
    if rule in _BETAS:
        return _read_one_state(where, rule, read)
    # Its SGD, RMSprop and Adagrad also have one state, under Lion's name.
    if rule == "lion" and (read.pop("eps", 0.0) or not group.get("betas", (0, 1))[1]):
        _refuse(where, "eps" if group.get("eps") else "betas", group, "Lion")
    return read


def _read_one_state(where: str, rule: str, group: dict[str, Any]) -> dict[str, Any]:
    """A group of an optimizer with one state. In SGD `eps` is 0, and Lion is the one whose second beta counts; RMSprop
    and Adagrad have an `eps`, and of Adagrad both betas are 0."""
    first, second = (float(beta) for beta in group.get("betas", (0.0, 0.0)))
    if rule == "sgd" and (group.get("eps") or second or not first):
        _refuse(where, "eps" if group.get("eps") else "betas", group, "SGD", _DAMPENED if second else "")
    if rule == "rmsprop" and "betas" in group and not (group.get("eps") and first):
        _refuse(where, "betas" if not first else "eps", group, "RMSprop")
    if rule == "adagrad" and (first or second):
        _refuse(where, "betas", group, "Adagrad")
    read = {name: value for name, value in group.items() if name != "betas" and (name != "eps" or rule != "sgd")}
    if "betas" in group:
        read.update((name, beta) for name, beta in zip(_BETAS[rule], (first, second), strict=True) if name)
    return {**read, **_FIXED[rule]}


_DAMPENED = " The second is Lion's, or a dampening that bitsandbytes does not heed: set it to 0 in the dict then."


def _refuse(where: str, key: str, group: Mapping[str, Any], name: str, more: str = "") -> None:
    common.fail(where, f"[{key!r}]", f"is {group.get(key)}, which is no {name}'s", f"Load a dict of {name}.{more}")


def write(where: str, rule: str, group: dict[str, Any]) -> dict[str, Any]:
    """A group as bitsandbytes writes it; `group` has no options that exist only here."""
    if group["maximize"]:
        common.fail(where, "['maximize']", "must be False, got True", "bitsandbytes only descends.")
    if rule == "adam" and float(group["weight_decay"]):
        common.fail(
            where,
            "['weight_decay']",
            f"is {float(group['weight_decay']):g}, an L2 penalty: bitsandbytes' Adam decouples weight decay",
            "Set it to 0, or use AdamW8bit.",
        )
    fixed = _FIXED.get(rule, {})
    for name, value in fixed.items():
        if float(group[name]) != value:
            common.fail(where, f"[{name!r}]", f"must be {value}, got {group[name]}", _ADVICE.get(name, _UNKNOWN))
    written = {name: value for name, value in group.items() if name not in (*_RUN, *fixed)}
    written["lr"] = float(group["lr"])
    if rule in _BETAS:
        for name in filter(None, _BETAS[rule]):
            if not float(written[name]):
                common.fail(where, f"[{name!r}]", "must be above 0, got 0", "bitsandbytes refuses 0.")
        written["betas"] = tuple(float(written.pop(name)) if name else 0.0 for name in _BETAS[rule])
        return {"eps": 0.0, **written}
    written["betas"] = tuple(float(beta) for beta in group["betas"])
    if rule == "lion":
        return {**written, "eps": 0.0}
    return {"alpha": 0.0, "t_alpha": None, "t_beta3": None, **written}


_UNKNOWN = "bitsandbytes refuses any other value, or does not heed it."
_ADVICE = {"initial_accumulator_value": "Set it to 0: what the sums hold stays, and only new ones would start with it."}
