"""A table and a picture of `long_run.py`: how far values move whose gradients are unlike those of their block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shared.common import not_measured, origin, table
from shared.plotting import STYLES, new_figure
from shared.subjects import with_version

from slow_state.cases import RARE, RARE_AND_SMALL, SMALL, SPREAD, STEADY, Case
from slow_state.goals import CLOSELY
from slow_state.report import Result, grouped, ratio
from slow_state.subjects import SUBJECTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Title, name of the axis, whether it is logarithmic; and what it shows of which case.
PANELS: tuple[tuple[str, str, bool, Sequence[tuple[float, Case]]], ...] = (
    (
        "half of each block have small gradients",
        "their gradients / the others'",
        True,
        [(case.small, case) for case in (STEADY, *SMALL)],
    ),
    (
        "each value has its own scale of gradients",
        "sigma of the lognormal scales",
        False,
        [(case.sigma, case) for case in (STEADY, *SPREAD)],
    ),
    (
        "half of each block get rare gradients",
        "one gradient in so many steps",
        True,
        [(case.once_in, case) for case in (STEADY, *RARE)],
    ),
)


def render(result: Result) -> str:
    """What the picture shows, with goals."""
    found, name = grouped(result), _name(result)
    goals = {goal["case"]: goal for goal in result["goals"] if goal["what"].startswith("lengths of steps")}
    rows = []
    for case in (STEADY, *SMALL, *SPREAD, *RARE, RARE_AND_SMALL):
        goal, its = goals.get(case.name), found[name, case.name]
        bounds = f"{goal['least']:g} to {goal['most']:g}" if goal else ""
        lengths = [
            ratio(its[subject]["parts"]["changed"]["length"][-1]) if subject in its else "" for subject in SUBJECTS
        ]
        rows.append([case.name, bounds, *lengths])
    headers = [with_version(subject, result["peers"]) for subject in SUBJECTS]
    steps = result["checkpoints"]
    return "\n\n".join(
        [
            table([f"{name}: lengths of steps over float32's", "goal", *headers], rows),
            f"Steps {steps[-2]} to {steps[-1]}, of the half with small or rare gradients, elsewhere of every second "
            "value. Where a code makes v 0, the next step divides by what its own gradient makes of that, or by eps, "
            f"1e-15 here. {not_measured(result)}".rstrip(),
            origin(result),
        ]
    )


def _name(result: Result) -> str:
    name: str = next(row["optimizer"] for row in result["rows"] if row["rule"] == CLOSELY)
    return name


def draw(result: Result) -> Figure:
    """The lengths of steps between the last two checkpoints, over what sets values of a block apart."""
    figure, panels = new_figure(columns=len(PANELS), width=6.0, sharey=True)
    found, name = grouped(result), _name(result)
    for panel, (title, axis, is_logarithmic, points) in zip(panels, PANELS):
        for style, subject in zip(STYLES, SUBJECTS):
            x, y = [], []
            for place, case in points:
                row = found[name, case.name].get(subject)
                value = row["parts"]["changed"]["length"][-1] if row else None
                x.append(place)
                y.append(float("nan") if value is None else value)
            label = with_version(subject, result["peers"])
            if all(map(math.isnan, y)):
                label = f"{label}: not measured"
            panel.plot(x, y, label=label, **style.line(linewidth=1.5, markersize=6))
        if is_logarithmic:
            panel.set_xscale("log")
        panel.axhline(1, color="black", linewidth=1)
        panel.set_yscale("log")
        panel.set_title(title)
        panel.set_xlabel(axis)
    panels[0].invert_xaxis()
    panels[0].set_ylabel("lengths of steps / those of float32 state")
    panels[0].legend()
    return figure
