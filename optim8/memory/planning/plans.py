"""Plans: bytes by kind and tier, whether they fit a budget, and the printed table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from optim8.state.allocation import TIERS
from optim8.text import parse_bytes, size_cell, table

# The kinds of rows of a plan, in the order of the printed table, and the entry of `Plan.bytes` that each counts in.
KINDS = {
    "parameters": "parameters",
    "float32 master copies": "parameters",
    "gradients": "gradients",
    "activations": "activations",
    "low bits of weights": "master",
    "codes": "codes",
    "absmax": "absmax",
    "float32 state": "state32",
    "bfloat16 state": "state16",
    "float16 state": "state16",
    "float64 state": "state64",
    "step counts": "state32",
    "tables": "buffers",
    "alignment": "buffers",
    "paging buffers": "buffers",
    "model's buffers": "buffers",
}
STATE = (
    "low bits of weights",
    "codes",
    "absmax",
    "float32 state",
    "bfloat16 state",
    "float16 state",
    "float64 state",
    "step counts",
    "tables",
)
WITHOUT = "Not in it: {}temporary tensors, buffers for communication, and what CUDA itself takes."


@dataclass(frozen=True)
class Row:
    """Bytes of one kind in one tier: "device" (a GPU's memory), "host" (RAM) or "disk"."""

    kind: str
    tier: str
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """The memory of one device, the fullest where devices differ. `print(plan)` shows it beside other optimizers.

    Attributes:
        title: the name of the model.
        optimizer: its name.
        rows: bytes by kind and tier.
        world_size: the number of devices.
        sharding: how they share the work.
        size: number of values of the whole model.
        tensors: number of its tensors.
        held: number of values that this device holds.
        dtypes: of the parameters.
        device: where they are, "cuda" or "cpu".
        beside: plans of the same training with other libraries' optimizers.
        request: the arguments of `plan`.
        notes: remarks on the plan, a sentence each.
    """

    title: str
    optimizer: str
    rows: tuple[Row, ...]
    world_size: int
    sharding: str
    size: int
    tensors: int
    held: int
    dtypes: tuple[str, ...]
    device: str
    beside: tuple[Plan, ...] = ()
    request: Mapping[str, Any] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes on one device, in all tiers, by kind: `parameters` (with master copies), `gradients`, `codes`,
        `absmax`, `state32` (float32 state and counts of steps) and `buffers` (for paging, the model's own, tables of
        codes, and alignment between tensors of state). `activations` are what forward and backward take at their peak
        beyond all that, where `loss` was given. `master` is what weights have beyond their parameters, where it
        is state; `state16` and `state64` are moments that another library keeps in 16 or 64 bits."""
        found = dict.fromkeys(("parameters", "gradients", "codes", "absmax", "state32", "buffers"), 0)
        for row in self.rows:
            found[KINDS[row.kind]] = found.get(KINDS[row.kind], 0) + row.nbytes
        return found

    @property
    def total(self) -> int:
        """The sum of `bytes`."""
        return sum(row.nbytes for row in self.rows)

    @property
    def tiers(self) -> dict[str, int]:
        """Bytes by tier: "device", "host" and "disk"."""
        return {tier: sum(row.nbytes for row in self.rows if row.tier == tier) for tier in TIERS}

    @property
    def state_bytes(self) -> int:
        """Bytes of the tensors in `optimizer.state`, without the alignment between them."""
        return sum(row.nbytes for row in self.rows if row.kind in STATE)

    @property
    def needed(self) -> int:
        """Bytes in the tier of the parameters: the GPU, or RAM."""
        return self.tiers["device" if self.device == "cuda" else "host"]

    @property
    def elsewhere(self) -> dict[str, int]:
        """Bytes by tier, without the tier of the parameters."""
        own = "device" if self.device == "cuda" else "host"
        return {tier: count for tier, count in self.tiers.items() if count and tier != own}

    def fits(self, budget: int | str) -> bool:
        """Whether `needed` is at most `budget`: bytes, or a text such as "24GiB"."""
        return self.needed <= budget_bytes(budget)

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain numbers and texts, for JSON."""
        return {
            "model": self.title,
            "optimizer": self.optimizer,
            "parameters": self.size,
            "tensors": self.tensors,
            "dtypes": list(self.dtypes),
            "device": self.device,
            "world_size": self.world_size,
            "sharding": self.sharding,
            "bytes": self.bytes,
            "total": self.total,
            "tiers": self.tiers,
            "state_bytes": self.state_bytes,
            "rows": [vars(row) for row in self.rows],
            "notes": list(self.notes),
            "beside": [plan.as_dict() for plan in self.beside],
        }

    @property
    def _without(self) -> str:
        """What the plan leaves out, as a sentence."""
        return WITHOUT.format("activations, " if self.request.get("loss") is None else "")

    def __str__(self) -> str:
        plans = [self, *self.beside]
        present = {(row.kind, row.tier) for plan in plans for row in plan.rows}
        keys = [(kind, tier) for kind in KINDS for tier in TIERS if (kind, tier) in present]
        rows = [[f"{kind} ({tier})", *(_cell(plan, kind, tier) for plan in plans)] for kind, tier in keys]
        for tier in TIERS:
            if any(plan.tiers[tier] for plan in plans):
                rows.append([f"total ({tier})", *(size_cell(plan.tiers[tier]) for plan in plans)])
        rows.append(["bytes a parameter", *(f"{plan.total / max(1, plan.held):.2f}" for plan in plans)])
        over = "one device"
        if self.world_size > 1:
            over = f"{self.sharding} over {self.world_size} devices, bytes of the fullest one"
        head = f"{self.title}: {self.size:,} parameters in {self.tensors} tensors, {' and '.join(self.dtypes)}; {over}"
        parts = [head, table(["", *(plan.optimizer for plan in plans)], rows), *self.notes, self._without]
        return "\n\n".join(parts)


def budget_bytes(size: int | str) -> int:
    """A budget in bytes from a number, or from a text such as "24GiB".

    Raises:
        ValueError: it is neither, or a text without a unit: "24" would be 24 bytes, which nobody has in mind.
    """
    count = parse_bytes(size)
    if count is not None:
        return count
    number = str(size).strip()
    if number.replace(".", "", 1).isdigit():
        raise ValueError(
            f"optim8.memory: a size needs a unit, got {size!r}. Write {number}GiB, or {number}B for bytes."
        )
    raise ValueError(f"optim8.memory: a size must be a number of bytes or a text such as '24GiB', got {size!r}.")


def _cell(plan: Plan, kind: str, tier: str) -> str:
    count = sum(row.nbytes for row in plan.rows if (row.kind, row.tier) == (kind, tier))
    return size_cell(count) if count else "-"
