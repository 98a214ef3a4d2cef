"""The norms of tensors that a rule may depend on: sums of squares, measured before the step and added up over ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch

from optim8.state.shards import is_dtensor

# Adds up in place what ranks have of the same tensors: sums, float64 [rows, 2], and which of a step's rows these are.
Reduce: TypeAlias = Callable[[torch.Tensor, Sequence[int]], None]


def over_ranks(params: Sequence[torch.Tensor]) -> Reduce | None:
    """What adds up the sums of shards, for the parameters of a step's rows; None where none of them is sharded.

    All ranks of a mesh must step the same parameters of it, since they wait for each other. Replicas are not added.
    """
    # By mesh and its dimension, the rows that are sharded over that.
    sharded: dict[tuple[Any, int], list[int]] = {}
    for row, param in enumerate(params):
        if is_dtensor(param):
            for dim, placement in enumerate(param.placements):  # type: ignore[attr-defined]
                if not placement.is_replicate():
                    sharded.setdefault((param.device_mesh, dim), []).append(row)  # type: ignore[attr-defined]
    if not sharded:
        return None

    def reduce(sums: torch.Tensor, rows: Sequence[int]) -> None:
        at = {row: i for i, row in enumerate(rows)}
        for (mesh, dim), members in sharded.items():
            some = [at[row] for row in members if row in at]
            if not some:
                continue
            which = slice(None) if len(some) == len(at) else torch.tensor(some, device=sums.device)
            # Offloaded parameters are on the CPU, and their mesh is not.
            added = sums[which].to(mesh.device_type, copy=True)
            torch.distributed.all_reduce(added, group=mesh.get_group(dim))
            sums[which] = added.to(sums.device)

    return reduce


def measured(rows: Any, reduce: Reduce | None, measure: Callable[[], None]) -> torch.Tensor:
    """Have rows on the CPU measured, float64 [rows, 2]: the step takes the sums from there, so keep it until then.

    Args:
        rows: native DeviceRows.
        reduce: adds up shards; None: there are none.
        measure: measures the rows.
    """
    sums = torch.zeros(len(rows), 2, dtype=torch.float64)
    rows.take_sums(sums.data_ptr())
    measure()
    if reduce is not None:
        reduce(sums, rows.places)
    return sums


def check_whole(owner: str, params: Iterable[torch.Tensor]) -> None:
    """Raise ValueError for parameters of FullyShardedDataParallel: each rank has a part, and nothing tells of which."""
    if "torch.distributed.fsdp" in sys.modules and any(getattr(p, "_fsdp_flattened", False) for p in params):
        raise ValueError(
            f"{owner}: needs norms of whole parameters, and those of FullyShardedDataParallel are parts. Shard with "
            "torch.distributed.fsdp.fully_shard instead."
        )
