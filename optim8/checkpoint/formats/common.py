"""What every format needs: its declaration, and checks that name the key that does not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch

from optim8 import rules
from optim8.rules import Moments
from optim8.state.moments import Entry

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Format:
    """How a library lays out what it saves.

    library: its name.
    keeps_precision: whether loaded state stays in the precision in which it was saved.
    claims: (param_groups, states that are not empty) -> whether this is its dict.
    read_group: (where, rule, group) -> the group's options under our names.
    read_entry: (where, moments, parameter, state) -> the state as sources; nothing is copied yet.
    options: rule -> the options that every group of such a dict has; a dict without them is another optimizer's.
    has: rule -> whether the library has an optimizer with this rule.
    namesakes: rule -> what its optimizer of that name does, where it is another rule.
    unpack: state_dict -> the same with all that read_entry needs in the states: some count steps by group.
    """

    library: str
    keeps_precision: bool
    claims: Callable[[Sequence[dict[str, Any]], Sequence[dict[str, Any]]], bool]
    read_group: Callable[[str, str, dict[str, Any]], dict[str, Any]]
    read_entry: Callable[[str, Moments, torch.Tensor, dict[str, Any]], Entry]
    options: Callable[[str], Sequence[str]] = lambda rule: ()
    has: Callable[[str], bool] = lambda rule: True
    namesakes: Mapping[str, str] = field(default_factory=dict)
    unpack: Callable[[dict[str, Any]], dict[str, Any]] = lambda state_dict: state_dict


def fail(where: str, key: str, what: str, advice: str = "") -> NoReturn:
    """Raise ValueError for a key of a state dict."""
    raise ValueError(f"{where}{'' if where.endswith(']') else ': '}{key} {what}.{' ' if advice else ''}{advice}")


def check_rule(owner: str, known: Format, rule: str) -> None:
    """Raise ValueError for a rule that a library does not share, so that no moment is taken for another."""
    if not known.has(rule):
        shared = [name for name in dict.fromkeys(each.family for each in rules.every().values()) if known.has(name)]
        because = f" {known.namesakes[rule]}" if rule in known.namesakes else ""
        raise ValueError(
            f"{owner}: {rule} cannot be converted for {known.library}; {', '.join(shared)} can.{because} State dicts "
            "of optim8 load for every rule."
        )


def describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return type(value).__name__


def tensor(
    where: str, entry: Mapping[str, Any], key: str, dtypes: Sequence[torch.dtype], shape: Sequence[int]
) -> torch.Tensor:
    """A plain tensor of a state, checked."""
    value = entry.get(key)
    if isinstance(value, torch.Tensor) and value.dtype in dtypes and tuple(value.shape) == tuple(shape):
        return value
    types = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    got = "nothing" if key not in entry else describe(value)
    fail(where, f"[{key!r}]", f"must be {types} {tuple(shape)}, got {got}", _OTHER_PARAMETERS)


_OTHER_PARAMETERS = "Load a state dict that was written for the same parameters by an optimizer with the same rule."


def number(where: str, entry: Mapping[str, Any], key: str) -> float:
    """A number that is not negative, or a tensor of one."""
    value = entry.get(key)
    if isinstance(value, torch.Tensor) and value.shape == ():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        got = "nothing" if key not in entry else describe(entry[key])
        fail(where, f"[{key!r}]", f"must be a number or a tensor of shape (), got {got}", _OTHER_PARAMETERS)
    if not 0 <= value < float("inf"):
        fail(where, f"[{key!r}]", f"must be finite and not negative, got {value}")
    return float(value)


def step(where: str, entry: Mapping[str, Any]) -> float:
    """The count of steps, a number or a tensor of one."""
    return number(where, entry, "step")


def absmax(where: str, key: str, value: torch.Tensor) -> torch.Tensor:
    """Check scales for values that no quantization writes, and return them."""
    if not bool(((value >= 0) & value.isfinite()).all()):
        fail(where, f"[{key!r}]", "must be finite and not negative", "The checkpoint is damaged.")
    return value


def no_other_keys(where: str, entry: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in entry:
        if key not in known:
            fail(where, f"[{key!r}]", f"is no state of this optimizer (it has {', '.join(known)})", _OTHER_PARAMETERS)
