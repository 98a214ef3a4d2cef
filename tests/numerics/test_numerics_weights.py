"""Weights of 24 and 32 bits: what is kept of them, what comes back, and that rounding is right in the mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.harness import bits
from support.weights import kept, place_of

import optim8
from optim8.state.weights import fill_low, join, part

DTYPES16 = (torch.bfloat16, torch.float16)
LOWS = {24: torch.uint8, 32: torch.int16}


def _hard_values(dtype: torch.dtype) -> torch.Tensor:
    """Float32 over the whole range of a dtype, subnormal numbers, ties, and neighbours of ties and of powers of 2."""
    rng = np.random.default_rng(0)
    patterns, ties = rng.integers(0, 2**32, 200_000), rng.integers(0, 2**16, 20_000) << 16 | 0x8000
    powers = np.arange(1, 254) << 23
    near = [each + d for each in (ties, powers) for d in (-1, 0, 1)]
    x = torch.from_numpy(np.concatenate([patterns, *near]).astype(np.uint32).view(np.float32))
    if dtype == torch.float16:
        small = (
            torch.from_numpy(rng.standard_normal((40, 2500)).astype(np.float32)) * 2.0 ** torch.arange(-26, 14)[:, None]
        )
        halves = torch.arange(0, 0x7C00, dtype=torch.int16).view(torch.float16).float()
        x = torch.cat([x, small.flatten(), halves, -halves, (halves[1:] + halves[:-1]) / 2])
    x = x[x.isfinite()]
    return x[x.abs() < (3.3e38 if dtype == torch.bfloat16 else 65500)]


def _parted(x: torch.Tensor, dtype: torch.dtype, master_bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    param, low = torch.empty(x.shape, dtype=dtype), torch.empty(x.shape, dtype=LOWS[master_bits])
    part(x, param, low)
    return param, low


@pytest.mark.parametrize("master_bits", [24, 32])
@pytest.mark.parametrize("dtype", DTYPES16)
def test_what_is_kept_is_what_the_reference_keeps(dtype: torch.dtype, master_bits: int) -> None:
    x = _hard_values(dtype)
    param, low = _parted(x, dtype, master_bits)
    wanted, wanted_low = kept(x.double().numpy(), dtype, master_bits, np.full(x.shape, 0.5))
    assert wanted_low is not None
    assert bits(param) == bits(wanted)
    assert bits(low) == bits(wanted_low)


@pytest.mark.parametrize("dtype", DTYPES16)
def test_32_bits_are_float32(dtype: torch.dtype) -> None:
    x = _hard_values(dtype)
    back = join(*_parted(x, dtype, 32))
    if dtype == torch.bfloat16:
        assert bits(back) == bits(x)
        return
    normal = x.abs() >= 2.0**-14
    assert bits(back[normal]) == bits(x[normal])
    assert (back - x)[~normal].abs().max() <= 2.0**-38
    assert bool(((back[~normal].double() * 2.0**37) % 1 == 0).all())


@pytest.mark.parametrize("dtype", DTYPES16)
def test_24_bits_are_within_half_of_the_eighth_bit(dtype: torch.dtype) -> None:
    x = _hard_values(dtype)
    param, low = _parted(x, dtype, 24)
    place = place_of(x.double().numpy(), dtype)
    back = place_of(join(param, low).double().numpy(), dtype)
    assert np.abs(back - place).max() == 128
    assert (np.abs(back - place_of(param.double().numpy(), dtype)) <= 2**15).all()


@pytest.mark.parametrize("master_bits", [24, 32])
@pytest.mark.parametrize("dtype", DTYPES16)
def test_the_parameter_is_the_nearest_number(dtype: torch.dtype, master_bits: int) -> None:
    x = _hard_values(dtype)
    param, low = _parted(x, dtype, master_bits)
    weight = join(param, low)
    nearest = weight.to(dtype)
    apart = bits_apart(param, nearest)
    assert apart.max() <= 1
    # Ties, of which every other one goes to the even number: there both are as near.
    tied = (weight.double() - param.double()).abs() == (weight.double() - nearest.double()).abs()
    assert bool(tied[apart > 0].all())


def bits_apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.view(torch.int16).int() - b.view(torch.int16).int()).abs()


@pytest.mark.parametrize("master_bits", [24, 32])
@pytest.mark.parametrize("dtype", DTYPES16)
def test_what_is_no_finite_number_stays_so(dtype: torch.dtype, master_bits: int) -> None:
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([nan, -nan, inf, -inf, 3.4e38, -3.4e38, 0.0, -0.0, *[1.0] * 8])
    x[9] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    back = join(*_parted(x, dtype, master_bits))
    assert back.isnan().nonzero().flatten().tolist() == [0, 1, 9]
    assert back[2:4].tolist() == [inf, -inf]
    assert back.signbit()[6:8].tolist() == [False, True]
    if dtype == torch.float16:
        assert back[4:6].tolist() == [inf, -inf]
    elif master_bits == 32:
        assert bits(back[4:6]) == bits(x[4:6])


@pytest.mark.parametrize("dtype", DTYPES16)
def test_low_bits_of_a_parameter_that_became_0_do_not_count(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16)
    for zero in (0.0, -0.0):
        back = join(torch.full(every.shape, zero, dtype=dtype), every)
        assert not back.isnan().any()
        assert (back.abs() <= join(torch.zeros(1, dtype=dtype), torch.tensor([32767], dtype=torch.int16))).all()
        assert not back[: 2**15].any()


@pytest.mark.parametrize("dtype", DTYPES16)
def test_low_bits_change_their_width(dtype: torch.dtype) -> None:
    x = _hard_values(dtype)
    param, low = _parted(x, dtype, 32)
    narrow = torch.empty(low.shape, dtype=torch.uint8)
    fill_low(narrow, low)
    place = place_of(join(param, low).double().numpy(), dtype)
    there = place_of(join(param, narrow).double().numpy(), dtype)
    # At the upper end there is one step less.
    assert np.abs(there - place).max() <= 255
    assert (np.abs(there - place) <= 128)[low.numpy() < 32512].all()
    wide = torch.empty_like(low)
    fill_low(wide, narrow)
    assert bits(join(param, wide)) == bits(join(param, narrow))
    fill_low(wide, None)
    assert not wide.any()


@pytest.mark.parametrize("dtype", DTYPES16)
@pytest.mark.parametrize(
    ("master_bits", "param_rounding", "spread"), [(16, "dithered", 0.02), (24, "nearest", 2e-4), (32, "nearest", 1e-6)]
)
def test_ten_thousand_steps_of_a_hundredth_of_a_unit_go_a_hundred_units(
    dtype: torch.dtype, master_bits: int, param_rounding: str, spread: float
) -> None:
    ulp = float(torch.finfo(dtype).eps)
    p = torch.nn.Parameter(torch.ones(4096, dtype=dtype))
    p.grad = torch.full_like(p, -ulp / 100)
    step = -float(p.grad[0].detach())
    optimizer = optim8.SGD8bit([p], lr=1.0, master_bits=master_bits, param_rounding=param_rounding)
    for _ in range(10_000):
        optimizer.step()
    weight = p.detach().double() if master_bits == 16 else join(p, optimizer.state[p]["param_low"]).double()
    moved = (weight - 1) / (10_000 * step)
    assert abs(float(moved.mean()) - 1) < 1e-3
    assert float(moved.std()) < spread


def test_rounding_to_nearest_stands_still() -> None:
    """What all this is for."""
    p = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    p.grad = torch.full_like(p, -(2.0**-7) / 100)
    optimizer = optim8.SGD8bit([p], lr=1.0)
    for _ in range(1000):
        optimizer.step()
    assert bool((p == 1).all())
