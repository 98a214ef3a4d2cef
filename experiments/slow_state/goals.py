"""What 8-bit state that follows 32-bit state is held to: bounds that were set before the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slow_state.cases import (
    CONSTANT,
    CONSTANT_BLOCKS,
    DEEP_FALL,
    DOUBLE,
    FALL,
    FALL_SLOWLY,
    LONG_FALL,
    RARE,
    RISE_SLOWLY,
    SMALL,
    SPREAD,
    STEADY,
    Case,
)
from slow_state.subjects import OURS

Row = Mapping[str, Any]
Figures = Callable[[Row, Sequence[bool]], list[Any]]  # of a row; which of its checkpoints lie after the change

CLOSELY = "adamw"  # the rule that all cases are for
# Of the lengths of steps, where half of each block has small gradients: 1e-1, 1e-2 and so on. 1e-6 has no goal.
SMALL_BOUNDS = ((0.97, 1.05), (0.97, 1.05), (0.97, 1.05), (0.95, 1.08), (0.9, 1.2))


@dataclass(frozen=True)
class Goal:
    """All figures of a case must lie between two bounds."""

    what: str
    case: Case
    figures: Figures
    least: float
    most: float


def second_moment(row: Row, after: Sequence[bool]) -> list[Any]:
    """Mean ratios, of both halves."""
    return [
        value
        for part in row["parts"].values()
        for moment in part["moments"].values()
        if "mean" in moment
        for value in _chosen(moment["mean"], after)
    ]


def movement(figure: str) -> Figures:
    """A figure of the changed half."""
    return lambda row, after: _chosen(row["parts"]["changed"][figure], after)


def everywhere(figure: str) -> Figures:
    """A figure of both halves."""
    return lambda row, after: [value for part in row["parts"].values() for value in _chosen(part[figure], after)]


def mirrored(row: Row, after: Sequence[bool]) -> list[Any]:
    """How far negative gradients have moved parameters, over how far positive ones have, in the whole run."""
    negative, positive = (row["parts"][part]["displacement"] for part in ("changed", "others"))
    return [None if None in negative + positive else -sum(negative) / sum(positive)]


def _chosen(values: Sequence[Any], after: Sequence[bool]) -> list[Any]:
    return [value for value, is_after in zip(values, after) if is_after]


GOALS = (
    Goal("v over float32's", STEADY, second_moment, 0.98, 1.02),
    *(
        Goal("v over float32's", case, second_moment, 0.95, 1.05)
        for case in (FALL, DOUBLE, RISE_SLOWLY, FALL_SLOWLY)
    ),
    *(
        Goal(f"{name} of the changed half", case, movement(figure), 0.95, 1.05)
        for case in (FALL, DEEP_FALL, LONG_FALL)
        for name, figure in (("lengths of steps", "length"), ("slope of the displacement", "slope"))
    ),
    *(
        Goal("displacement by negative gradients over that by positive ones", case, mirrored, 0.998, 1.002)
        for case in (CONSTANT, CONSTANT_BLOCKS)
    ),
    Goal("lengths of steps", STEADY, everywhere("length"), 0.97, 1.05),
    *(
        Goal("lengths of steps of that half", case, movement("length"), *bounds)
        for case, bounds in zip(SMALL, SMALL_BOUNDS)
    ),
    *(Goal("lengths of steps", case, everywhere("length"), 0.97, 1.04) for case in SPREAD),
    *(Goal("95 % of the values: error of the path", case, everywhere("path_error"), 0, 0.25) for case in SPREAD),
    *(Goal("lengths of steps of that half", case, movement("length"), 0.97, 1.03) for case in RARE),
)  # fmt: skip


def judged(rows: Sequence[Row], checkpoints: Sequence[int], changed_after: int) -> list[dict[str, Any]]:
    """Every goal with what each subject gives, the least and the greatest figure; and whether ours is within bounds.

    Where something changes at once, checkpoints after it count; else all.
    """
    found = []
    for goal in GOALS:
        after = [goal.case.change == 1 or step * goal.case.times > changed_after for step in checkpoints]
        ranges: dict[str, list[float] | None] = {}
        for row in rows:
            if (row["rule"], row["case"]) == (CLOSELY, goal.case.name):
                values = goal.figures(row, after)
                ranges[row["subject"]] = None if None in values else [min(values), max(values)]
        own = ranges.get(OURS)
        reached = own is not None and goal.least <= own[0] and own[1] <= goal.most
        found.append(
            {
                "what": goal.what,
                "case": goal.case.name,
                "least": goal.least,
                "most": goal.most,
                "ranges": ranges,
                "reached": reached,
            }
        )
    return found
