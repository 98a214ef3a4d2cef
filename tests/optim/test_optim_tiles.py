"""Tiles, the form of the scales in sharded checkpoints: how they lie, and that they keep what they stand for."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from support.convert_harness import converted_scales
from support.harness import bits, hostile
from support.rounding import Rounded

from optim8 import codec, rules
from optim8.rules import Moment
from optim8.state import tiles

BLOCK = reference.BLOCK
EXP_AVG, EXP_AVG_SQ = rules.every()["adamw"].moments
SIGNED = pytest.mark.parametrize("moment", [EXP_AVG, EXP_AVG_SQ], ids=["signed", "unsigned"])


@pytest.mark.parametrize(
    "shape, ways, contiguous, lead, size",
    [
        ((), {}, True, 0, 1),
        ((5001,), {0: 2}, True, 0, 1),
        ((4096,), {}, True, 0, 1),  # as if it were sharded, since another run may shard it
        ((64, 256), {0: 3}, True, 1, 256),
        ((64, 768), {}, True, 1, 256),
        ((64, 1000), {0: 2}, True, 1, 8),
        ((64, 47), {0: 2}, True, 1, 1),
        ((64, 1000), {0: 2}, False, 1, 1),
        ((64, 1024), {1: 4}, True, 1, 256),
        ((64, 1000), {1: 2}, True, 1, 4),
        ((64, 1000), {1: 3}, True, 1, 1),  # uneven columns
        ((64, 1024), {0: 2, 1: 2}, True, 1, 256),
        ((64, 8, 3, 3), {0: 2}, True, 1, 8),
        ((64, 256, 3, 3), {0: 2}, True, 1, 256),
        ((8, 64, 128), {0: 2}, True, 1, 256),
        ((8, 64, 256), {0: 2}, True, 2, 256),
        ((8, 64, 128), {1: 2}, True, 2, 128),
        ((0, 256), {0: 2}, True, 1, 256),
    ],
)
def test_how_tiles_lie(shape: tuple[int, ...], ways: dict[int, int], contiguous: bool, lead: int, size: int) -> None:
    assert tiles.tiling(shape, ways, contiguous) == (lead, size)


def quantized(moment: Moment, shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    n = int(np.prod(shape))
    values = hostile(n, torch.float32, seed=n, small=-4, large=0)
    dense = torch.empty_strided(shape, stride)
    codec.flat(dense).copy_(values if moment.signed else values.abs())
    codes, absmax = torch.empty_strided(shape, stride, dtype=torch.uint8), torch.empty(-(-n // BLOCK))
    codec.quantize(dense, codes, absmax, signed=moment.signed)
    return codes, absmax


@pytest.mark.parametrize(
    "shape, order, lead, size",
    [
        ((0,), (0,), 0, 1),
        ((1,), (0,), 0, 1),
        ((255,), (0,), 0, 1),
        ((257,), (0,), 0, 1),
        ((3, 256), (0, 1), 1, 256),
        ((10, 128), (0, 1), 1, 128),
        ((7, 1000), (0, 1), 1, 8),
        ((5, 3, 4), (0, 1, 2), 1, 4),
        ((20, 30), (1, 0), 1, 1),
        ((2, 6, 5, 7), (0, 2, 3, 1), 3, 1),
    ],
)
@SIGNED
def test_there_and_back(moment: Moment, shape: tuple[int, ...], order: tuple[int, ...], lead: int, size: int) -> None:
    """Into the same strides nothing changes, whatever they are."""
    like = torch.empty([shape[i] for i in order]).permute([order.index(i) for i in range(len(shape))])
    codes, absmax = quantized(moment, shape, like.stride())
    cut = tiles.from_absmax(shape, codes.stride(), absmax, lead, size)
    assert cut.shape == tiles.tiled_shape(shape, lead, size)
    new_codes, new_absmax, none = tiles.to_absmax("here", moment, codes, cut, codes.stride())
    assert [bits(new_codes), bits(new_absmax), none] == [bits(codes), bits(absmax), None]
    assert new_codes.stride() == codes.stride()
    low = torch.randint_like(codes, 256)
    low[codes == moment.zero] = moment.middle
    new_codes, new_absmax, new_low = tiles.to_absmax("here", moment, codes, cut, codes.stride(), low)
    assert new_low is not None
    assert [bits(new_codes), bits(new_absmax), bits(new_low)] == [bits(codes), bits(absmax), bits(low)]
    assert new_low.stride() == codes.stride()


@pytest.mark.parametrize("count, first, second", [(600, 100, 612), (100, 30, 300), (1024, 512, 1024), (257, 1, 258)])
@SIGNED
def test_a_block_of_several_is_quantized_once(moment: Moment, count: int, first: int, second: int) -> None:
    """A shard of `count` values that begins at `first` of one tensor and has the rest from another one's beginning."""
    a, b = (quantized(moment, (n,), (1,)) for n in (second, count))
    parts = [(codes, tiles.from_absmax(codes.shape, (1,), absmax, 0, 1)) for codes, absmax in (a, b)]
    head = min(second - first, count)
    codes = torch.cat([parts[0][0][first : first + head], parts[1][0][: count - head]])
    cut = torch.cat([parts[0][1][first : first + head], parts[1][1][: count - head]])
    new_codes, absmax, _ = tiles.to_absmax("here", moment, codes, cut, (1,))
    values = reference.dynamic_map(moment.signed)[codes.numpy()] * cut[:, 0].numpy()
    for block in range(-(-count // BLOCK)):
        at = slice(block * BLOCK, (block + 1) * BLOCK)
        scales = cut[at, 0]
        if (scales == scales[0]).all():
            assert bits(new_codes[at].clone()) == bits(codes[at].clone())
            assert absmax[block] == scales[0]
            continue
        exact = values[at].astype(np.float64)
        top = converted_scales(exact, moment.signed, absmax[block : block + 1].double().numpy())
        assert absmax[block] == top[0]
        assert not reference.wrong_codes(new_codes[at].numpy(), Rounded.exact(exact), moment.signed, top).size


@SIGNED
def test_low_bytes_of_a_block_of_several_are_made_anew(moment: Moment) -> None:
    codes = torch.randint(2, 254, (256,), dtype=torch.uint8)
    low = torch.randint(256, (256,), dtype=torch.uint8)
    scales = torch.cat([torch.full((100,), 2.0), torch.full((156,), 0.5)])
    cut = torch.stack([scales, torch.full_like(scales, -1)], dim=-1)
    new_codes, _, new_low = tiles.to_absmax("here", moment, codes, cut, (1,), low)
    assert new_low is not None
    exact = reference.decode16(codes.numpy(), low.numpy(), np.ones(1, np.float32), moment.signed)
    exact = exact * Rounded.exact(scales.double().numpy())
    half = np.full(256, 0.5)
    assert not reference.wrong_dithered_codes(new_codes.numpy(), exact, moment.signed, half, new_low.numpy()).size


@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 4), (4, 1), (4, 4), (16, 2)])
def test_scales_copied_into_the_place_of_tiles_are_noticed(rows: int, columns: int) -> None:
    """Where a vector of scales is written into tiles with broadcasting, as torch's loading may, the marks are gone."""
    codes = torch.zeros(rows, columns * 8, dtype=torch.uint8)
    for scales in (torch.tensor([8.0]), torch.tensor([8.0, 8.0])):
        cut = torch.empty(rows, columns, 2).copy_(scales)
        with pytest.raises(ValueError, match="must be the tiles of"):
            tiles.to_absmax("here", EXP_AVG, codes, cut, codes.stride())
