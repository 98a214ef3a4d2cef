"""The scales of 8-bit state in a form that can be cut wherever a parameter can be sharded.

A shard has blocks of its own: 256 consecutive values of the shard. Where one begins depends on how many ranks there
are, so `absmax` cannot be cut and joined as the parameter is. A checkpoint of sharded state holds tiles instead. A
tile is a run of T consecutive values, T a power of two and at most 256, that no sharding cuts and that lies in one
block of any shard. Its entry is the pair (absmax of its block, -T). So saving loses nothing; and at loading, a block
all of whose tiles agree is taken as it is, and only a block put together from several old ones is quantized anew.

-T says that these are tiles: no scale is negative, so scales that were copied into the place of tiles are noticed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NoReturn

import torch

from optim8 import codec
from optim8.codec import BLOCK
from optim8.rules import Moment
from optim8.state.moments import check_low, check_scales


def tiling(shape: Sequence[int], ways: Mapping[int, int], contiguous: bool) -> tuple[int, int]:
    """How the tiles of a parameter lie.

    Args:
        shape: of the whole parameter.
        ways: for each dimension that is sharded, over how many ranks.
        contiguous: whether the parameter and its shards are.

    Returns:
        (lead, T): the dimensions before `lead` are kept, those from there on are one row, cut into tiles of T values.
        With only the first dimension sharded they do not depend on `ways`, so any number of ranks can load.
    """
    last = len(shape) - 1
    if last < 1 or not contiguous:
        return max(last, 0), 1
    innermost = max(ways, default=0)
    if innermost == last:
        local, rest = divmod(shape[last], ways[last])
        return last, 1 if rest else math.gcd(local, BLOCK)
    # The fewest dimensions whose product has the largest power of two.
    candidates = range(last, innermost, -1)
    sizes = {lead: math.gcd(math.prod(shape[lead:]), BLOCK) for lead in candidates}
    return max(candidates, key=lambda lead: (sizes[lead], lead)), max(sizes.values())


def tiled_shape(shape: Sequence[int], lead: int, size: int) -> tuple[int, ...]:
    """The shape of the tiles of a tensor, or of the shard of one."""
    return (*shape[:lead], math.prod(shape[lead:]) // size, 2)


def from_absmax(
    shape: Sequence[int], stride: Sequence[int], absmax: torch.Tensor, lead: int, size: int
) -> torch.Tensor:
    """The tiles of a dense tensor of this shape and these strides; exact. Only tiles of 1 serve all strides."""
    count = math.prod(shape)
    if size == 1:
        each = absmax.repeat_interleave(BLOCK)[:count].as_strided(tuple(shape), tuple(stride)).reshape(-1)
    else:
        each = absmax.repeat_interleave(BLOCK // size)[: count // size]
    return torch.stack((each, torch.full_like(each, -size)), dim=-1).view(tiled_shape(shape, lead, size))


def size_of(where: str, moment: Moment, tiles: torch.Tensor, count: int) -> int:
    """The number of values of a tile, where these can be the tiles of `count` values.

    Raises:
        ValueError: they cannot.
    """
    number = tiles.numel() // 2
    size = count // max(number, 1)
    formed = tiles.dtype == torch.float32 and tiles.dim() > 1 and tiles.shape[-1] == 2
    if not formed or number * size != count or (count and BLOCK % size):
        _refuse(where, moment, count)
    return size


def _refuse(where: str, moment: Moment, count: int) -> NoReturn:
    raise ValueError(
        f"{where}[{moment.absmax!r}] must be the tiles of {count} values, float32 pairs of an absmax and the negative "
        "number of its values, got something else. Scales of unsharded state do not go through broadcast_from_rank0: "
        "call optimizer.load_state_dict with the whole state dict on every rank."
    )


def to_absmax(
    where: str,
    moment: Moment,
    codes: torch.Tensor,
    tiles: torch.Tensor,
    stride: Sequence[int],
    low: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes, absmax and low bytes of a dense tensor, from codes and tiles.

    Args:
        where: names the state, for messages.
        moment: which state it is.
        codes: uint8, any strides.
        tiles: as from_absmax makes them, for the same values.
        stride: of the result, dense.
        low: of state in 16 bits: uint8, like codes.

    Returns:
        Codes with these strides, float32 [ceil(n / 256)], and low bytes where they were given. Blocks with one scale
        are as they were; those with several are quantized anew.

    Raises:
        ValueError: these are not the tiles of so many values, or not finite.
    """
    count = codes.numel()
    size = size_of(where, moment, tiles, count)
    scales, marks = tiles.to(codes.device).reshape(-1, 2).unbind(1)
    if bool((marks != -size).any()):
        _refuse(where, moment, count)
    if not bool(((scales >= 0) & scales.isfinite()).all()):
        raise ValueError(f"{where}[{moment.absmax!r}] must be finite and not negative. The checkpoint is damaged.")
    out = torch.empty_strided(tuple(codes.shape), tuple(stride), dtype=torch.uint8, device=codes.device).copy_(codes)
    low = None if low is None else torch.empty_like(out).copy_(low)
    if low is not None:
        check_low(where, moment, out, low)
    if count == 0:
        return out, scales.new_empty(0), low
    if not out.is_contiguous():  # blocks run in memory order
        each = torch.empty_strided(tuple(codes.shape), tuple(stride), dtype=torch.float32, device=codes.device)
        scales, size = codec.flat(each.copy_(scales.repeat_interleave(size).view(codes.shape))), 1
    missing = -scales.numel() % (BLOCK // size)
    of_block = torch.cat((scales, scales[-1:].expand(missing))).view(-1, BLOCK // size)
    absmax = of_block[:, 0].clone()
    several = (of_block != absmax[:, None]).any(dim=1)
    check_scales(where, moment, codec.flat(out), absmax.masked_fill(several, 1))
    joined = several.nonzero()[:, 0]
    if joined.numel():
        flat_low = None if low is None else codec.flat(low)
        of_values = of_block[joined].repeat_interleave(size, dim=1)
        _requantize(moment, codec.flat(out), flat_low, absmax, joined, of_values)
    return out, absmax, low


def _requantize(
    moment: Moment,
    codes: torch.Tensor,
    low: torch.Tensor | None,
    absmax: torch.Tensor,
    joined: torch.Tensor,
    scales: torch.Tensor,
) -> None:
    """Quantize the blocks `joined` anew; `scales` has one for each of their values."""
    index = joined[:, None] * BLOCK + torch.arange(BLOCK, dtype=torch.int64, device=codes.device)
    inside = index < codes.numel()  # the last block may be shorter
    there = index.clamp(max=codes.numel() - 1)
    new_codes, new_absmax = torch.empty_like(index, dtype=torch.uint8), torch.empty_like(absmax[joined])
    if low is None:
        table = codec.code_table(moment.signed, codes.device)
        values = table[codes[there].int()] * scales * inside
        codec.quantize(values, new_codes, new_absmax, signed=moment.signed)
    else:
        ones = torch.ones_like(new_absmax)
        values = codec.dequantize16(codes[there], low[there], ones, signed=moment.signed) * scales * inside
        new_low = torch.empty_like(new_codes)
        codec.quantize16(values, new_codes, new_low, new_absmax, signed=moment.signed)
        low[index[inside]] = new_low[inside]
    codes[index[inside]] = new_codes[inside]
    absmax[joined] = new_absmax
