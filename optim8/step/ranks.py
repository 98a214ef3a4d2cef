"""Whole tensors from the shards of DTensors, and work on them that is spread over the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from optim8.state.shards import contiguous_stride, local, shard_of, wrap


def _device(param: Any) -> torch.device:
    """Where the ranks of a DTensor exchange tensors; the shards of an offloaded parameter are elsewhere."""
    kind: str = param.device_mesh.device_type
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def gather(shard: torch.Tensor, param: Any) -> torch.Tensor:
    """The whole of a tensor whose shards lie over the ranks as those of `param` do, on every rank of its mesh."""
    # Nothing is computed with it, and every backend sends float16; of gloo not each version sends bfloat16.
    sent = shard.to(_device(param)).contiguous().view(torch.float16)
    whole: torch.Tensor = wrap(sent, param.shape, contiguous_stride(param.shape), param).full_tensor()  # type: ignore[attr-defined]
    return whole.view(shard.dtype)


def cut(whole: torch.Tensor, param: Any) -> torch.Tensor:
    """This rank's shard of a tensor that every rank has, on the device of the parameter's shard."""
    return shard_of("", "", whole, param).to(local(param).device)


def spread(stack: torch.Tensor, param: Any, work: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """What `work` makes of a stack that every rank of a mesh has: each does its share and they exchange the results.

    Args:
        stack: (count, ...), bfloat16, contiguous.
        param: lies over the ranks. Those along one dimension of its mesh share the work, if it is sharded at all; those
            along the others do the same work.
        work: (some of the stack) -> a tensor of the same shape and dtype, in which each entry depends on its own alone.

    Returns:
        A tensor like the stack.
    """
    mesh = param.device_mesh
    ways = {dim: mesh.size(dim) for dim, each in enumerate(param.placements) if not each.is_replicate()}
    if not ways or max(ways.values()) == 1:
        return work(stack)
    import torch.distributed as dist

    # torch 2.13 gave it a new name, and warns of the old one.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    dim = max(ways, key=ways.__getitem__)
    count = -(-stack.size(0) // ways[dim])
    first = count * mesh.get_local_rank(dim)
    mine = stack.new_zeros(count, *stack.shape[1:])  # of the last ranks the share may be short, or empty
    share = stack[first : first + count]
    mine[: share.size(0)] = work(share)
    made = stack.new_empty(ways[dim] * count, *stack.shape[1:])
    gather(made.view(torch.float16), mine.view(torch.float16), group=mesh.get_group(dim))
    return made[: stack.size(0)]
