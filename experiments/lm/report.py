"""Turns the figures of the runs into checks, a table and two pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from shared.common import table
from shared.plotting import STYLES, new_figure

from lm.optimizers import COUNTERPART

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOSS_LIMIT = 0.01
STATE_LIMIT = 0.26
MIB = 2**20

Runs = Mapping[str, Mapping[str, Any]]


def checks(runs: Runs) -> list[dict[str, Any]]:
    """For each 8-bit optimizer whose 32-bit counterpart ran too: is its loss as good, its state as small as promised?

    Each row: `what`, `value`, `limit`, `passed` (None where the limit does not apply).
    """
    rows: list[dict[str, Any]] = []
    for name, other in COUNTERPART.items():
        if name not in runs or other not in runs:
            continue
        ours, theirs = runs[name], runs[other]
        loss = ours["validation_loss"] / theirs["validation_loss"] - 1
        state = ours["state_bytes"] / theirs["state_bytes"]
        # Beside bfloat16 parameters torch keeps bfloat16 moments, half of the bytes that the limit is about.
        applies = ours["settings"]["dtype"] == "float32"
        rows += [
            {
                "what": f"{name}: validation loss against {other}",
                "value": loss,
                "limit": LOSS_LIMIT,
                "passed": abs(loss) <= LOSS_LIMIT,
            },
            {
                "what": f"{name}: bytes of state against {other}",
                "value": state,
                "limit": STATE_LIMIT,
                "passed": state <= STATE_LIMIT if applies else None,
            },
        ]
    return rows


def describe(check: Mapping[str, Any]) -> str:
    """One line for a row of `checks`."""
    word = {True: "ok", False: "FAILED", None: "not judged (the limit is for 32-bit moments)"}[check["passed"]]
    value = f"{check['value']:+.2%}" if check["limit"] == LOSS_LIMIT else f"{check['value']:.2%}"
    return f"{check['what']}: {value}, limit {check['limit']:.0%}: {word}"


def results_table(runs: Runs) -> str:
    """The figures of all runs, one optimizer a row."""
    headers = [
        "optimizer",
        "training loss",
        "validation loss",
        "state",
        "bytes per parameter",
        "step (median)",
        "peak memory",
    ]
    rows = [
        [
            run["label"],
            f"{run['training_loss']:.4f}",
            f"{run['validation_loss']:.4f}",
            f"{run['state_bytes'] / MIB:.2f} MiB",
            f"{run['state_bytes_per_parameter']:.2f}",
            f"{run['step']['median_ms']:.2f} ms",
            f"{run['peak_memory_bytes'] / MIB:.0f} MiB",
        ]
        for run in runs.values()
    ]
    return table(headers, rows)


def draw_loss(result: Mapping[str, Any]) -> Figure:
    """Training and validation loss of every run, over the steps."""
    figure, axes = new_figure(columns=2, width=6.5)
    for style, run in zip(STYLES, result["runs"].values()):
        for axis, curve, mark in ((axes[0], "training_curve", ""), (axes[1], "validation_curve", style.marker)):
            steps, losses = zip(*run[curve])
            axis.plot(steps, losses, label=run["label"], **style.line(marker=mark))
    for axis, name in zip(axes, ("training", "validation")):
        axis.set_xlabel("optimizer step")
        axis.set_ylabel(f"{name} loss (nats per byte)")
        axis.legend()
    model, text = result["model"], result["text"]
    figure.suptitle(f"GPT, {model['parameters'] / 1e6:.1f} M parameters, {model['dtype']}, on {text['name']}")
    return figure


def draw_memory(result: Mapping[str, Any]) -> Figure:
    """Bytes of state and peak memory of every run, as bars."""
    runs = list(result["runs"].values())
    labels = [run["label"].replace(" ", "\n", 1) for run in runs]
    figure, axes = new_figure(columns=2, width=6.5)
    bars = (
        (axes[0], "optimizer state (MiB)", "state_bytes", "{:.1f}"),
        (axes[1], "peak memory of the process (MiB)", "peak_memory_bytes", "{:.0f}"),
    )
    for axis, title, key, form in bars:
        for label, style, run in zip(labels, STYLES, runs):
            drawn = axis.bar([label], [run[key] / MIB], **style.bar())
            axis.bar_label(drawn, [form.format(run[key] / MIB)], padding=3)
        axis.set_ylabel(title)
        axis.margins(y=0.12)
        axis.grid(visible=False, axis="x")
    return figure
