"""The tables and the picture of `long_run.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shared.common import not_measured, origin, table
from shared.plotting import STYLES, new_figure
from shared.subjects import with_version

from slow_state import forms
from slow_state.cases import FALL, LONG_FALL, SPREAD, STEADY
from slow_state.goals import CLOSELY
from slow_state.subjects import OURS, SUBJECTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = Mapping[str, Any]


def ratio(value: float | None) -> str:
    if value is None:
        return "not finite"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 1000 else f"{value:.1e}"


def _second(part: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Ratios of the moment that is unsigned; None where the rule has none."""
    return next((moment for moment in part["moments"].values() if "mean" in moment), None)


def _headers(result: Result) -> list[str]:
    return [with_version(subject, result["peers"]) for subject in SUBJECTS]


def goals_table(result: Result) -> str:
    rows = []
    for goal in result["goals"]:
        cells = []
        for subject in SUBJECTS:
            known = goal["ranges"].get(subject, "absent")
            if known == "absent":
                cells.append("not measured")
            elif known is None:
                cells.append("not finite")
            else:
                cells.append(
                    " to ".join(dict.fromkeys(f"{value:.4f}" if value < 1000 else f"{value:.1e}" for value in known))
                )
        verdict = "reached" if goal["reached"] else "missed"
        rows.append([f"{goal['what']}: {goal['case']}", f"{goal['least']:g} to {goal['most']:g}", verdict, *cells])
    return table(["AdamW8bit, beta2 0.999", "goal", f"by {OURS}", *_headers(result)], rows)


def render16(result: Result) -> str:
    """How AdamW with state in 16 bits follows: of each case the least and the greatest figure over all checkpoints."""

    def span(values: Sequence[float | None]) -> str:
        known = [value for value in values if value is not None]
        return " to ".join(dict.fromkeys(f"{value:.4f}" for value in (min(known), max(known))))

    rows = []
    for row in result["rows"]:
        part = row["parts"]["changed"]
        second = _second(part)
        rows.append([row["case"], row["subject"], span(part["length"]), span(second["mean"]) if second else ""])
    heads = ["AdamW8bit, optim_bits=16", "rounding", "lengths of steps over float32's", "v over float32's"]
    return f"{table(heads, rows)}\n\n{origin(result)}"


def grouped(result: Result) -> dict[tuple[str, str], dict[str, Mapping[str, Any]]]:
    """The rows by optimizer and case, and by subject."""
    found: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row in result["rows"]:
        found.setdefault((row["optimizer"], row["case"]), {})[row["subject"]] = row
    return found


def moments_table(result: Result) -> str:
    """v at the end, of the changed half."""
    rows = []
    for (optimizer, case), found in grouped(result).items():
        cells = []
        for subject in SUBJECTS:
            second = _second(found[subject]["parts"]["changed"]) if subject in found else None
            cells.append("" if second is None else _with_quantiles(*(second[key][-1] for key in second)))
        if any(cells):
            rows.append([f"{optimizer}: {case}", *cells])
    return table(["v over float32's at the end", *_headers(result)], rows)


def _with_quantiles(mean: float | None, lower: float | None, upper: float | None) -> str:
    return ratio(mean) if mean is None else f"{ratio(mean)} ({ratio(lower)} to {ratio(upper)})"


def movement_table(result: Result) -> str:
    """How the changed half moved between the last two checkpoints."""
    rows = []
    for (optimizer, case), found in grouped(result).items():
        cells = []
        for subject in SUBJECTS:
            part = found[subject]["parts"]["changed"] if subject in found else None
            cells.append(f"{ratio(part['length'][-1])}, {ratio(part['slope'][-1])}" if part else "")
        rows.append([f"{optimizer}: {case}", *cells])
    return table(["lengths of steps, slope of the displacement", *_headers(result)], rows)


def paths_table(result: Result) -> str:
    """How far single values are from their exact paths, where each has a scale of its own."""
    rows = []
    found = grouped(result)
    for case in SPREAD:
        its = next(row for (_, name), row in found.items() if name == case.name)
        cells = [
            ratio(its[subject]["parts"]["changed"]["path_error"][-1]) if subject in its else "" for subject in SUBJECTS
        ]
        rows.append([case.name, *cells])
    return table(["error of the path, 95 % quantile", *_headers(result)], rows)


def forms_table(result: Result) -> str:
    """What each moment in 8 bits does by itself."""
    names, found = [forms.name(form) for form in forms.FORMS], result["forms"]
    rows = [[f"lengths of steps: {row['case']}", *(ratio(row[name]) for name in names)] for row in found["lengths"]]
    errors = [sum(found["one_step"][name]) / len(found["one_step"][name]) for name in names]
    rows.append([f"error of one update: {forms.ORDINARY.name}", *(f"{100 * error:.2f} %" for error in errors)])
    return table(["in 8 bits, dithered", *names], rows)


def render(result: Result) -> str:
    arguments, steps = result["arguments"], result["checkpoints"]
    return "\n\n".join(
        [
            goals_table(result),
            f"Least and greatest figure at the checkpoints (steps {', '.join(map(str, steps))}); those after step "
            f"{result['changed_after']} where something changes at once there.",
            moments_table(result),
            "The changed half of each block, or that with small or rare gradients, or just half of it, at step "
            f"{steps[-1]}: mean, and 5 % and 95 % quantiles. The longer fall takes {LONG_FALL.times} times as many "
            "steps to each checkpoint.",
            movement_table(result),
            f"The same half, from step {steps[-2]} to {steps[-1]}, over what float32 state gives.",
            paths_table(result),
            "The path is the sum of the magnitudes of one value's updates, from the start to the end; its error is "
            "relative to that with float32 state. 95 % of the values have a smaller one.",
            forms_table(result),
            "torch's arithmetic with the named moments in 8 bits, the others in float32. Lengths of steps: as above. "
            "Error of an update: of that which float32 moments make after they have been stored once, root of the mean "
            f"square, relative; mean over {len(steps)} steps. "
            f"{arguments['blocks']} blocks of 256 values, float32; an empty cell: the library has no such rule. "
            f"{not_measured(result)}".rstrip(),
            origin(result),
        ]
    )


def draw(result: Result) -> Figure:
    """v and the movement of what has fallen to a tenth, and v where nothing changes, over the steps."""
    figure, panels = new_figure(columns=3, width=6.0)
    found = grouped(result)
    name = next(row["optimizer"] for row in result["rows"] if row["rule"] == CLOSELY)
    fall, steady = found[name, FALL.name], found[name, STEADY.name]
    steps = result["checkpoints"]
    shift = 0.012 * steps[-1]  # beside each other, not over each other
    for at, (style, subject) in enumerate(zip(STYLES, SUBJECTS)):
        x = [step + shift * (at - 1.5) for step in steps]
        label = with_version(subject, result["peers"])
        for panel, rows in ((panels[0], fall), (panels[2], steady)):
            second = _second(rows[subject]["parts"]["changed"]) if subject in rows else None
            if second is None or None in [*_values(second.values())]:
                panel.plot([], [], label=f"{label}: not measured", **style.line())
                continue
            lengths = [
                [mean - lower for mean, lower in zip(second["mean"], second["lower"])],
                [upper - mean for mean, upper in zip(second["mean"], second["upper"])],
            ]
            panel.errorbar(x, second["mean"], yerr=lengths, fmt="none", capsize=3, ecolor=style.colour)
            panel.plot(x, second["mean"], label=label, **style.line(linewidth=1.5, markersize=6))
        if subject in fall:
            moved = [float("nan") if y is None else y for y in fall[subject]["parts"]["changed"]["length"]]
            panels[1].plot(x, moved, label=label, **style.line(linewidth=1.5, markersize=6))
    panels[0].set_yscale("log")
    panels[0].set_ylabel("v / v of float32 state (bars: 5 % to 95 %)")
    panels[0].set_title(f"half fall to 1/10 after step {result['changed_after']}: their v")
    panels[1].set_ylabel("lengths of steps / those of float32 state")
    panels[1].set_title("the same: how far they move")
    panels[1].set_ylim(bottom=0)
    panels[2].set_ylabel("v / v of float32 state (bars: 5 % to 95 %)")
    panels[2].set_title("nothing changes: v")
    for panel in panels:
        panel.axhline(1, color="black", linewidth=1)
        panel.set_xlabel("optimizer step")
    panels[0].legend(loc="upper left")
    return figure


def _values(lists: Iterable[Iterable[float | None]]) -> Iterable[float | None]:
    return (value for values in lists for value in values)
