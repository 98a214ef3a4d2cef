"""Which tier state goes to: sizes and budgets in, tiers out. Nothing is allocated and no device is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from optim8.paging.options import Pager
from optim8.paging.segments import DEVICE, DISK, HOST


@dataclass(frozen=True)
class Plan:
    """The tier of each parameter's state, and what streaming it takes beside."""

    tiers: tuple[str, ...]  # "device", "host" or "disk", in the order of the sizes
    sizes: tuple[int, ...]  # bytes
    streaming_bytes: int  # of host memory, the pages of a mapped file that are in use at a time; 0 without a limit

    def bytes_by_tier(self) -> dict[str, int]:
        """Bytes of state in each tier that gets any."""
        totals: dict[str, int] = {}
        for tier, size in zip(self.tiers, self.sizes, strict=True):
            totals[tier] = totals.get(tier, 0) + size
        return totals


def plan(
    pager: Pager,
    sizes: Sequence[int],
    device_type: str,
    *,
    device_free: int = 0,
    device_taken: int = 0,
    host_taken: int = 0,
) -> Plan:
    """Each state to the fastest tier that has room for it, in order; no state is split.

    Args:
        pager: the budgets.
        sizes: bytes of each parameter's state.
        device_type: "cpu" or "cuda", of the parameters.
        device_free: bytes that are free on a CUDA device; asked only where the pager states no device_budget.
        device_taken, host_taken: bytes of the budgets that earlier state takes.
    """
    room: dict[str, int | None] = {
        DEVICE: _device_room(pager, device_type, device_free, device_taken),
        HOST: _host_room(pager, device_type, host_taken),
    }
    tiers = []
    for size in sizes:
        tier = next((name for name, left in room.items() if left is None or size <= left), DISK)
        left = room.get(tier)
        if left is not None:
            room[tier] = left - size
        tiers.append(tier)
    streaming = pager.bucket_bytes if DISK in tiers and pager.host_bytes is not None else 0
    return Plan(tuple(tiers), tuple(sizes), streaming)


def _device_room(pager: Pager, device_type: str, free: int, taken: int) -> int:
    if pager.keep or device_type == "cpu":
        return 0
    return max(0, free - pager.reserve_bytes if pager.device_bytes is None else pager.device_bytes - taken)


def _host_room(pager: Pager, device_type: str, taken: int) -> int | None:
    """Bytes that state may still take in memory of the host; None: any number."""
    if pager.keep or (pager.host_bytes is None and device_type == "cpu"):
        return 0
    if pager.host_bytes is None:
        return None
    # One bucket of the budget is for the pages of the file that is streamed.
    return max(0, pager.host_bytes - pager.bucket_bytes - taken)
