"""What the parameter groups of other optimizers say of the update, and what of it can be honoured.

A key of a group is one of three things:

1. An option of the rule, or of how it runs: lr, betas, maximize, foreach. It is honoured, or changes nothing.
2. An option that another optimizer has beside these: `_NEUTRAL`. It is taken with the value that changes nothing, and
   refused by its name with any other.
3. A note of a user, a scheduler or a trainer: name, initial_lr, lr_scale. It comes along.

A key that nobody here knows is a note where the group is of a library that is read here, since its options are known.
It is an option, and refused, where the group has options of some further library (`_FURTHER`). A group without an
option that its optimizer always writes is of another optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from optim8 import rules
from optim8.checkpoint.formats import common
from optim8.step.hypers import EXTRA_DEFAULTS

# Of pytorch_optimizer, timm, transformers, apex and DeepSpeed.
_FURTHER: dict[str, Any] = {
    "weight_decouple": True,  # False is no matter without a weight decay
    "fixed_decay": False,
    "ams_bound": False,
    "adanorm": False,
    "use_gc": False,
    "cautious": False,
    "caution": False,
    "corrected_weight_decay": False,
    "clipping_threshold": None,
    "use_adjusted_lr": False,  # of Muon in pytorch_optimizer, and so are those that begin with ns_
    "ns_method": "newton_schulz",
    "ns_coeffs": [(3.4445, -4.775, 2.0315)],
    "ns_reset_steps": (2,),
    "correct_bias": True,
    "bias_correction": True,
}
_NEUTRAL: dict[str, Any] = {
    **_FURTHER,
    "decoupled_weight_decay": None,  # as weight_decouple, where it concerns the rule
    "alpha": 0.0,  # of AdEMAMix, which bitsandbytes writes for every optimizer
    "t_alpha": None,
    "t_beta3": None,
    "momentum_decay": None,  # of NAdam, which never has None
    "trust_coefficient": None,  # of LARS, and so is timm's name for it
    "trust_coeff": None,
}
# Options that are no numbers, of Muon.
BESIDE = {"muon": ("ns_coefficients", "ns_steps", "adjust_lr_fn")}
_DECAYS = ("decoupled_weight_decay", "weight_decouple")

_RUN = ("amsgrad", "maximize", "foreach", "fused", "capturable", "differentiable")
_NOTES = (
    *("name", "group_name", "param_names", "layer_id", "lr_scale", "lr_mult", "initial_lr", "swa_lr", "max_lr"),
    *("min_lr", "base_momentum", "max_momentum", "max_lr_snapshot", "step"),
)
_PLAIN = {"params", *_RUN, *_NOTES, *EXTRA_DEFAULTS, *_NEUTRAL}


@cache
def _neutral(rule: str) -> dict[str, Any]:
    """The options of other optimizers that this rule does not have itself."""
    own = rules.rule(rule)
    return {name: value for name, value in _NEUTRAL.items() if not own.has(name)}


def owners(option: str) -> str:
    """The rules that have an option, for messages: "RMSprop, ademamix"."""
    having = [known for known in rules.every().values() if known.has(option)]
    return ", ".join(dict.fromkeys(known.torch_name or known.family for known in having))


def check(where: str, rule: str, group: Mapping[str, Any]) -> None:
    """Raise ValueError that names an option which changes the update and cannot be honoured."""
    neutral = _neutral(rule)
    if neutral.keys().isdisjoint(group):  # as in every group that was made here; each step looks
        return
    present = group.keys() & neutral.keys()
    for name in sorted(present.difference(_DECAYS)):
        if group[name] != neutral[name]:
            owner = owners(name)
            what = f", an option of {owner}" if owner else f", which changes the update: {name} is not supported"
            common.fail(where, f"[{name!r}]", f"is {group[name]!r}{what}", _ADVICE)
    _check_decay(where, rule, group)
    if present & _FURTHER.keys():
        for name in group:
            is_of_rule = name in BESIDE.get(rule, ()) or any(known.has(name) for known in rules.every().values())
            if name not in _PLAIN and not is_of_rule:
                advice = "If it is a note of your own, delete it from the dict."
                common.fail(where, f"[{name!r}]", "is no option of this optimizer or of another that is known", advice)


_ADVICE = "Load a dict of an optimizer with the same rule."


def check_owner(where: str, rule: str, group: Mapping[str, Any], options: Mapping[str, Sequence[str]]) -> None:
    """Raise ValueError where a group has all options of another optimizer, of which this one lacks some.

    A group of this optimizer may have such options too, as notes: SAM writes `rho` into every group. It is of the one
    of which it has more.

    Args:
        options: those that each optimizer writes, by rule; this one among them.
    """
    own = options[rule]
    complete = len(own) if group.keys() >= set(own) else 0
    for other, theirs in options.items():
        strange = [name for name in theirs if name not in own]
        if strange and group.keys() >= set(theirs) and complete <= len(theirs):
            name = rules.rule(rule).torch_name or rule
            what = f"is no option of {name}: the dict is of {rules.rule(other).torch_name or other}"
            common.fail(where, f"[{strange[0]!r}]", what, _ADVICE)


def check_only(where: str, group: Mapping[str, Any], own: Sequence[str]) -> None:
    """Raise ValueError where a group lacks an option of `own`, or has another that is no note: with so few options only
    a group of no others is certainly of this optimizer."""
    check_complete(where, "such an optimizer", group, own)
    for name in group:
        if name not in (*own, *_NOTES, "params"):
            advice = "If it is a note of your own, delete it from the dict."
            common.fail(where, f"[{name!r}]", "is no option of this optimizer", advice)


def adds_decay(rule: str, group: Mapping[str, Any]) -> bool:
    """Whether weight decay is added to the gradient, and not taken off the parameter."""
    if rules.rule(rule).has(_DECAYS[0]):
        return not group.get(_DECAYS[0])
    return rule in _PENALTY


def _check_decay(where: str, rule: str, group: Mapping[str, Any]) -> None:
    """Raise ValueError where a weight decay that is not 0 would mean something else here."""
    decay = float(group.get("weight_decay") or 0.0)
    for name in sorted(_neutral(rule).keys() & _DECAYS):
        value = group.get(name)
        if value is None or not decay or (rule == "lion" and name == "decoupled_weight_decay"):
            continue  # lion-pytorch means something else by it
        if bool(value) == adds_decay(rule, group):
            _refuse(where, rule, name, f"is {bool(value)}", decay, group)
    if "corrected_weight_decay" in group and decay and adds_decay(rule, group):
        _refuse(where, rule, "corrected_weight_decay", "is of timm's decoupled decay", decay, group)
    if rule == "adam" and decay and "t_alpha" in group:
        _refuse(where, rule, "weight_decay", "is decoupled in bitsandbytes", decay, group)


_PENALTY = ("adam", "sgd", "rmsprop", "adagrad", "adadelta", "adamax", "lars")
_OTHER_DECAY = {"adam": "Load it into AdamW8bit, or", "adamw": "Load it into Adam8bit, or"}


def _refuse(where: str, rule: str, name: str, what: str, decay: float, group: Mapping[str, Any]) -> None:
    ours = "an L2 penalty" if adds_decay(rule, group) else "decoupled"
    common.fail(
        where,
        f"[{name!r}]",
        f"{what} and weight_decay is {decay:g}, which is {ours} here",
        f"{_OTHER_DECAY.get(rule, 'You can')} set weight_decay to 0 in the dict.",
    )


def known_only(rule: str, group: Mapping[str, Any]) -> dict[str, Any]:
    """A group that has passed `check`, less the options that only other optimizers have."""
    dropped = {*_neutral(rule), *(("step",) if group.keys() & _FURTHER.keys() else ())}
    return {name: value for name, value in group.items() if name not in dropped}


def check_complete(where: str, library: str, group: Mapping[str, Any], required: Sequence[str]) -> None:
    """Raise ValueError where an option is missing that `library` always writes."""
    for name in required:
        if name not in group:
            common.fail(
                where,
                f"[{name!r}]",
                f"is missing, which the dicts of {library} have: this one is of another optimizer",
                "Only where you know that its rule is the same, put the option into the dict.",
            )
