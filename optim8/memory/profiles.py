"""What a memory profile has recorded, as table, picture, TensorBoard log and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optim8.memory.text import binary, table

PHASES = ("forward", "backward", "step", "between")
# Colour and hatch of each kind; neighbours in a bar differ in lightness, so that they are told apart in greyscale too.
_LOOKS = {
    "parameters": ("#1b1b1b", ""),
    "gradients": ("#d9d9d9", ""),
    "state (device)": ("#0060a8", "//"),
    "state (host)": ("#8cc6ec", ""),
    "state (disk)": ("#5b5b5b", ".."),
    "activations": ("#f0c060", ""),
    "other": ("#8a5a00", "\\\\"),
}
_MIB = 2**20


@dataclass(frozen=True)
class Record:
    """One phase of one step.

    Attributes:
        step: which optimizer step of the block it belongs to, from 0.
        phase: "forward", "backward", "step" or "between".
        peak: the most bytes in use at any moment of it.
        end: bytes in use at its end.
        kinds: bytes at its end by kind: parameters, gradients, state by tier, activations, other.
    """

    step: int
    phase: str
    peak: int
    end: int
    kinds: dict[str, int]


class Profile:
    """The records of a block, complete when it has ended.

    Attributes:
        records: by time.
        source, meaning: where the bytes come from, and what they count.
        model, optimizer: names of the classes.
    """

    def __init__(self, source: str, meaning: str, model: str, optimizer: str) -> None:
        self.source, self.meaning, self.model, self.optimizer = source, meaning, model, optimizer
        self.records: list[Record] = []

    @property
    def peak(self) -> int:
        """The most bytes in use at any moment of the block."""
        return max((record.peak for record in self._complete()), default=0)

    def table(self) -> str:
        """For each phase, the step in which its peak was highest: peak, and bytes by kind at the end of the phase."""
        highest = list(self._highest(self._complete()).values())
        kinds = _kinds(highest)
        rows = [
            [
                record.phase,
                str(record.step),
                binary(record.peak),
                *(binary(record.kinds.get(kind, 0)) for kind in kinds),
            ]
            for record in highest
        ]
        steps = len({record.step for record in self.records if record.phase == "step"})
        head = f"{self.model}, {self.optimizer}, {steps} steps; {self.meaning}"
        return f"{head}\n\n{table(['phase', 'step', 'peak', *(f'{kind} at end' for kind in kinds)], rows)}"

    def as_dict(self) -> dict[str, Any]:
        """Everything in plain numbers (bytes) and texts."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "source": self.source,
            "meaning": self.meaning,
            "peak": self.peak,
            "records": [vars(record) for record in self._complete()],
        }

    def to_json(self, path: str | Path) -> None:
        """Write `as_dict` to a file, whole or not at all."""
        content, path = json.dumps(self.as_dict(), indent=1) + "\n", Path(path)
        temporary = path.with_name(f".{path.name}.part")
        try:
            temporary.write_text(content, encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def to_tensorboard(self, directory: str | Path) -> None:
        """Write for every step and phase the peak and the bytes by kind, in MiB. Needs tensorboard."""
        from torch.utils.tensorboard import SummaryWriter

        records = self._complete()
        with SummaryWriter(str(directory)) as writer:
            for step in sorted({record.step for record in records}):
                for record in self._highest([record for record in records if record.step == step]).values():
                    for kind, count in {"peak": record.peak, **record.kinds}.items():
                        writer.add_scalar(f"memory MiB {record.phase}/{kind}", count / _MIB, step)

    def plot(self, path: str | Path) -> None:
        """Draw bytes by kind at the end of every phase, and the peaks, to an image file. Needs matplotlib.

        State that lies elsewhere than the memory that is measured is drawn on top of it, and called so.
        """
        from matplotlib import patheffects
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        records = self._drawn(self._complete())
        figure = Figure(figsize=(11, 5.5), dpi=110, layout="constrained")
        axes = figure.add_subplot()
        below = [0.0] * len(records)
        places = range(len(records))
        elsewhere = {"state (disk)", *(["state (host)"] if self.source == "cuda" else [])}
        for kind in sorted(_kinds(records), key=lambda kind: kind in elsewhere):
            heights = [record.kinds.get(kind, 0) / _MIB for record in records]
            colour, hatch = _LOOKS[kind]
            label = f"{kind},\nnot in the peak" if kind in elsewhere else kind
            axes.bar(
                places, heights, 0.85, below, label=label, color=colour, hatch=hatch, edgecolor="white", linewidth=0
            )
            below = [low + height for low, height in zip(below, heights)]
        peaks = [record.peak / _MIB for record in records]
        around = [patheffects.withStroke(linewidth=5, foreground="white")]  # seen on black bars too
        size = max(4, 400 / max(20, len(records)))
        axes.plot(places, peaks, "k_", markersize=size, markeredgewidth=2.5, label="peak", path_effects=around)
        few = len(records) <= 24
        if few:
            labels = [f"{record.step} {record.phase}" for record in records]
            axes.set_xticks(places, labels, fontsize=11, rotation=90 if len(records) > 6 else 0)
        else:
            firsts = [i for i in places if i == 0 or records[i].step != records[i - 1].step]
            shown = firsts[:: -(-len(firsts) // 12)]
            axes.set_xticks(shown, [str(records[i].step) for i in shown], fontsize=11)
        axes.set_xlabel("optimizer step and phase" if few else "optimizer step (bars: its phases)", fontsize=13)
        axes.set_ylabel("memory (MiB)", fontsize=13)
        axes.yaxis.set_major_locator(MaxNLocator(8))
        axes.tick_params(axis="y", labelsize=11)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.margins(x=0.01, y=0.08)
        axes.set_title(f"{self.model}, {self.optimizer}: kinds at the end of each phase, and its peak", fontsize=13)
        figure.supxlabel(self.meaning, fontsize=11, x=0.02, ha="left")
        handles, names = axes.get_legend_handles_labels()
        figure.legend(handles[::-1], names[::-1], loc="outside right upper", fontsize=11)
        figure.savefig(path)

    def _complete(self) -> list[Record]:
        if not self.records:
            raise RuntimeError("optim8.memory.profile: nothing is recorded yet. Ask after the `with` block.")
        return self.records

    @staticmethod
    def _highest(records: Sequence[Record]) -> dict[str, Record]:
        """By phase, the record with the highest peak."""
        found: dict[str, Record] = {}
        for record in records:
            if record.phase not in found or record.peak > found[record.phase].peak:
                found[record.phase] = record
        return {phase: found[phase] for phase in PHASES if phase in found}

    @staticmethod
    def _drawn(records: Sequence[Record]) -> list[Record]:
        """All but what lies between phases, unless memory was highest there."""
        highest = max(record.peak for record in records)
        drawn = [record for record in records if record.phase != "between" or record.peak == highest]
        return drawn or list(records)


def _kinds(records: Sequence[Record]) -> list[str]:
    """The kinds that any of the records has, in the order of the looks."""
    return [kind for kind in _LOOKS if any(record.kinds.get(kind) for record in records)]
