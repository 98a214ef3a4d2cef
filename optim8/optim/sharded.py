"""Parameters that are DTensors: a step sees the local shards, a state dict holds DTensors again.

State is allocated for the local shard, as plain tensors. torch.distributed is not imported here before a DTensor
exists.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from copy import deepcopy
from typing import Any, TypeAlias

import torch

from optim8.codec import BLOCK
from optim8.optim import sources, states, tiles
from optim8.optim.inbox import Inbox, absent_keys, nothing
from optim8.optim.sources import Codes, Entry, Source, Tiled
from optim8.optim.states import Moment
from optim8.optim.windows import Window, Windows


def _dtensor() -> Any:
    """The class DTensor, or None while nothing has imported it: then there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else getattr(module, "DTensor", None)


def is_dtensor(tensor: Any) -> bool:
    dtensor = _dtensor()
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


# Parameters that are stepped with the same scalars: index of their group, list as long as the group's (placeholders
# without gradient keep the others' places), native Hyper.
Part: TypeAlias = tuple[int, list[torch.Tensor], Any]


class LocalStep:
    """What one step works on: parts, and for each the state that belongs to its parameters.

    Where there are no DTensors these are the optimizer's own objects. A DTensor is stood in for by its local shard,
    which has the local gradient as its `.grad` until the step is over; a tensor with gaps, by a dense copy.
    """

    def __init__(self, owner: str, parts: Sequence[Part], state: dict[Any, Any]) -> None:
        self.parts: list[Part] = []
        self.states: list[dict[Any, Any]] = []
        self._whole, self._state = parts, state
        self._shards: list[tuple[torch.Tensor, torch.Tensor]] = []  # of every DTensor
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []  # (tensor with gaps, dense copy)
        dtensor = _dtensor()
        for part in parts:
            at, params, hyper = part
            if dtensor is not None and dtensor in map(type, params):
                who = f"{owner}: parameter {{}} of group {at}"
                part = (at, [self._stand_in(who.format(i), param) for i, param in enumerate(params)], hyper)
            self.parts.append(part)
        self.refresh()

    def refresh(self) -> None:
        """Look up the state of the parameters anew."""
        self.states = [
            self._state
            if part is whole
            else {own: self._state[p] for own, p in zip(part[1], whole[1], strict=True) if p in self._state}
            for part, whole in zip(self.parts, self._whole, strict=True)
        ]

    def close_gaps(self, gaps: Sequence[Sequence[int]]) -> None:
        """Have dense copies stand in for the tensors with gaps, which are at these indices of each part."""
        for number, indices in enumerate(gaps):
            if indices:
                at, params, hyper = self.parts[number]
                chosen = set(indices)
                dense = [self._copied(param) if i in chosen else param for i, param in enumerate(params)]
                self.parts[number] = (at, dense, hyper)
        self.refresh()

    def _copied(self, param: torch.Tensor) -> torch.Tensor:
        copy, grad = param.detach().clone(), param.grad
        if grad is not None and grad.dtype != copy.dtype:
            copy.grad_dtype = None  # or it takes no gradient of another dtype
        copy.grad = grad
        self._copies.append((param, copy))
        return copy

    def copy_back(self) -> None:
        """Give tensors with gaps what their copies have become."""
        for param, copy in self._copies:
            param.copy_(copy)
            copy.grad = None

    def _stand_in(self, who: str, param: Any) -> torch.Tensor:
        if not is_dtensor(param):
            return param  # type: ignore[no-any-return]
        shard = local(param)
        grad = param.grad
        if grad is not None:
            if not is_dtensor(grad):
                raise ValueError(f"{who} is a DTensor, so its gradient must be one, got a plain tensor.")
            if grad.placements != param.placements:  # such as one that is still to be summed over ranks
                grad = grad.redistribute(param.device_mesh, param.placements)
            shard.grad = local(grad)
        self._shards.append((param, shard))
        return shard

    def __enter__(self) -> LocalStep:
        return self

    def __exit__(self, *exception: object) -> None:
        stepped = []
        for param, shard in self._shards:
            if shard.grad is not None:
                stepped.append(param)
                shard.grad = None  # the table keeps the shard until the next step
        if stepped and exception[0] is None:
            torch.autograd.graph.increment_version(stepped)


def _ways(param: Any) -> dict[int, int]:
    """For each dimension that is sharded, over how many ranks."""
    ways: dict[int, int] = {}
    for size, placement in zip(param.device_mesh.shape, param.placements, strict=True):
        if hasattr(placement, "dim"):
            ways[placement.dim] = ways.get(placement.dim, 1) * size
        elif not placement.is_replicate():
            raise ValueError(
                f"optim8: state of a parameter with placement {placement} cannot be saved or loaded. "
                "Use parameters that are sharded or replicated."
            )
    return ways


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a storage of its own. A DTensor around a view that begins within a storage can neither be
    copied nor saved by torch; and whoever saves one around a part of a storage saves all of that."""
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


def check_can_save(owner: str, groups: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError where FullyShardedDataParallel would gather 8-bit state as if it were values. The same on every
    rank, so that none waits for another."""
    for index, group in enumerate(groups):
        if group["optim_bits"] == 8 and any(getattr(param, "_fsdp_flattened", False) for param in group["params"]):
            raise ValueError(
                f"{owner}.state_dict: group {index} has parameters of FullyShardedDataParallel, which cannot save "
                "8-bit state: it gathers state value by value, and a scale belongs to 256 values. Shard with "
                "torch.distributed.fsdp.fully_shard instead, or use optim_bits=32."
            )


def saved_state_dict(
    owner: str, moments: Sequence[Moment], params: Sequence[torch.Tensor], saved: dict[str, Any], windows: Windows
) -> dict[str, Any]:
    """A state dict in which the state of DTensors is DTensors of the whole parameter's shape, with tiles for scales.

    Nothing is sent between ranks. 32-bit state and codes are not copied. The tiles are put into `windows`, and the keys
    under which a state has nothing are kept open (inbox.py).
    """
    if _dtensor() is None or not any(is_dtensor(param) for param in params):
        return saved
    state = dict(saved["state"])
    with torch.inference_mode(False):  # tiles are written to later
        for index, param in enumerate(params):
            if is_dtensor(param) and state.get(index):
                state[index] = _saved_entry(f"{owner}: state[{index}]", moments, param, state[index], windows)
    return {**saved, "state": state}


def _saved_entry(
    where: str, moments: Sequence[Moment], param: Any, entry: dict[str, Any], windows: Windows
) -> dict[str, Any]:
    saved = dict(entry)
    shape, in_8_bits = tuple(param.shape), moments[0].absmax in entry
    for moment in moments:
        values = moment.values(entry)
        inbox = Inbox.around(_alone(values), id(saved))
        saved[moment.key(in_8_bits)] = wrap(inbox, shape, states.dense_stride(param), param)
        if in_8_bits:
            lead, size = tiling_of(param, values.is_contiguous())
            cut = tiles.from_absmax(tuple(values.shape), values.stride(), entry[moment.absmax], lead, size)
            whole = tiles.tiled_shape(shape, lead, size)
            inbox = Inbox.around(cut, id(saved))
            saved[moment.absmax] = wrap(inbox, whole, contiguous_stride(whole), param)
            windows.add(inbox, Window(where, moment, values, entry[moment.absmax], cut, lead, size))
    for key in absent_keys(moments, in_8_bits):
        empty = nothing(param, values.device)  # torch takes all tensors to be on one device
        saved[key] = wrap(Inbox.around(empty, id(saved)), empty.shape, empty.stride(), param)
    return saved


def tiling_of(param: Any, contiguous: bool = True) -> tuple[int, int]:
    """How the tiles of a sharded parameter lie (tiles.tiling); `contiguous`: whether its shard is."""
    return tiles.tiling(tuple(param.shape), _ways(param), contiguous and param.is_contiguous())


def contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    return torch.empty(shape, dtype=torch.uint8, device="meta").stride()


def _shard_of(where: str, name: str, value: torch.Tensor, param: Any) -> torch.Tensor:
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
        cut = _shard_of("", "", value.detach(), param).to(shard.device, copy=True)
        return wrap(cut, value.shape, states.dense_stride(param), param)
    return value.detach().to(shard.device, copy=True)


def of_shard(where: str, moments: Sequence[Moment], param: torch.Tensor, read: dict[str, Any]) -> Entry:
    """State of a whole parameter as sources for this rank's shard of it (all of it, where it is not sharded).

    Args:
        where: names the state, for messages.
        moments: the states of the rule.
        param: the parameter; where it is a DTensor, the tensors of `read` are DTensors too, or whole on every rank.
        read: `step`, and for each moment a source or Tiled, of the whole parameter's shape.

    Raises:
        ValueError: names the first key that does not fit.
    """
    shard = local(param)
    return {name: value for name, value in read.items() if name not in [m.name for m in moments]} | {
        moment.name: _moment_of_shard(where, moment, param, shard, read[moment.name]) for moment in moments
    }


def _moment_of_shard(where: str, moment: Moment, param: Any, shard: torch.Tensor, source: Source | Tiled) -> Source:
    values = source if isinstance(source, torch.Tensor) else source.codes
    if not is_dtensor(param):
        if is_dtensor(values):
            raise ValueError(
                f"{where}[{moment.key(isinstance(source, Tiled))!r}] is a DTensor, but the parameter is not. "
                "Save with StateDictOptions(full_state_dict=True), or shard the model first."
            )
        if not isinstance(source, Tiled):
            return source
        return Codes(*tiles.to_absmax(where, moment, source.codes, source.tiles, states.dense_stride(shard)))
    if isinstance(source, Codes):
        if source.table is None and source.blocksize == BLOCK:
            source = _tiled(source, param)
        else:
            values = source = sources.values(moment, source, source.codes.device)
    cut = _shard_of(where, moment.key(isinstance(source, Tiled)), values, param)
    if not isinstance(source, Tiled):
        return cut
    tiles.size_of(where, moment, source.tiles, param.numel())  # of the whole, so that no rank goes on alone
    cut_tiles = _shard_of(where, moment.absmax, source.tiles, param)
    return Codes(*tiles.to_absmax(where, moment, cut, cut_tiles, states.dense_stride(shard)))


def _tiled(source: Codes, param: Any) -> Tiled:
    """The same moment of a whole parameter, with tiles that can be sharded as it is."""
    codes, absmax = source.codes, source.absmax
    if is_dtensor(absmax):
        absmax = absmax.full_tensor()  # type: ignore[attr-defined]
    lead, size = tiling_of(param, codes.is_contiguous())
    return Tiled(codes, tiles.from_absmax(tuple(codes.shape), codes.stride(), absmax, lead, size))
