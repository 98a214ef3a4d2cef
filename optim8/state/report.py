"""What a conversion of optimizer state cost, tensor by tensor, for those who ask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Row:
    """One converted state tensor.

    Attributes:
        name: where it stands, such as `state[0]['exp_avg']`.
        how: "copied" (bit for bit), "widened" (codes to float32, exact), "quantized" (floats to codes) or "requantized"
            (codes to codes of other blocks or of another table).
        max_error: largest |new - old|, in the unit of the state.
        relative_error: Euclidean norm of new - old, divided by that of old; 0 where both are 0.
    """

    name: str
    how: str
    max_error: float
    relative_error: float


@dataclass(frozen=True)
class Note:
    """A remark on values of a state that will affect the next steps.

    Attributes:
        name: where it stands, such as `state[0]['exp_avg']`.
        count: how many values it concerns.
        text: what it is.
    """

    name: str
    count: int
    text: str


@dataclass
class Report:
    """The rows of the conversions that ran while the report was asked for, in order, and notes on odd values that they
    read."""

    rows: list[Row] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    def add(self, name: str, how: str, old: torch.Tensor, new: torch.Tensor) -> None:
        """Compare two tensors of the same shape; `old` is what there was."""
        was, error = old.double(), (new.double() - old.double()).abs()
        largest = float(error.max()) if error.numel() else 0.0
        norm, lost = float(was.norm()), float(error.norm())
        self.rows.append(Row(name, how, largest, lost / norm if norm else (0.0 if not lost else float("inf"))))

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.rows), default=0)
        lines = [
            f"{row.name:<{width}}  {row.how:<11}  largest error {row.max_error:.3g}, relative {row.relative_error:.3g}"
            for row in self.rows
        ]
        return "\n".join(lines + [f"{note.name}: {note.count} values {note.text}" for note in self.notes])


_asked: ContextVar[Report | None] = ContextVar("optim8_conversion_report", default=None)


@contextmanager
def report() -> Iterator[Report]:
    """Ask for a report of all conversions inside the `with` block, by this thread.

    Conversions are `load_state_dict` of another library's or another layout's state, `convert.to_torch`,
    `convert.to_bitsandbytes`, and an override of `optim_bits` after the first step. Measuring needs float64 copies of
    one tensor at a time.

    Examples:
        >>> import torch, optim8
        >>> p = torch.nn.Parameter(torch.ones(4096))
        >>> p.grad = torch.linspace(0, 1, 4096)
        >>> theirs = torch.optim.AdamW([p])
        >>> theirs.step()
        >>> with optim8.convert.report() as report:
        ...     optim8.AdamW8bit([p]).load_state_dict(theirs.state_dict())
        >>> [(row.name, row.how, row.relative_error < 0.01) for row in report.rows]
        [("state[0]['exp_avg']", 'quantized', True), ("state[0]['exp_avg_sq']", 'quantized', True)]
    """
    made = Report()
    token = _asked.set(made)
    try:
        yield made
    finally:
        _asked.reset(token)


def note(name: str, concerned: Callable[[], torch.Tensor], text: str) -> None:
    """Note how many values a mask marks, if a report was asked for and the mask marks any."""
    asked = current()
    count = int(concerned().sum()) if asked is not None else 0
    if asked is not None and count:
        asked.notes.append(Note(name, count, text))


def current() -> Report | None:
    """The report that was asked for, or None."""
    return _asked.get()
