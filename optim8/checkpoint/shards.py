"""State of DTensors in state dicts: DTensors of the whole parameter's shape, with tiles for scales; and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from optim8.checkpoint.inbox import Inbox, absent_keys, nothing
from optim8.checkpoint.windows import Window, Windows
from optim8.codec import BLOCK
from optim8.rules import Moment, Moments
from optim8.state import moments as sources
from optim8.state import tiles
from optim8.state.layout import PARAM_LOW, bits_of, dense_stride, moments_of
from optim8.state.moments import Codes, Entry, Source, Tiled
from optim8.state.shards import (
    alone,
    contiguous_stride,
    dtensor_class,
    is_dtensor,
    local,
    shard_of,
    tiling_of,
    wrap,
)

# Neither gloo nor NCCL can send int16, so sharded dicts have the same bits under a dtype that they send.
CARRIERS = {torch.int16: torch.float16, torch.uint8: torch.uint8}


def check_can_save(owner: str, groups: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError where FullyShardedDataParallel would gather 8-bit state as if it were values. Every rank
    decides the same, so that none waits for another."""
    for index, group in enumerate(groups):
        if group["optim_bits"] != 32 and any(getattr(param, "_fsdp_flattened", False) for param in group["params"]):
            raise ValueError(
                f"{owner}.state_dict: group {index} has parameters of FullyShardedDataParallel, which cannot save "
                f"{group['optim_bits']}-bit state: it gathers state value by value, and a scale belongs to 256 values. "
                "Shard with torch.distributed.fsdp.fully_shard instead, or use optim_bits=32."
            )


def saved_state_dict(
    owner: str, moments: Moments, params: Sequence[torch.Tensor], saved: dict[str, Any], windows: Windows
) -> dict[str, Any]:
    """A state dict in which the state of DTensors is DTensors of the whole parameter's shape, with tiles for scales.

    Nothing is sent between ranks. 32-bit state and codes are not copied. The tiles are put into `windows`, and the keys
    under which a state has nothing are kept open (inbox.py).
    """
    if dtensor_class() is None or not any(is_dtensor(param) for param in params):
        return saved
    state = dict(saved["state"])
    with torch.inference_mode(False):  # tiles are written to later
        for index, param in enumerate(params):
            if is_dtensor(param) and state.get(index):
                present = moments_of(moments, state[index])
                state[index] = _saved_entry(f"{owner}: state[{index}]", present, param, state[index], windows)
    return {**saved, "state": state}


def _saved_entry(where: str, moments: Moments, param: Any, entry: dict[str, Any], windows: Windows) -> dict[str, Any]:
    saved = dict(entry)
    shape, bits = tuple(param.shape), bits_of(moments, entry)
    for moment in moments:
        values = moment.values(entry)
        inbox = Inbox.around(alone(values), id(saved))
        saved[moment.key(bits)] = wrap(inbox, shape, dense_stride(param), param)
        low = entry.get(moment.low)
        if low is not None:
            saved[moment.low] = wrap(Inbox.around(alone(low), id(saved)), shape, dense_stride(param), param)
        if bits != 32:
            lead, size = tiling_of(param, values.is_contiguous())
            cut = tiles.from_absmax(tuple(values.shape), values.stride(), entry[moment.absmax], lead, size)
            whole = tiles.tiled_shape(shape, lead, size)
            inbox = Inbox.around(cut, id(saved))
            saved[moment.absmax] = wrap(inbox, whole, contiguous_stride(whole), param)
            windows.add(inbox, Window(where, moment, values, low, entry[moment.absmax], cut, lead, size))
    if PARAM_LOW in entry:
        inbox = Inbox.around(alone(entry[PARAM_LOW]).view(CARRIERS[entry[PARAM_LOW].dtype]), id(saved))
        saved[PARAM_LOW] = wrap(inbox, shape, dense_stride(param), param)
    for key in absent_keys(moments, bits):
        empty = nothing(param, local(param).device)  # torch takes all tensors to be on one device
        saved[key] = wrap(Inbox.around(empty, id(saved)), empty.shape, empty.stride(), param)
    return saved


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
    if PARAM_LOW in read:
        read = {**read, PARAM_LOW: _low_of_shard(where, param, read[PARAM_LOW])}
    return {name: value for name, value in read.items() if name not in [m.name for m in moments]} | {
        moment.name: _moment_of_shard(where, moment, param, shard, read[moment.name]) for moment in moments
    }


def _low_of_shard(where: str, param: Any, low: torch.Tensor) -> torch.Tensor:
    if is_dtensor(param):
        low = shard_of(where, PARAM_LOW, low, param)
    else:
        _check_plain(where, PARAM_LOW, low)
    return low.view(next((dtype for dtype, carrier in CARRIERS.items() if carrier == low.dtype), low.dtype))


def _check_plain(where: str, key: str, value: torch.Tensor) -> None:
    """Raise ValueError for a DTensor of a parameter that is none."""
    if is_dtensor(value):
        raise ValueError(
            f"{where}[{key!r}] is a DTensor, but the parameter is not. "
            "Save with StateDictOptions(full_state_dict=True), or shard the model first."
        )


def _moment_of_shard(where: str, moment: Moment, param: Any, shard: torch.Tensor, source: Source | Tiled) -> Source:
    values = source if isinstance(source, torch.Tensor) else source.codes
    key = moment.key(8 if isinstance(source, Tiled) else 32)
    if not is_dtensor(param):
        _check_plain(where, key, values)
        if not isinstance(source, Tiled):
            return source
        return _from_tiles(where, moment, source, source.codes, source.tiles, source.low, shard)
    if isinstance(source, Codes):
        if source.table is None and source.blocksize == BLOCK:
            source = _tiled(source, param)
        else:
            values = source = sources.values(moment, source, source.codes.device)
    cut = shard_of(where, moment.key(8 if isinstance(source, Tiled) else 32), values, param)
    if not isinstance(source, Tiled):
        return cut
    tiles.size_of(where, moment, source.tiles, param.numel())  # checks the whole, so that no rank goes on alone
    cut_tiles = shard_of(where, moment.absmax, source.tiles, param)
    cut_low = None if source.low is None else shard_of(where, moment.low, source.low, param)
    return _from_tiles(where, moment, source, cut, cut_tiles, cut_low, shard)


def _from_tiles(
    where: str,
    moment: Moment,
    source: Tiled,
    codes: torch.Tensor,
    cut: torch.Tensor,
    low: torch.Tensor | None,
    shard: torch.Tensor,
) -> Codes:
    codes, absmax, low = tiles.to_absmax(where, moment, codes, cut, dense_stride(shard), low)
    return Codes(codes, absmax, root=source.root, low=low)


def _tiled(source: Codes, param: Any) -> Tiled:
    """The same moment of a whole parameter, with tiles that can be sharded as it is."""
    codes, absmax = source.codes, source.absmax
    if is_dtensor(absmax):
        absmax = absmax.full_tensor()  # type: ignore[attr-defined]
    lead, size = tiling_of(param, codes.is_contiguous())
    cut = tiles.from_absmax(tuple(codes.shape), codes.stride(), absmax, lead, size)
    return Tiled(codes, cut, source.root, source.low)
