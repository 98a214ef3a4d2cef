"""Dithered rounding: right in the mean, the largest and zero kept, mirrored problems mirrored, shards as the whole."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import reference
import torch
from cases import Case
from support.harness import (
    ALL,
    bits,
    codes_of,
    hostile,
    load_state,
    parameter,
    random_state,
    shards_from,
    state_bits,
    values,
)
from support.rounding import Rounded

import optim8
from optim8 import _native, codec

STATES = pytest.mark.parametrize(("signed", "place"), [(True, 0), (True, 1), (False, 0), (False, 1)])


def stored(
    x: npt.NDArray[np.float32], signed: bool, place: int, step: int, blocks: torch.Tensor | None = None
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Codes and absmax of rows of 256 values."""
    blocks = torch.arange(len(x)) if blocks is None else blocks
    flat = torch.from_numpy(np.ascontiguousarray(x).ravel())
    codes, absmax = codec.quantize_dithered(flat, blocks, signed=signed, step=step, place=place)
    return codes.numpy().reshape(x.shape), absmax.numpy()


def decoded(codes: npt.NDArray[np.uint8], absmax: npt.NDArray[np.float32], signed: bool) -> reference.Array:
    table = reference.dynamic_map(signed).astype(np.float64)
    product: reference.Array = table[codes] * absmax.astype(np.float64)[:, None]
    return product


@STATES
def test_the_mean_of_what_is_stored_is_the_value(signed: bool, place: int) -> None:
    """Over n steps the mean of floor(p + u) is p up to the discrepancy of u, and to the units of fixed point of p."""
    top, table = reference.largest_value(signed), reference.dynamic_map(signed).astype(np.float64)
    positive = table[table > 0]
    ends = np.concatenate([positive[:-1], (positive[1:] + positive[:-1]) / 2, positive[1:] * (1 - 1e-6)])
    spread = np.exp(np.linspace(np.log(1e-9 if signed else positive[0] / top * 1.001), 0, 4000))
    y = np.concatenate([ends[(ends <= top) & (ends >= (0 if signed else positive[0]))] / top, spread])
    y = np.resize(y, (-(-y.size // 255), 255))
    x = np.concatenate([y, np.ones((len(y), 1))], 1).astype(np.float32)
    if signed:
        x[:, ::3] *= -1
    steps = 3000
    total = np.zeros(x.shape)
    for step in range(1, steps + 1):
        codes, absmax = stored(x, signed, place, step)
        total += decoded(codes, absmax, signed)
    u = np.stack([reference.dither(step, np.arange(len(x)), place) for step in range(1, steps + 1)])
    u.sort(axis=0)
    above, below = np.arange(1, steps + 1)[:, None, None] / steps - u, u - np.arange(steps)[:, None, None] / steps
    discrepancy = np.maximum(above, below).max(axis=0)
    assert discrepancy.max() < 0.02  # of random numbers it would be some 0.03
    exact = np.abs(x.astype(np.float64)) / absmax[:, None].astype(np.float64)
    upper = np.searchsorted(positive, exact).clip(0, positive.size - 1)
    cell = positive[upper] - np.where(upper > 0, positive[upper - 1], 0)
    mean = np.abs(total) / steps / absmax[:, None]
    # Positions are rounded to units of 2^-16, by two lines at most; quotients have three roundings, and are made larger
    # so that the largest's position is whole for all of them: by two units at the top.
    off = np.abs(mean - exact) / cell
    allowed = discrepancy + 4 * 2.0**-16 + 3 * 2.0**-24 * exact / cell
    assert (off <= allowed).all(), (off - allowed).max()


@STATES
def test_in_16_bits_the_mean_of_what_is_stored_is_the_value(signed: bool, place: int) -> None:
    """As in 8 bits, by numbers of 256 to a cell; u has eight bits there, so that a number is a 256th off at most."""
    least = 1e-9 if signed else 1.1e-7
    y = np.resize(np.exp(np.linspace(np.log(least), 0, 4000)), (16, 255))
    x = np.concatenate([y, np.ones((16, 1))], 1).astype(np.float32)
    if signed:
        x[:, ::3] *= -1
    flat, blocks, steps = torch.from_numpy(x.ravel()), torch.arange(16, dtype=torch.int32), 1000
    codes, low = torch.empty(2, x.size, dtype=torch.uint8)
    absmax, total = torch.empty(16), np.zeros(x.size)
    for step in range(1, steps + 1):
        _native.cpu().keep_state(flat, codes, low, absmax, signed, blocks, float(step), place, True)
        total += reference.number16(codes.numpy(), low.numpy(), signed)
    u = np.stack([reference.dither(step, np.arange(16), place).ravel() for step in range(1, steps + 1)])
    u.sort(axis=0)
    above, below = np.arange(1, steps + 1)[:, None] / steps - u, u - np.arange(steps)[:, None] / steps
    discrepancy = np.maximum(above, below).max(axis=0)
    assert discrepancy.max() < 0.03
    exact = np.abs(x.ravel().astype(np.float64)) / reference.per_element(absmax.double().numpy(), x.size)
    expected = 256 * np.sign(x.ravel()) * reference.position16(exact, signed)
    # Positions as above; 256 of them are as far off as one unit of the number.
    assert (np.abs(total / steps - expected) <= discrepancy + 2.0**-8 + 256 * 4 * 2.0**-16).all()
    again = codec.dequantize16(codes, low, absmax, signed=signed).numpy().reshape(x.shape)
    assert (np.abs(again[:, -1] / x[:, -1] - 1) <= 2.0**-21).all(), "the largest is kept"


@STATES
def test_the_largest_magnitude_is_kept_to_an_ulp_whatever_its_sign(signed: bool, place: int) -> None:
    rng = np.random.default_rng(1)
    mantissas = rng.choice(1 << 23, 1 << 14, replace=False).astype(np.int32)
    largest = (mantissas | 0x3F800000).view(np.float32)
    for exponent in (-120, -40, 0, 40, 126):
        top = largest * np.float32(2.0**exponent)
        for sign in (1, -1) if signed else (1,):
            x = np.zeros((top.size, 256), np.float32)
            x[:, 77] = sign * top
            codes, absmax = stored(x, signed, place, step=int(rng.integers(1, 10**6)))
            back = decoded(codes, absmax, signed)[:, 77] * sign
            assert (np.abs(back / top.astype(np.float64) - 1) <= 2.0**-23).all()
            assert (codes[:, 77] == (254 if sign > 0 else 0)).all()
            others = np.delete(codes, 77, axis=1)
            assert (others == reference.zero_code(signed)).all(), "zero stays zero"


@pytest.mark.parametrize("top", [2.0**-149, 2.0**-140, 2.0**-126, 3.4028234663852886e38])
@STATES
def test_blocks_at_the_ends_of_the_range_stay_finite(signed: bool, place: int, top: float) -> None:
    x = np.full((4, 256), top, np.float32) * np.linspace(0, 1, 256, dtype=np.float32)
    codes, absmax = stored(x, signed, place, step=3)
    assert np.isfinite(absmax).all()
    assert (codes[:, -1] == 254).all()
    back = (reference.dynamic_map(signed)[codes] * absmax[:, None]).astype(np.float32)
    assert np.isfinite(back).all()
    if not signed:
        assert ((codes > 0) == (x > 0)).all(), "a positive value never becomes 0"


@pytest.mark.parametrize("optim_bits", [8, 16])
@ALL
def test_a_mirrored_problem_takes_the_mirrored_path(case: Case, optim_bits: int, device: torch.device) -> None:
    """Gradients and parameters negated: every bit of the path is the same but the signs."""
    paths = []
    for sign in (1, -1):
        p = parameter(hostile(3000, torch.float32, seed=1, small=-3, large=0).to(device) * sign)
        optimizer = case.make([p], optim_bits=optim_bits)
        for step in range(20):
            p.grad = hostile(3000, torch.float32, seed=step).to(device) * sign
            optimizer.step()
        paths.append((p, optimizer.state[p]))
    (p, state), (q, mirrored) = paths
    assert bits(p.detach() + 0.0) == bits(-q.detach() + 0.0)
    for name, signed in case.states.items():
        assert bits(state[case.absmax(name)]) == bits(mirrored[case.absmax(name)])
        codes, other = codes_of(state[case.codes(name)]), codes_of(mirrored[case.codes(name)])
        if case.low(name) in state:
            low, other_low = codes_of(state[case.low(name)]), codes_of(mirrored[case.low(name)])
            number, mirror = (reference.number16(*each, signed) for each in ((codes, low), (other, other_low)))
            assert np.array_equal(number, -mirror if signed else mirror)
        else:
            assert np.array_equal(codes, 254 - other if signed else other)


@pytest.mark.parametrize("optim_bits", [8, 16])
@ALL
def test_parts_cut_at_blocks_take_the_path_of_the_whole(case: Case, optim_bits: int, device: torch.device) -> None:
    """As the local shards of a DTensor do, which tell where they begin and whose sums of squares are added up.

    Those of the whole are added up in another order, but float64 leaves that far below an ulp of a float32 scalar.
    """
    size, cut = 256 * 9 + 100, 256 * 4
    data = hostile(size, torch.float32, seed=1, small=-3, large=0).to(device)
    grads = [hostile(size, torch.float32, seed=10 + step).to(device) for step in range(5)]

    def add_up(sums: torch.Tensor, rows: Any) -> None:
        assert len(sums) == 2, "not both parts at once"
        sums.copy_(sums.sum(0, keepdim=True).expand_as(sums).clone())

    def stepped(second: int) -> tuple[Any, list[torch.nn.Parameter]]:
        """The parts after the steps, of which the second tells that it begins at this element."""
        parts = [parameter(part.clone()) for part in (data[:cut], data[cut:])]
        optimizer = case.make(parts, optim_bits=optim_bits)
        shards = shards_from(dict(zip(parts, (0, second), strict=True)))
        reduce = mock.patch("optim8.step.parts.LocalStep.reduce_over_ranks", return_value=add_up)
        with shards, reduce:
            for grad in grads:
                for p, part in zip(parts, (grad[:cut], grad[cut:]), strict=True):
                    p.grad = part.clone()
                optimizer.step()
        return optimizer, parts

    whole = parameter(data.clone())
    optimizer = case.make([whole], optim_bits=optim_bits)
    for grad in grads:
        whole.grad = grad.clone()
        optimizer.step()
    of_parts, (one, two) = stepped(cut)
    assert bits(whole) == bits(one) + bits(two)
    joined = {key: state_bits(of_parts, one)[key] + value for key, value in state_bits(of_parts, two).items()}
    alone = state_bits(optimizer, whole)
    scalars = {"step", *case.running}
    assert all(alone[key] == joined[key] for key in alone.keys() - scalars)
    assert alone.keys() == joined.keys()
    # Without telling, the second part would begin with the first block.
    _, (_, again) = stepped(0)
    assert bits(again) != bits(two)


@pytest.mark.parametrize("rounding", ["dithered", "nearest"])
@ALL
def test_each_rounding_goes_on_from_what_the_other_left(case: Case, rounding: str, device: torch.device) -> None:
    p = parameter(hostile(3000, torch.float32, seed=1, small=-3, large=0).to(device))
    other = {"dithered": "nearest", "nearest": "dithered"}[rounding]
    first = case.make([p], rounding=other)
    for step in range(3):
        p.grad = hostile(3000, torch.float32, seed=step).to(device)
        first.step()
    second = case.make([p], rounding=rounding)
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["rounding"] == other, "a saved option goes before the present one, as in torch"
    second.param_groups[0]["rounding"] = rounding
    assert state_bits(first, p) == state_bits(second, p)
    second.step()
    assert state_bits(first, p) != state_bits(second, p)


@ALL
def test_groups_and_overrides_choose_the_rounding(case: Case, device: torch.device) -> None:
    def params() -> list[torch.nn.Parameter]:
        return [parameter(hostile(700, torch.float32, seed=i, small=-3, large=0).to(device)) for i in range(3)]

    def run(params: list[torch.nn.Parameter], optimizer: Any) -> list[dict[str, bytes]]:
        for step in range(3):
            for i, p in enumerate(params):
                p.grad = hostile(700, torch.float32, seed=10 * step + i).to(device)
            optimizer.step()
        return [state_bits(optimizer, p) for p in params]

    dithered, nearest = ((own := params()) and run(own, case.make(own, rounding=r)) for r in ("dithered", "nearest"))
    assert all(one != other for one, other in zip(dithered, nearest, strict=True))
    own = params()
    groups = [{"params": own[:1]}, {"params": own[1:], "rounding": "nearest"}]
    with optim8.override(own[2], rounding="dithered"):
        assert run(own, case.make(groups)) == [dithered[0], nearest[1], dithered[2]]


@ALL
def test_old_state_dicts_without_the_option_keep_the_present_one(case: Case, device: torch.device) -> None:
    p = parameter(torch.ones(300, device=device), torch.ones(300, device=device))
    optimizer = case.make([p], rounding="nearest")
    optimizer.step()
    saved: Any = optimizer.state_dict()
    del saved["param_groups"][0]["rounding"]
    for rounding in ("dithered", "nearest"):
        fresh = case.make([p], rounding=rounding)
        fresh.load_state_dict(saved)
        assert fresh.param_groups[0]["rounding"] == rounding


@ALL
def test_small_changes_are_followed(case: Case, device: torch.device) -> None:
    """A state that each step changes by a small part of a code ends where the exact one does; to nearest it stays."""
    # The parameter stays 0, so that no norm of it scales the gradients.
    hyper = {**case.without_decay(**case.slow), "lr": 0.0, "maximize": False}
    states = case.states_of(hyper)
    name, signed = next(iter(states.items()))
    root, steps = name in case.roots, 700
    start, top = float(reference.dynamic_map(signed)[200 if signed else 150]), reference.largest_value(signed)
    # Towards half of the value, or in a sum by a thousandth of it. The largest of each block stays what it is, so that
    # no new scale moves the others.
    element = {each: Rounded.exact(0.0) for each in states} | {name: Rounded.exact(start)}
    element |= {each: Rounded.exact(value) for each, value in case.running.items()}
    _, at_rest = case.rule(Rounded.exact(0.0), Rounded.exact(0.0), element, t=2, **hyper)
    is_sum = at_rest[name].value == start
    gradient = start * (0.001**0.5 if root else 0.5)
    ends = {}
    for rounding in ("dithered", "nearest"):
        p = parameter(torch.zeros(2560, device=device))
        optimizer = case.make([p], hyper, rounding=rounding)
        state = random_state(case, 2560, 8, 1, 1, hyper)
        for each, of_sign in states.items():
            state[case.codes(each)] = torch.full((2560,), 200 if of_sign else 150, dtype=torch.uint8)
            state[case.codes(each)][::256] = 254
            state[case.absmax(each)] = torch.ones(10)
        load_state(optimizer, {0: state})
        grad = torch.full((2560,), gradient, device=device)
        grad[::256] = 0.0 if is_sum else top
        for _ in range(steps):
            p.grad = grad
            optimizer.step()
        after = codec.dequantize(
            optimizer.state[p][case.codes(name)],
            optimizer.state[p][case.absmax(name)],
            signed=signed,
        )
        ends[rounding] = float(np.delete(values(after), np.s_[::256]).mean() / start)
    kept, new = (start**2, gradient**2) if root else (start, gradient)
    exact = (kept + steps * new if is_sum else kept * 0.999**steps + new * (1 - 0.999**steps)) / kept
    exact = exact**0.5 if root else exact
    assert abs(exact - 1) > 0.2
    assert abs(ends["dithered"] / exact - 1) < 0.02
    assert abs(ends["nearest"] - 1) < 0.01
