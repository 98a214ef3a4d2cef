"""The tables and the picture of `rare_updates.py`: losses over those of float32 state, by task and learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from shared.common import not_measured, origin, plural, table
from shared.plotting import STYLES, new_figure
from shared.subjects import PEERS, with_version

from rarity.subjects import DIRECT, OURS, REFERENCE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = Mapping[str, Any]

ORDER = (REFERENCE, OURS, "optim8 nearest", DIRECT, *PEERS)  # an optimizer's place among the styles
RARE = {
    "embeddings": "the rarer half of the tokens",
    "experts": "the rarer half of the clusters",
    "part": "the rarer half of the tokens",
}


def cell(figures: Mapping[str, Any]) -> str:
    """The mean loss, and by how much it is above float32's, with the interval."""
    loss, difference = figures["loss"], figures["relative_difference"]
    if loss is None:
        lost = sum(value is None for value in figures["losses"])
        return f"not finite ({lost} of {len(figures['losses'])})"
    if difference is None:
        return f"{loss['mean']:.4f}"
    mean, lower, upper = (f"{difference[key]:+.2%}" for key in ("mean", "lower", "upper"))
    return f"{loss['mean']:.4f}, {mean} ({lower} to {upper})"


def losses_table(task: Mapping[str, Any], key: str, title: str, peers: Mapping[str, str]) -> str:
    """One row per optimizer, one column per learning rate; `key`: losses of "all", or of what is "rare"."""
    rates = task["rates"]
    names = [row["optimizer"] for row in rates[0]["rows"]]
    rows = [
        [with_version(name, peers), *(cell(rate["rows"][at][key]) for rate in rates)] for at, name in enumerate(names)
    ]
    return table([title, *(f"learning rate {rate['learning_rate']:g}" for rate in rates)], rows)


def counts_table(result: Result) -> str:
    """Of each optimizer, how many intervals leave 0 out, and on which side."""
    rows = []
    for name in ORDER[1:]:
        cells = []
        for key in ("all", "rare"):
            measured = [
                row[key]["relative_difference"]
                for task in result["tasks"].values()
                for rate in task["rates"]
                for row in rate["rows"]
                if row["optimizer"] == name
            ]
            finite = [found for found in measured if found is not None]
            above = sum(found["lower"] > 0 for found in finite)
            below = sum(found["upper"] < 0 for found in finite)
            largest = [f"{max(abs(found['mean']) for found in finite):.2%}"] if finite else []
            lost = [f"{len(measured) - len(finite)} not finite"] if len(finite) < len(measured) else []
            cells += [f"{above} and {below} of {len(measured)}", ", ".join(largest + lost)]
        if measured:
            rows.append([with_version(name, result["peers"]), *cells])
    headers = ["all tasks", "above and below float32", "largest mean", "of what is rare", "largest mean"]
    return table(headers, rows)


def render(result: Result) -> str:
    parts = [counts_table(result)]
    for name, task in result["tasks"].items():
        for key, title in (("all", name), ("rare", f"{name}: {RARE[name]}")):
            parts.append(losses_table(task, key, title, result["peers"]))
    sizes = ", ".join(f"{name} {task['parameters'] / 1e3:.0f} k" for name, task in result["tasks"].items())
    seeds, steps = plural(len(result["seeds"]), "seed"), result["arguments"]["steps"]
    return "\n\n".join(
        [
            *parts,
            f"Losses in nats on data never trained on, after {steps} steps, and the mean of their relative differences "
            f"from float32 state, pair by pair over {seeds}, with its {result['confidence']:.0%} interval; beta2 "
            f"{result['betas'][1]}. The first table counts intervals that leave 0 out. Parameters: {sizes}. "
            f"{not_measured(result)}".rstrip(),
            origin(result),
        ]
    )


def draw(result: Result) -> Figure:
    """A panel for each task: at each learning rate the optimizers' differences side by side, with their intervals."""
    figure, panels = new_figure(columns=len(result["tasks"]))
    for panel, (name, task) in zip(panels, result["tasks"].items()):
        for at, optimizer in enumerate(ORDER[1:]):
            points = [
                (place + 0.15 * (at - 2), row["all"]["relative_difference"])
                for place, rate in enumerate(task["rates"])
                for row in rate["rows"]
                if row["optimizer"] == optimizer and row["all"]["relative_difference"] is not None
            ]
            means = [100 * found["mean"] for _, found in points]
            halves = [100 * (found["upper"] - found["mean"]) for _, found in points]
            style = STYLES[ORDER.index(optimizer)].line(linestyle="")
            label = with_version(optimizer, result["peers"])
            panel.errorbar([x for x, _ in points], means, yerr=halves, capsize=5, label=label, **style)
        panel.set_yscale("symlog", linthresh=0.1)  # from hundredths of a percent to tens of percent
        panel.yaxis.set_major_formatter("{x:g}")
        panel.axhline(0, color="black", linewidth=1)
        panel.set_xticks(range(len(task["rates"])), [f"{rate['learning_rate']:g}" for rate in task["rates"]])
        panel.set_xlabel("learning rate")
        panel.set_ylabel("difference of the loss from float32 state (%)")
        panel.set_title(f"{name}: mean of {plural(len(result['seeds']), 'seed')}, {result['confidence']:.0%} interval")
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, fontsize=11)
    return figure
