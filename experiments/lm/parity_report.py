"""The table and the picture of `parity.py`: losses of every optimizer, and of every pair the difference by seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from shared.common import origin, plural, table
from shared.plotting import STYLES, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = Mapping[str, Any]


def results_table(result: Result) -> str:
    several = len(_rates(result)) > 1
    rows = []
    for name, found in result["optimizers"].items():
        loss = found["validation_loss"]
        pair = next((pair for pair in result["pairs"] if pair["optimizer"] == name), None)
        cells = ["(the reference)", "", ""]
        if pair:
            d = pair["relative_difference"]
            spread = f"{min(pair['relative_differences']):+.2%} to {max(pair['relative_differences']):+.2%}"
            cells = [f"{d['mean']:+.2%}", f"{d['lower']:+.2%} to {d['upper']:+.2%}", spread]
        rate = [f"{found['learning_rate']:g}"] if several else []
        rows.append(
            [found["label"], *rate, f"{loss['mean']:.4f}", f"{loss['lower']:.4f} to {loss['upper']:.4f}", *cells],
        )
    interval = f"{result['confidence']:.0%} interval"
    rate = ["learning rate"] if several else []
    headers = ["optimizer", *rate, "validation loss", interval, "against 32-bit state", interval, "smallest to largest"]
    return table(headers, rows)


def render(result: Result) -> str:
    arguments, text = result["arguments"], result["text"]
    seeds = len(result["seeds"])
    fewer = {
        found["label"]: len(found["validation_losses"])
        for found in result["optimizers"].values()
        if len(found["validation_losses"]) < seeds
    }
    later = result.get("later_text")
    return "\n\n".join(
        [
            results_table(result),
            f"Means over {plural(seeds, 'seed')}{''.join(f' ({label}: {n})' for label, n in fewer.items())}; losses in "
            f"nats per byte. GPT of {result['parameters'] / 1e6:.2f} M parameters, float32, {arguments['steps']} steps "
            f"of {arguments['batch'] * arguments['context']} bytes of {text['name']}"
            + (f", from half of the steps on of {later['name']}, which the loss is of." if later else "."),
            origin(result),
        ]
    )


def draw(result: Result) -> Figure:
    """A panel for each learning rate: validation loss during training, mean and interval. Right: differences."""
    rates = _rates(result)
    figure, (*curves, right) = new_figure(columns=len(rates) + 1)
    styles = dict(zip(dict.fromkeys(found["label"] for found in result["optimizers"].values()), STYLES))
    for panel, rate in zip(curves, rates):
        found_here = [f for f in result["optimizers"].values() if len(rates) == 1 or f["learning_rate"] == rate]
        for found in found_here:
            steps = [point["step"] for point in found["validation_curve"]]
            means = [point["mean"] for point in found["validation_curve"]]
            below = [point["mean"] - point["lower"] for point in found["validation_curve"]]
            style = styles[found["label"]]
            panel.errorbar(steps, means, yerr=below, label=found["label"], capsize=4, **style.line())
        panel.set_xlabel("optimizer step")
        panel.set_ylabel("validation loss (nats per byte)")
        seeds = f"mean of {plural(len(result['seeds']), 'seed')} and its {result['confidence']:.0%} interval"
        panel.set_title(seeds if len(rates) == 1 else f"learning rate {rate:g}: {seeds}")
        panel.legend()
    names = []
    for at, pair in enumerate(result["pairs"]):
        ours, theirs = (result["optimizers"][pair[key]] for key in ("optimizer", "counterpart"))
        found = pair["relative_difference"]
        percent = [100 * value for value in pair["relative_differences"]]
        right.plot([at - 0.15] * len(percent), percent, color="#777777", linestyle="", marker="_", markersize=14)
        half = 100 * (found["upper"] - found["mean"])
        line = styles[ours["label"]].line(markersize=9)
        right.errorbar([at + 0.1], [100 * found["mean"]], yerr=[half], capsize=8, **line)
        if len(rates) == 1:
            names.append(f"{ours['label']}\nagainst {theirs['label']}")
        else:
            names.append("\n".join([*ours["label"].split(), f"{ours['learning_rate']:g}"]))
    right.axhline(0, color="black", linewidth=1)
    right.set_xticks(range(len(names)), names)
    if len(rates) > 1:
        right.tick_params(axis="x", labelsize=10)
    right.set_xlim(-0.6, len(result["pairs"]) - 0.4)
    right.set_ylabel("difference of the final validation loss (%)")
    right.set_title("each seed (dashes), mean and interval")
    return figure


def _rates(result: Result) -> list[float]:
    """The learning rates of each optimizer, where all of them have several; else a single one, whatever it is."""
    per_label: dict[str, list[float]] = {}
    for found in result["optimizers"].values():
        per_label.setdefault(found["label"], []).append(found["learning_rate"])
    return max(per_label.values(), key=len)
