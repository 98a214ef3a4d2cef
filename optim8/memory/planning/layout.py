"""The state of optim8's optimizers on the meta device. The code that lays it out in training lays it out here, so
sizes, tiers and alignment are those of the training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from optim8 import rules
from optim8.optim.base import BlockwiseOptimizer
from optim8.paging import files
from optim8.paging.pager import Pager
from optim8.paging.tiers import plan as plan_tiers
from optim8.rules import Moments
from optim8.state.allocation import DEVICE, HOST, TIERS, Allocator, Arena, Resident, allocate
from optim8.state.layout import PARAM_LOW, STEP, bits_of, layout_of, moments_of
from optim8.state.mapped import PAGE
from optim8.step import overrides
from optim8.step.hypers import bits_of_new_state
from optim8.step.weight_options import counts_steps

Bytes = dict[tuple[str, str], int]  # by kind and tier
# A tensor on the meta device, and the moments and bits of its state.
Requests = list[tuple[torch.Tensor, Moments, int]]


def state_requests(
    optimizer: BlockwiseOptimizer, groups: list[dict[str, Any]], parts: dict[int, tuple[int, ...]], frozen: set[int]
) -> tuple[list[Requests], list[int]]:
    """For each group, the parts of parameters for which one device has state, with their precision; and the numbers of
    values of the tensors that would have 8-bit state if they were not smaller than `min_8bit_size`.

    Args:
        optimizer: whose state it is; what it has already keeps its precision.
        groups: its parameter groups, or groups that stand for them.
        parts: the shapes that the device holds, by identity of the parameter.
        frozen: identities of parameters without gradients. They have no state, except what they have already.

    Raises:
        ValueError: a group has a parameter that is not in `parts`.
    """
    resolved = None if overrides.none_made() else overrides.resolve("optim8.memory.plan", groups)
    requests: list[Requests] = []
    small: list[int] = []
    for index, group in enumerate(groups):
        requests.append([])
        for position, param in enumerate(group["params"]):
            if id(param) not in parts:
                raise ValueError(
                    f"optim8.memory.plan: parameter {position} of group {index} of the optimizer must be a "
                    "parameter of the model. Pass the module that the optimizer was made for."
                )
            entry = optimizer.state.get(param)
            if not entry and id(param) in frozen:
                continue
            options = {**group, **({} if resolved is None else resolved.by_id.get(id(param), {}))}
            if entry:
                moments, bits = moments_of(optimizer.moments, entry), bits_of(optimizer.moments, entry)
            else:
                moments, bits = rules.variant(optimizer.rule, options).moments, bits_of_new_state(options, param)
                moments = moments.beside(options["master_bits"])
            if not moments and not counts_steps(options):
                continue
            requests[-1].append((torch.empty(parts[id(param)], dtype=torch.float32, device="meta"), moments, bits))
            if bits == 32 and bits_of_new_state({**options, "min_8bit_size": 0}, param) != 32:
                small.append(param.numel())
    return requests, small


def state_bytes(groups: Sequence[Requests], pager: Pager | None, device: str, free: int) -> Bytes:
    """Bytes by kind and tier of the state of all groups.

    Args:
        device: "cuda" or "cpu", where the parameters are.
        free: bytes of a CUDA device that are free for paged state.
    """
    store = None if pager is None else _MetaStore(pager, device, free)
    totals: Bytes = {}
    arenas: dict[int, tuple[str, int]] = {}
    allocator: Allocator = Resident() if store is None else store
    # A first step allocates the state of all groups at once.
    layouts = [(param, layout_of(moments, param, bits)) for group in groups for param, moments, bits in group]
    for entry in allocate(layouts, allocator):
        for name, value in entry.items():
            kind, key = _kind(name, value), _key(value)
            tier = "device" if device == "cuda" and value.device.type == "meta" else "host"
            tier = tier if store is None else store.tiers.get(key, tier)
            totals[kind, tier] = totals.get((kind, tier), 0) + value.nbytes
            arenas[key] = (tier, value.untyped_storage().nbytes())
    for tier in TIERS:
        of_tensors = sum(count for (_, of_tier), count in totals.items() if of_tier == tier)
        totals["alignment", tier] = sum(size for of_tier, size in arenas.values() if of_tier == tier) - of_tensors
    if store is not None and store.streaming:
        totals["paging buffers", "host"] = store.streaming
    return totals


class _MetaStore:
    """Stands for the store of a paged optimizer: it has the same tiers and segments, and no memory."""

    allocation_order: Sequence[str] = TIERS[::-1]

    def __init__(self, pager: Pager, device: str, free: int) -> None:
        self._pager, self._device, self._free = pager, device, free
        self._taken = 0  # bytes on the device
        self._memory: list[torch.Tensor] = []
        self.tiers: dict[int, str] = {}  # by storage
        self.streaming = 0

    def assign(self, sizes: Sequence[int], device: torch.device) -> tuple[str, ...]:
        host = sum(memory.numel() for memory in self._memory if self.tiers[_key(memory)] == HOST)
        planned = plan_tiers(
            self._pager,
            sizes,
            self._device,
            device_free=self._free - self._taken,
            device_taken=self._taken,
            host_taken=host,
            owner="optim8.memory.plan",
        )
        self.streaming = max(self.streaming, planned.streaming_bytes)
        self._taken += planned.bytes_by_tier().get(DEVICE, 0)
        return planned.tiers

    def reaches(self, tensor: torch.Tensor, param: torch.Tensor) -> bool:
        return True

    def allocate(self, tier: str, device: torch.device, arenas: Sequence[Arena]) -> None:
        if tier == DEVICE:
            Resident().allocate(tier, device, arenas)
            return
        begins, size = files.offsets(arenas, PAGE if self._pager.keep else 0)
        memory = torch.empty(size, dtype=torch.uint8, device="meta")
        for arena, begin in zip(arenas, begins, strict=True):
            arena.flat = memory[begin : begin + arena.size * arena.dtype.itemsize].view(arena.dtype)
        self._memory.append(memory)
        self.tiers[_key(memory)] = tier


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _kind(name: str, value: torch.Tensor) -> str:
    if name == STEP or any(name == scalar.name for rule in rules.every().values() for scalar in rule.moments.scalars):
        return "step counts"
    if name == PARAM_LOW:
        return "low bits of weights"
    if value.dtype == torch.uint8:
        return "codes"
    return "absmax" if name.endswith("_absmax") else "float32 state"
