"""Where the state of each parameter is, as a list and as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from optim8.state.allocation import DISK
from optim8.text import size_text, table


@dataclass(frozen=True)
class Place:
    """Where the state of one parameter is."""

    group: int
    index: int  # in the group
    name: str  # "" where the optimizer was given no names
    shape: tuple[int, ...]
    precision: str  # "8bit", "16bit" or "32bit"
    tier: str  # "device", "host" or "disk"; "none" before the first gradient
    where: str  # the device, the kind of memory, or the file's directory
    bytes: int  # of state


class Placement(Sequence[Place]):
    """One Place for each parameter, in the order of the groups; `print` shows a table.

    Attributes:
        checkpoint: the last noted checkpoint, where the disk has a copy of its state: such as "'last.pt' of step 12";
            "" where there is no copy.
        checkpoint_bytes: bytes of that copy. `bytes_by_tier` does not count them.
    """

    def __init__(self, places: Sequence[Place], checkpoint: str = "", checkpoint_bytes: int = 0) -> None:
        self._places = tuple(places)
        self.checkpoint, self.checkpoint_bytes = checkpoint, checkpoint_bytes

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Place]:
        return iter(self._places)

    def __getitem__(self, index: int) -> Place:  # type: ignore[override]
        return self._places[index]

    def __repr__(self) -> str:
        tiers = [f"{size_text(size)} on {tier}" for tier, size in self.bytes_by_tier().items()]
        copy = f", copy at {self.checkpoint}: {size_text(self.checkpoint_bytes)}" if self.checkpoint else ""
        return f"Placement({len(self)} parameters, state: {', '.join(tiers) or 'none yet'}{copy})"

    def bytes_by_tier(self) -> dict[str, int]:
        """Bytes of state in each tier that holds any."""
        totals: dict[str, int] = {}
        for place in self._places:
            if place.bytes:
                totals[place.tier] = totals.get(place.tier, 0) + place.bytes
        return totals

    def __str__(self) -> str:
        heads = ("parameter", "shape", "state", "tier", "where", "MiB")
        rows = [
            (
                place.name or f"{place.group}.{place.index}",
                "x".join(map(str, place.shape)) or "()",
                place.precision,
                place.tier,
                place.where,
                f"{place.bytes / 2**20:.2f}",
            )
            for place in self._places
        ]
        totals = [("total", "", "", tier, "", f"{n / 2**20:.2f}") for tier, n in self.bytes_by_tier().items()]
        if self.checkpoint:
            totals.append(("copy at", "", "", DISK, self.checkpoint, f"{self.checkpoint_bytes / 2**20:.2f}"))
        return table(heads, [*rows, *totals], left=5)
