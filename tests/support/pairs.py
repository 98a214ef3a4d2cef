"""Fewer rows than all combinations of many parameters: pairwise testing."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations, product
from typing import Any

import pytest


def rows(axes: list[list[Any]]) -> list[tuple[Any, ...]]:
    """Combinations, one value of each axis, in which every two values of two axes come together at least once.

    Greedy: each row is the combination that has the most pairs which no row has yet, the first of them.
    """
    pairs = {
        choice: set(combinations(enumerate(choice), 2)) for choice in product(*[range(len(axis)) for axis in axes])
    }
    wanted = set().union(*pairs.values())
    found = []
    while wanted:
        best = max(pairs, key=lambda choice: len(pairs[choice] & wanted))
        wanted -= pairs[best]
        found.append(tuple(axis[i] for axis, i in zip(axes, best)))
    return found


def pairwise(**axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Do what pytest.mark.parametrize does for each of `axes`, with `rows` in the place of all combinations.

    A name such as `state_bits__rounding` is of two parameters, its values are pairs.
    """
    names = [name.split("__") for name in axes]
    flat = []
    for row in rows([list(values) for values in axes.values()]):
        flat.append([part for name, value in zip(names, row) for part in (value if len(name) > 1 else (value,))])
    return pytest.mark.parametrize([part for name in names for part in name], flat, ids=str)
