"""The tiers of memory, and which one each state goes to: a function of sizes and budgets, which allocates nothing and
queries no device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from optim8.paging.pager import Pager
from optim8.state.allocation import DEVICE, DISK, HOST
from optim8.state.mapped import PAGE

# A step over the disk takes so many times `bucket` of memory where there is room, or has the system read so far ahead.
# Once would do for a disk that never pauses.
AHEAD = 4


@dataclass(frozen=True)
class Plan:
    """The tier of each parameter's state, and the memory that streaming needs in addition."""

    tiers: tuple[str, ...]  # "device", "host" or "disk", in the order of the sizes
    sizes: tuple[int, ...]  # bytes
    streaming_bytes: int  # host memory that a step over the disk needs in addition; 0 without a limit

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
    owner: str = "optim8.paging.plan",
) -> Plan:
    """Assign each state, in order, to the fastest tier that has room for it; no state is split.

    Args:
        pager: the budgets.
        sizes: bytes of each parameter's state.
        device_type: "cpu" or "cuda", of the parameters.
        device_free: bytes that are free on a CUDA device; it counts only where the pager has no device_budget.
        device_taken, host_taken: bytes of the budgets that earlier state uses.
        owner: the caller's name, for the errors.

    Raises:
        ValueError: state of CUDA parameters has room on the disk only, which a GPU cannot reach; the message names a
            host_budget that is large enough.
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
    if device_type == "cuda" and DISK in tiers:
        _refuse_disk(pager, sizes, tiers, host_taken, owner)
    in_host = host_taken + sum(size for size, tier in zip(sizes, tiers, strict=True) if tier == HOST)
    streams = DISK in tiers and pager.host_bytes is not None
    return Plan(tuple(tiers), tuple(sizes), streaming_room(pager, in_host) if streams else 0)


def streaming_room(pager: Pager, host_taken: int) -> int:
    """Bytes of memory, in whole pages, that a step over the disk may use when state takes `host_taken` bytes of host
    memory: what the budget leaves, and no more than speeds the step up."""
    most = AHEAD * pager.bucket_bytes
    room = most if pager.host_bytes is None else max(pager.bucket_bytes, min(most, pager.host_bytes - host_taken))
    return room // PAGE * PAGE


def _refuse_disk(pager: Pager, sizes: Sequence[int], tiers: Sequence[str], host_taken: int, owner: str) -> None:
    if pager.keep:
        raise ValueError(
            f"{owner}: a kept directory holds state of parameters on the CPU, got parameters on a GPU, which cannot "
            "use a mapped file. Pass a Pager without keep, and save state dicts."
        )
    homeless = sum(size for size, tier in zip(sizes, tiers, strict=True) if tier == DISK)
    # What is on the device is the same under any host_budget, so all the rest is what host memory must take.
    needed = sum(size for size, tier in zip(sizes, tiers, strict=True) if tier != DEVICE)
    needed += host_taken + pager.bucket_bytes
    raise ValueError(
        f"{owner}: state of CUDA parameters must be in the GPU's memory or in that of the host, but "
        f"{homeless / 2**20:.1f} MiB find no room there under this Pager, and a GPU cannot use a mapped file. Raise "
        f"host_budget to {-(-needed // 2**20)}MiB (None: no limit), raise device_budget, or keep less state "
        "(optim_bits=8, fewer parameters)."
    )


def _device_room(pager: Pager, device_type: str, free: int, taken: int) -> int:
    if pager.keep or device_type == "cpu":
        return 0
    return max(0, free - pager.reserve_bytes if pager.device_bytes is None else pager.device_bytes - taken)


def _host_room(pager: Pager, device_type: str, taken: int) -> int | None:
    """Bytes of host memory that state may still take; None: any number."""
    if pager.keep or (pager.host_bytes is None and device_type == "cpu"):
        return 0
    if pager.host_bytes is None:
        return None
    # One bucket of the budget is for the pages of the file that is streamed.
    return max(0, pager.host_bytes - pager.bucket_bytes - taken)
