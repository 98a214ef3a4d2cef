"""Parameters that are DTensors: their local shards, and DTensors around tensors that lie as they do.

State is allocated for the local shard, as plain tensors. torch.distributed is not imported here before a DTensor
exists.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from copy import deepcopy
from functools import lru_cache
from typing import Any

import torch

from optim8.state import tiles
from optim8.state.layout import dense_stride


def dtensor_class() -> Any:
    """The class DTensor, or None while nothing has imported it: then there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else getattr(module, "DTensor", None)


def is_dtensor(tensor: Any) -> bool:
    dtensor = dtensor_class()
    return dtensor is not None and isinstance(tensor, dtensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The local shard of a DTensor, waited for, without autograd; any other tensor itself."""
    if not is_dtensor(tensor):
        return tensor
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    with torch.no_grad():
        shard: torch.Tensor = tensor.to_local()  # type: ignore[attr-defined]
    # An object of its own, so that nothing set on it stays with the parameter.
    return shard.wait() if isinstance(shard, AsyncCollectiveTensor) else shard.detach()


def first_of(param: Any) -> int:
    """Where the local shard of a DTensor begins in it: the index of its first value, in order of the dimensions."""
    return _first_of(param.device_mesh, tuple(param.placements), tuple(param.shape))


@lru_cache(maxsize=4096)
def _first_of(mesh: Any, placements: tuple[Any, ...], shape: tuple[int, ...]) -> int:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offsets = compute_local_shape_and_global_offset(torch.Size(shape), mesh, placements)
    return sum(offset * stride for offset, stride in zip(offsets, contiguous_stride(shape), strict=True))


def ways(param: Any) -> dict[int, int]:
    """The number of ranks over which each sharded dimension is split, by dimension."""
    counts: dict[int, int] = {}
    for size, placement in zip(param.device_mesh.shape, param.placements, strict=True):
        if hasattr(placement, "dim"):
            counts[placement.dim] = counts.get(placement.dim, 1) * size
        elif not placement.is_replicate():
            raise ValueError(
                f"optim8: state of a parameter with placement {placement} cannot be saved or loaded. "
                "Use parameters that are sharded or replicated."
            )
    return counts


def alone(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a storage of its own. torch can neither copy nor save a DTensor around a view that begins
    within a storage; and it saves the whole storage with a DTensor around a part of it."""
    if tensor.numel() == 0:
        return torch.empty_like(tensor)
    return torch.utils.dlpack.from_dlpack(tensor).as_strided(tensor.shape, tensor.stride())


def wrap(shard: torch.Tensor, shape: Sequence[int], stride: Sequence[int], param: Any) -> torch.Tensor:
    """A DTensor around this shard, without a copy, that lies over the ranks as `param` does."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    # As FSDP2 makes its own. DTensor.from_local would move the shard of an offloaded parameter to the mesh's device.
    meta = TensorMeta(torch.Size(shape), tuple(stride), shard.dtype)
    spec = DTensorSpec(param.device_mesh, tuple(param.placements), tensor_meta=meta)
    return DTensor(shard, spec, requires_grad=False)  # type: ignore[no-untyped-call]


def tiling_of(param: Any, contiguous: bool = True) -> tuple[int, int]:
    """How the tiles of a sharded parameter lie (tiles.tiling); `contiguous`: whether its shard is."""
    return tiles.tiling(tuple(param.shape), ways(param), contiguous and param.is_contiguous())


def contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    return torch.empty(shape, dtype=torch.uint8, device="meta").stride()


def shard_of(where: str, name: str, value: torch.Tensor, param: Any) -> torch.Tensor:
    """This rank's shard of a tensor that is whole, or lies over the same ranks in some way."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = param.device_mesh
    if not is_dtensor(value):
        # Every rank has the whole: nothing is sent.
        value = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    elif value.device_mesh != mesh:  # type: ignore[attr-defined]
        raise ValueError(
            f"{where}[{name!r}] must lie on the parameter's mesh {mesh}, got {value.device_mesh}. "  # type: ignore[attr-defined]
            "Load it with torch.distributed.checkpoint, which moves it."
        )
    if value.placements != param.placements:  # type: ignore[attr-defined]
        value = value.redistribute(mesh, param.placements)  # type: ignore[attr-defined]
    return local(value)


def copy_beside(value: Any, param: torch.Tensor) -> Any:
    """A copy of what others keep with a parameter: its tensors on the parameter's device, and those of the shape of a
    DTensor sharded as it is."""
    if isinstance(value, dict):
        return {key: copy_beside(each, param) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(copy_beside(each, param) for each in value)
    if not isinstance(value, torch.Tensor):
        return deepcopy(value)
    if is_dtensor(value):
        return value.detach().clone()
    shard = local(param)
    if is_dtensor(param) and value.shape == param.shape:
        cut = shard_of("", "", value.detach(), param).to(shard.device, copy=True)
        return wrap(cut, value.shape, dense_stride(param), param)
    return value.detach().to(shard.device, copy=True)
