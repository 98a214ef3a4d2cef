"""A step as an operator takes it: its tensors in flat lists, its numbers as tensors, and a plan that says what is what.

The plan is JSON, one text for each parameter group that has gradients:

    owner     the optimizer's class, for messages
    rule      its rule
    group     which group it was
    numbers   the options that are numbers, in order: None, 0 for one number, or the length of a tuple of numbers
    fixed     which of these are no tensors
    options   the other options
    keys      the sets of keys that states have
    rows      for each parameter: its set of keys, and its name for messages
    parts     (options that overrides change, which rows)

The count of steps is state and lies in a tensor, and so do the numbers: nothing in a plan changes from step to step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch

from optim8 import rules
from optim8.rules import Moments
from optim8.state.layout import own_keys
from optim8.state.shards import local
from optim8.step import hypers, supply
from optim8.step.supply import Stateful

_PLAIN = (bool, int, float, str, tuple)


def number_names(rule: str) -> list[str]:
    """The options of a rule that are numbers, or tuples of numbers, in order."""
    return [hyper.name for hyper in rules.rule(rule).hypers if not hyper.is_flag]


def group_options(optimizer: Any, group: Mapping[str, Any]) -> dict[str, Any]:
    """The other options of a group: flags, precision, how it runs. Notes of users and schedulers are none."""
    numbers = set(number_names(optimizer.rule))
    known = [*optimizer.defaults, *hypers.EXTRA_DEFAULTS]
    options = {name: group[name] for name in known if name not in numbers and name in group}
    # A subclass may have others of any kind, which no step reads.
    return {name: value for name, value in options.items() if value is None or isinstance(value, _PLAIN)}


def kind_of_number(value: Any) -> int | None:
    """How a plan says what an option is: None, a number, or so many of them."""
    if value is None:
        return None
    return len(value) if isinstance(value, tuple) else 0


def record_group(
    optimizer: Stateful,
    group: dict[str, Any],
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    states: list[torch.Tensor],
) -> str:
    """The plan of a group whose parameters with gradients all have state; the lists get its tensors. "" where there are
    no gradients. Overrides have no tensors.
    """
    number = next(i for i, each in enumerate(optimizer.param_groups) if each is group)
    own = own_keys(optimizer.moments)
    sets: dict[tuple[str, ...], int] = {}
    parts: dict[str, list[int]] = {}
    rows: list[tuple[int, str]] = []
    for index, param in enumerate(group["params"]):
        if param.grad is None:
            continue
        entry = optimizer.state.get(param) or {}
        keys = tuple(key for key in entry if key in own)
        changes = json.dumps(supply.changes_of(optimizer, param), sort_keys=True)
        parts.setdefault(changes, []).append(len(rows))
        rows.append((sets.setdefault(keys, len(sets)), hypers.name_of(group, index)))
        params.append(local(param))
        grads.append(local(param.grad))
        states += [entry[key] for key in keys]
    if not rows:
        return ""
    names = number_names(optimizer.rule)
    tensors = {name for name in names if any(isinstance(each, torch.Tensor) for each in each_number(group[name]))}
    plan = {
        "owner": type(optimizer).__name__,
        "rule": optimizer.rule,
        "group": number,
        "numbers": {name: kind_of_number(group[name]) for name in names},
        "fixed": [name for name in names if name not in tensors],
        "options": group_options(optimizer, group),
        "keys": list(sets),
        "rows": rows,
        "parts": [(json.loads(changes), members) for changes, members in parts.items()],
    }
    return json.dumps(plan)


@lru_cache(maxsize=256)
def read(plan: str) -> dict[str, Any]:
    """A plan that was written; do not change it."""
    known: dict[str, Any] = json.loads(plan)
    return known


def as_tensor(number: Any) -> torch.Tensor:
    """A number as a graph takes it: a tensor itself, or float64 of one element, which has all bits of a float."""
    if isinstance(number, torch.Tensor):
        return number
    # A product: torch.compile keeps a float that changes as an input of the graph where it is a factor, and compiles
    # anew for each value where a tensor is made of it.
    product: torch.Tensor = torch.ones((), dtype=torch.float64, device="cpu") * number
    return product


def each_number(value: Any) -> Sequence[Any]:
    """The numbers of an option: none, one, or those of a tuple."""
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)


def numbers_of(group: Mapping[str, Any], names: Sequence[str]) -> list[torch.Tensor]:
    """The numbers of these options of a group, in order."""
    return [as_tensor(number) for name in names for number in each_number(group[name])]


class Reader:
    """Takes the lists of an operator apart again, plan by plan.

    Raises:
        ValueError: a list has fewer tensors than the plans say, or more (`end`).
    """

    def __init__(self, **lists: Sequence[torch.Tensor]) -> None:
        self._lists = {name: iter(tensors) for name, tensors in lists.items()}

    def take(self, name: str) -> torch.Tensor:
        tensor = next(self._lists[name], None)
        if tensor is None:
            raise ValueError(f"optim8::step: {name} must have a tensor for each that the plans name, got fewer.")
        return tensor

    def numbers(self, plan: Mapping[str, Any]) -> dict[str, Any]:
        """The options that are numbers, as tensors and tuples of tensors."""
        found: dict[str, Any] = {}
        for name, kind in plan["numbers"].items():
            if kind is None:
                found[name] = None
            else:
                taken = tuple(self.take("numbers") for _ in range(max(kind, 1)))
                found[name] = taken if kind else taken[0]
        return found

    def rows(self, plan: Mapping[str, Any]) -> Iterator[tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]:
        """Of each parameter itself, its gradient and its state."""
        for kind, _ in plan["rows"]:
            entry = {key: self.take("states") for key in plan["keys"][kind]}
            yield self.take("params"), self.take("grads"), entry

    def end(self) -> None:
        for name, rest in self._lists.items():
            if next(rest, None) is not None:
                raise ValueError(f"optim8::step: {name} must have a tensor for each that the plans name, got more.")


class Replica:
    """Stands for an optimizer in a step of an operator: options and tensors are those that the operator was given."""

    rule: ClassVar[str]

    def __init__(self, groups: list[dict[str, Any]], state: Any, memory: Any, known_overrides: Any) -> None:
        self.param_groups, self.state, self.memory, self.known_overrides = groups, state, memory, known_overrides

    @property
    def moments(self) -> Moments:
        """The states of the rule."""
        return rules.rule(self.rule).moments


@lru_cache(maxsize=64)
def replica_of(owner: str, rule: str) -> type[Replica]:
    """The class of a replica, which has the name of the optimizer's class: messages take it from there."""
    return type(owner, (Replica,), {"rule": rule})
