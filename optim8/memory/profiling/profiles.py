"""Records of a memory profile, as table, picture, TensorBoard log and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optim8.memory.profiling.drawing import LOOKS, MIB, draw
from optim8.text import size_cell, table

PHASES = ("forward", "backward", "step", "between")


@dataclass(frozen=True)
class Record:
    """One phase of one step.

    Attributes:
        step: the optimizer step of the block that it belongs to, from 0.
        phase: "forward", "backward", "step" or "between".
        peak: the most bytes in use at any moment of the phase.
        end: bytes in use at its end.
        kinds: bytes at its end by kind: parameters, gradients, state by tier, activations, other.
    """

    step: int
    phase: str
    peak: int
    end: int
    kinds: dict[str, int]


class Profile:
    """The records of a block, complete when the block has ended.

    Attributes:
        records: in order of time.
        source: where the numbers come from.
        meaning: what they count.
        model: the name of its class.
        optimizer: the name of its class.
    """

    def __init__(self, source: str, meaning: str, model: str, optimizer: str) -> None:
        self.source, self.meaning, self.model, self.optimizer = source, meaning, model, optimizer
        self.records: list[Record] = []

    def __repr__(self) -> str:
        found = "nothing recorded"
        if self.records:
            steps = len({record.step for record in self.records if record.phase == "step"})
            found = f"{steps} step{'s' if steps != 1 else ''}, peak {size_cell(self.peak)}"
        return f"<optim8.memory.Profile of {self.model} with {self.optimizer}: {found}, source={self.source!r}>"

    @property
    def peak(self) -> int:
        """The most bytes in use at any moment of the block."""
        return max((record.peak for record in self._complete()), default=0)

    def table(self) -> str:
        """For each phase, the step with the highest peak: the peak, and bytes by kind at the end of the phase."""
        highest = list(self._highest(self._complete()).values())
        kinds = _kinds(highest)
        rows = [
            [
                record.phase,
                str(record.step),
                size_cell(record.peak),
                *(size_cell(record.kinds.get(kind, 0)) for kind in kinds),
            ]
            for record in highest
        ]
        steps = len({record.step for record in self.records if record.phase == "step"})
        head = f"{self.model}, {self.optimizer}, {steps} steps; {self.meaning}"
        return f"{head}\n\n{table(['phase', 'step', 'peak', *(f'{kind} at end' for kind in kinds)], rows)}"

    def as_dict(self) -> dict[str, Any]:
        """All records as plain numbers (bytes) and texts."""
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
        """Write the peak and the bytes by kind of every step and phase, in MiB. Needs tensorboard."""
        from torch.utils.tensorboard import SummaryWriter

        records = self._complete()
        with SummaryWriter(str(directory)) as writer:
            for step in sorted({record.step for record in records}):
                for record in self._highest([record for record in records if record.step == step]).values():
                    for kind, count in {"peak": record.peak, **record.kinds}.items():
                        writer.add_scalar(f"memory MiB {record.phase}/{kind}", count / MIB, step)

    def plot(self, path: str | Path) -> None:
        """Draw bytes by kind at the end of every phase, and the peaks, to an image file. Needs matplotlib.

        State outside the measured memory is on top, with a label that says so. With `source="rss"` the picture leaves
        out the memory that the process has all the time beside the training, and says how much.
        """
        draw(self, self._complete()).savefig(path)

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


def _kinds(records: Sequence[Record]) -> list[str]:
    """The kinds that any of the records has, in the order of the looks."""
    return [kind for kind in LOOKS if any(record.kinds.get(kind) for record in records)]
