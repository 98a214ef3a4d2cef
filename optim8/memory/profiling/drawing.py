"""Pictures of memory profiles: bars for few steps, areas over the steps for many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from optim8.text import size_cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from optim8.memory.profiling.profiles import Profile, Record

# Colour and hatch of each kind; neighbours in a bar differ in lightness, so that they differ in greyscale too.
LOOKS = {
    "parameters": ("#1b1b1b", ""),
    "gradients": ("#d9d9d9", ""),
    "state (device)": ("#0060a8", "//"),
    "state (host)": ("#8cc6ec", ""),
    "state (disk)": ("#5b5b5b", ".."),
    "activations": ("#f0c060", ""),
    "other": ("#8a5a00", "\\\\"),
}
MIB = 2**20
_MOST_BARS = 24


def draw(profile: Profile, records: Sequence[Record]) -> Figure:
    """The picture of these records.

    Python, libraries and tensors of others in the resident set hide the training. With `source="rss"` the picture
    leaves out their smallest amount, and says so below.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.5), dpi=110, layout="constrained")
    before = min(record.kinds.get("other", 0) for record in records) if profile.source == "rss" else 0
    kinds = _order(profile, records, before)
    phases = [record for record in records if record.phase != "between"]
    most = max((record.peak for record in phases), default=-1)
    higher = [record for record in records if record.peak > most]  # between phases, where the peak is higher
    if len(phases) + len(higher) <= _MOST_BARS:
        _draw_bars(figure, [record for record in records if record in phases or record in higher], kinds, before)
    else:
        _draw_areas(figure, records if higher else phases, kinds, before)
    first = figure.axes[0]
    first.set_ylabel("memory (MiB)", fontsize=13)
    first.set_ylim(bottom=0)  # at the end: panels share the axis, and do not grow after this
    title = "kinds at the end of each phase, and its peak"
    figure.suptitle(f"{profile.model}, {profile.optimizer}: {title}", fontsize=13)
    without = f"; drawn without the {size_cell(before)} of other things that are there all the time" if before else ""
    figure.supxlabel(f"{profile.meaning}{without}", fontsize=11, x=0.02, ha="left")
    handles, names = first.get_legend_handles_labels()
    figure.legend(handles[::-1], names[::-1], loc="outside right upper", fontsize=11)
    return figure


def _order(profile: Profile, records: Sequence[Record], before: int) -> dict[str, str]:
    """The kinds to draw, from below, with their labels; at the top those that the peak does not count."""
    elsewhere = {"state (disk)", *(["state (host)"] if profile.source == "cuda" else [])}
    present = [kind for kind in LOOKS if any(_mib(record, kind, before) > 0 for record in records)]
    ordered = sorted(present, key=lambda kind: kind in elsewhere)
    names = {kind: f"{kind},\nnot in the peak" if kind in elsewhere else kind for kind in ordered}
    if profile.source == "rss" and "other" in names:
        names["other"] = "other, and freed\nmemory that is kept"
    return names


def _mib(record: Record, kind: str, before: int) -> float:
    return max(0, record.kinds.get(kind, 0) - (before if kind == "other" else 0)) / MIB


def _draw_bars(figure: Figure, records: Sequence[Record], kinds: dict[str, str], before: int) -> None:
    """A bar for every phase of every step."""
    axes = figure.add_subplot()
    places = range(len(records))
    below = [0.0] * len(records)
    for kind, label in kinds.items():
        heights = [_mib(record, kind, before) for record in records]
        colour, hatch = LOOKS[kind]
        axes.bar(places, heights, 0.85, below, label=label, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
        below = [low + height for low, height in zip(below, heights)]
    peaks = [(record.peak - before) / MIB for record in records]
    size = 400 / max(20, len(records))
    axes.plot(places, peaks, "k_", markersize=size, markeredgewidth=2.5, label="peak", path_effects=_around())
    labels = [f"{record.step} {record.phase}" for record in records]
    axes.set_xticks(places, labels, fontsize=11, rotation=90 if len(records) > 6 else 0)
    axes.set_xlabel("optimizer step and phase", fontsize=13)
    _finish(axes)


def _draw_areas(figure: Figure, records: Sequence[Record], kinds: dict[str, str], before: int) -> None:
    """A panel for every phase, over the steps. Bars would look like a comb, because phases end at different levels."""
    present = {record.phase for record in records}
    phases = [phase for phase in ("forward", "backward", "step", "between") if phase in present]
    panels = figure.subplots(1, len(phases), sharex=True, sharey=True, squeeze=False)[0]
    for axes, phase in zip(panels, phases):
        by_step: dict[int, Record] = {}  # where a phase comes more than once in a step, the highest
        for record in records:
            if record.phase == phase and (record.step not in by_step or record.peak > by_step[record.step].peak):
                by_step[record.step] = record
        drawn = list(by_step.values())
        steps, below = list(by_step), [0.0] * len(by_step)
        for kind, label in kinds.items():
            above = [low + _mib(record, kind, before) for low, record in zip(below, drawn)]
            colour, hatch = LOOKS[kind]
            axes.fill_between(steps, below, above, label=label, color=colour, hatch=hatch, edgecolor="white", lw=0)
            below = above
        peaks = [(record.peak - before) / MIB for record in drawn]
        axes.plot(steps, peaks, "k-", linewidth=2, label="peak", path_effects=_around())
        axes.set_title(phase, fontsize=13)
        axes.set_xlabel("optimizer step", fontsize=13)
        _finish(axes)


def _around() -> list[Any]:
    """A white edge, which makes black visible on black."""
    from matplotlib import patheffects

    return [patheffects.withStroke(linewidth=5, foreground="white")]


def _finish(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(8))
    axes.tick_params(labelsize=11)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.margins(x=0.01, y=0.08)
