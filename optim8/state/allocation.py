"""Allocation of state: a few flat arenas for any number of parameters, on any devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import _disable_current_modes

from optim8 import _native
from optim8.rules import Moments
from optim8.state import symbols
from optim8.state.layout import Layout, Part, count_keys

_ALIGN = 64  # bytes; a cache line, and the width of the widest vector

DEVICE, HOST, DISK = TIERS = ("device", "host", "disk")  # where state may live, fastest first


class Arena:
    """Elements of one dtype on one device that start as `fill`; `flat` is their memory, once there is any.

    is_symbol: whether they are state of a parameter without memory (symbols.is_symbol), and so have none.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        fill: float = 0,
        align: int = _ALIGN,
        is_symbol: bool = False,
    ) -> None:
        self.dtype, self.device, self.fill, self.is_symbol = dtype, device, fill, is_symbol
        self.step = max(1, align // dtype.itemsize)
        self.size = 0
        self.flat = torch.empty(0, dtype=dtype)
        self.begins: list[int] = []
        self.parts: list[Part] = []

    def add(self, part: Part) -> None:
        """Make room for a tensor."""
        self.begins.append(self.size)
        self.parts.append(part)
        self.size += -(-part.size // self.step) * self.step

    def fill_beside(self) -> None:
        """Get memory on the device."""
        self.flat = torch.full((self.size,), self.fill, dtype=self.dtype, device=self.device)

    def cut(self) -> Iterator[torch.Tensor]:
        """The tensors for which room was made, in order, each made when it is asked for. The storage of each is all of
        its room."""
        rooms = [end - begin for begin, end in zip(self.begins, [*self.begins[1:], self.size])]
        exact = [part.size == room for part, room in zip(self.parts, rooms, strict=True)]
        shapes = [part.shape if fits else (room,) for part, room, fits in zip(self.parts, rooms, exact, strict=True)]
        strides = [part.stride if fits else (1,) for part, fits in zip(self.parts, exact, strict=True)]
        tensors = cut(self.flat, self.begins, shapes, strides, by_view=self.is_symbol)
        for tensor, part, fits in zip(tensors, self.parts, exact, strict=True):
            yield tensor if fits else tensor.as_strided(part.shape, part.stride)


class Allocator(Protocol):
    """Decides where state lives, and gives memory there.

    allocation_order: the tiers in the order in which they get memory; first the one that may have none left.
    """

    @property
    def allocation_order(self) -> Sequence[str]: ...

    def assign(self, sizes: Sequence[int], device: torch.device) -> Sequence[str]:
        """The tier of each new state of `sizes` bytes, of parameters on `device`."""

    def allocate(self, tier: str, device: torch.device, arenas: Sequence[Arena]) -> None:
        """Give memory of a tier to arenas of the state of parameters on `device`, and fill it."""

    def reaches(self, tensor: torch.Tensor, param: torch.Tensor) -> bool:
        """Whether the state of a parameter may lie where `tensor` does."""


class Resident:
    """Memory beside the parameters, as much as the device has."""

    allocation_order: Sequence[str] = (DEVICE,)

    def assign(self, sizes: Sequence[int], device: torch.device) -> Sequence[str]:
        return [DEVICE] * len(sizes)

    def allocate(self, tier: str, device: torch.device, arenas: Sequence[Arena]) -> None:
        for arena in arenas:
            arena.fill_beside()

    def reaches(self, tensor: torch.Tensor, param: torch.Tensor) -> bool:
        return tensor.device == param.device


def allocate(wanted: Sequence[tuple[torch.Tensor, Layout]], allocator: Allocator) -> list[dict[str, Any]]:
    """Zero state for parameters.

    Args:
        wanted: (parameter or its local shard, the layout of its state).
        allocator: decides where the state lives.

    Returns:
        For each parameter its state, in order: the tensors of its layout, the count of steps on the CPU.

    Raises:
        OSError: there is no room on the disk; nothing was allocated.
        RuntimeError: a tracer's mode is on, which would make state of another kind than the parameters.
    """
    by_device: dict[torch.device, list[int]] = {}
    for i, (param, _) in enumerate(wanted):
        by_device.setdefault(param.device, []).append(i)
    is_symbol = bool(wanted) and symbols.is_symbol(wanted[0][0])  # parameters of both kinds are never stepped together
    reason = symbols.obstacle_of_memory() if wanted and not is_symbol else ""
    if reason:
        raise RuntimeError(f"optim8: state cannot be made here: {reason}")
    entries: list[dict[str, Any]] = [{}] * len(wanted)
    for device, indices in by_device.items():
        by_tier: dict[str, list[int]] = {}
        for i, tier in zip(indices, allocator.assign([wanted[i][1].nbytes for i in indices], device), strict=True):
            by_tier.setdefault(tier, []).append(i)
        for tier in sorted(by_tier, key=allocator.allocation_order.index):
            layouts = [wanted[i][1] for i in by_tier[tier]]
            made = _allocate(layouts, device, tier, allocator, is_symbol)
            for i, entry in zip(by_tier[tier], made, strict=True):
                entries[i] = entry
    return entries


def _allocate(
    layouts: Sequence[Layout], device: torch.device, tier: str, allocator: Allocator, is_symbol: bool
) -> list[dict[str, Any]]:
    def arena_of(dtype: torch.dtype, beside: torch.device, fill: float, align: int) -> Arena:
        return Arena(dtype, beside, fill, align, is_symbol)

    steps = arena_of(torch.float32, torch.device("cpu"), 0, 1)
    arenas: dict[Any, Arena] = {"step": steps, "scales": arena_of(torch.float32, device, 0, 1)}
    homes = []  # of each tensor, its arena
    for layout in layouts:
        for part in layout.parts:
            key = part.role if part.role != "values" else (part.key if part.dtype == torch.uint8 else part.dtype)
            if part.role == "step" and part.fill:
                key = part.key
            arena = arenas.get(key)
            if arena is None:
                is_count = part.role == "step"
                beside, align = (steps.device, 1) if is_count else (device, _ALIGN)
                arena = arenas[key] = arena_of(part.dtype, beside, part.fill, align)
            arena.add(part)
            homes.append(arena)
    # A mode that counts memory is to count what is cut, and not the arena besides.
    is_seen = is_symbol or torch._C._len_torch_dispatch_stack() == 0
    with nullcontext() if is_seen else _disable_current_modes():
        allocator.allocate(tier, device, list(arenas.values()))
    # Parameter by parameter, so that the small objects a step must look at lie together.
    tensors = {id(arena): arena.cut() for arena in arenas.values()}
    home = iter(homes)
    return [{part.key: next(tensors[id(next(home))]) for part in layout.parts} for layout in layouts]


def cut(
    flat: torch.Tensor,
    begins: Sequence[int],
    shapes: Sequence[tuple[int, ...]],
    strides: Sequence[tuple[int, ...]],
    by_view: bool = False,
) -> Iterator[torch.Tensor]:
    """Tensors in the memory of a flat one, each with a storage of its own that begins at an element. torch saves and
    copies a tensor with its whole storage, and saving the state of one parameter must not save that of all.

    `by_view`: views instead, which is all that there is without memory.
    """
    if by_view or flat.device.type == "meta":  # the planner counts allocations
        return (flat.as_strided(*at) for at in zip(shapes, strides, begins, strict=True))
    return map(torch.utils.dlpack.from_dlpack, _native.cpu().cut(flat, list(begins), list(shapes), list(strides)))


def move_steps(entries: Sequence[tuple[torch.Tensor, dict[str, Any]]], moments: Moments) -> None:
    """Move the counts of steps of (parameter, state), and the scalars of their rule, beside the parameters, in one copy
    to each device."""
    by_device: dict[torch.device, list[tuple[dict[str, Any], str]]] = {}
    keys = count_keys(moments)
    for param, entry in entries:
        by_device.setdefault(param.device, []).extend((entry, key) for key in keys)
    for device, places in by_device.items():
        counts = torch.stack([entry[key] for entry, key in places]).to(device)
        none: list[tuple[int, ...]] = [()] * len(places)
        for (entry, key), count in zip(places, cut(counts, range(len(places)), none, none), strict=True):
            entry[key] = count
