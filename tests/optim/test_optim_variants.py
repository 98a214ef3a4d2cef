"""Rules of which an option decides what state they keep: SGD without momentum, AMSGrad."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import CASES, Case
from support.harness import (
    DTYPES,
    assert_step,
    assert_stepped,
    before_step,
    bits,
    hostile,
    load_state,
    parameter,
    random_state,
    through_a_file,
)

import optim8
from optim8.paging import Pager

SIZES = (5000, 300, 1, 0)


def amsgrad(name: str) -> Case:
    """The case of Adam or AdamW with the third state."""
    case, third = CASES[name], "max_exp_avg_sq"
    hypers = [{**hyper, "amsgrad": True} for hyper in case.hypers]
    return replace(case, states={**case.states, third: False}, roots=case.roots | {third}, hypers=hypers)


@pytest.mark.parametrize(
    ("bits_of_state", "rounding"), [(8, "dithered"), (8, "nearest"), (16, "dithered"), (32, "nearest")]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("row", range(3))
@pytest.mark.parametrize("name", ["Adam8bit", "AdamW8bit"])
def test_amsgrad_against_float64(name: str, row: int, dtype: str, bits_of_state: int, rounding: str) -> None:
    case = amsgrad(name)
    hyper = case.hypers[row]
    for t in (0, 1, 999):
        params = [parameter(hostile(n, DTYPES[dtype], seed=n + t, small=-6, large=1)) for n in SIZES]
        optimizer = case.make(params, hyper, optim_bits=bits_of_state, rounding=rounding)
        if t:
            states = {i: random_state(case, n, bits_of_state, t, n + t, hyper) for i, n in enumerate(SIZES)}
            load_state(optimizer, states)
        for i, p in enumerate(params):
            p.grad = hostile(p.numel(), DTYPES[dtype], seed=100 * t + i)
        before = [before_step(optimizer, case, p) for p in params]
        optimizer.step()
        for p, each in zip(params, before, strict=True):
            assert_step(optimizer, case, p, each, hyper, t + 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("more", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "maximize": True}], ids=str)
def test_sgd_without_momentum_against_float64(dtype: str, more: dict[str, Any]) -> None:
    case = replace(CASES["SGD8bit"], states={})
    hyper = {"lr": 0.05, "momentum": 0.0, "dampening": 0.3, "weight_decay": 0.0, "nesterov": False, **more}
    params = [parameter(hostile(n, DTYPES[dtype], seed=n, small=-6, large=1)) for n in SIZES]
    optimizer = case.make(params, hyper)
    for t in (1, 2):
        for i, p in enumerate(params):
            p.grad = hostile(p.numel(), DTYPES[dtype], seed=100 * t + i)
        before = [before_step(optimizer, case, p) for p in params]
        optimizer.step()
        for p, each in zip(params, before, strict=True):
            assert_stepped(case, p, {}, each, hyper, t, dithered=False)


def make(cls: Any, **options: Any) -> tuple[list[torch.nn.Parameter], Any]:
    params = [parameter(hostile(n, torch.float32, seed=n, small=-2, large=0)) for n in SIZES]
    return params, cls(params, **options)


def steps(params: list[torch.nn.Parameter], optimizer: Any, first: int, last: int) -> None:
    for t in range(first, last):
        for i, p in enumerate(params):
            p.grad = hostile(p.numel(), torch.float32, seed=100 * t + i, small=-3, large=0)
        optimizer.step()


def same(ours: list[torch.nn.Parameter], theirs: list[torch.nn.Parameter], ulps: int) -> None:
    """Each step and product rounds once, here and in torch, so paths differ by some ulps of the largest value."""
    for p, q in zip(ours, theirs, strict=True):
        if p.numel():
            assert float((p - q).abs().max()) <= ulps * 2.0**-24 * float(q.abs().max().clamp(min=1))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_sgd_without_momentum_keeps_nothing(weight_decay: float) -> None:
    params, optimizer = make(optim8.SGD8bit, lr=0.1, weight_decay=weight_decay)
    twins, theirs = make(torch.optim.SGD, lr=0.1, weight_decay=weight_decay, foreach=False)
    steps(params, optimizer, 0, 10)
    steps(twins, theirs, 0, 10)
    same(params, twins, 40)
    assert optimizer.state_dict()["state"] == {}
    assert not any(optimizer.state.values())
    assert sum(place.bytes for place in optimizer.placement()) == 0


def test_a_momentum_that_is_set_later_begins_with_the_gradient_of_that_step() -> None:
    params, optimizer = make(optim8.SGD8bit, lr=0.1, dampening=0.5, optim_bits=32)
    twins, theirs = make(torch.optim.SGD, lr=0.1, dampening=0.5, foreach=False)
    for momentum, first, last in ((0.0, 0, 3), (0.9, 3, 6)):
        optimizer.param_groups[0]["momentum"] = theirs.param_groups[0]["momentum"] = momentum
        steps(params, optimizer, first, last)
        steps(twins, theirs, first, last)
    same(params, twins, 40)
    buffers = [optimizer.state[p]["momentum_buffer"] for p in params]
    same(buffers, [theirs.state[p]["momentum_buffer"] for p in twins], 40)


@pytest.mark.parametrize("optim_bits", [8, 16, 32])
def test_a_momentum_that_is_set_to_0_stays_as_it_is(optim_bits: int) -> None:
    params, optimizer = make(optim8.SGD8bit, lr=0.1, momentum=0.9, optim_bits=optim_bits, min_8bit_size=0)
    steps(params, optimizer, 0, 3)
    before = [{key: bits(value) for key, value in optimizer.state[p].items()} for p in params]
    optimizer.param_groups[0]["momentum"] = 0.0
    steps(params, optimizer, 3, 5)
    assert [{key: bits(value) for key, value in optimizer.state[p].items()} for p in params] == before
    loaded = copy.deepcopy(optimizer.state_dict())
    twins, other = make(optim8.SGD8bit, lr=0.1, momentum=0.9)
    other.load_state_dict(loaded)
    assert [{key: bits(value) for key, value in other.state[p].items()} for p in twins] == before


def test_a_dict_of_torch_without_momentum_loads() -> None:
    twins, theirs = make(torch.optim.SGD, lr=0.1)
    steps(twins, theirs, 0, 1)
    params, optimizer = make(optim8.SGD8bit, lr=0.2)
    optimizer.load_state_dict(theirs.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert not any(optimizer.state.values())
    steps(params, optimizer, 1, 2)


@pytest.mark.parametrize("name", ["Adam8bit", "AdamW8bit"])
@pytest.mark.parametrize("optim_bits", [8, 16, 32])
def test_amsgrad_divides_by_the_largest_second_moment_so_far(name: str, optim_bits: int) -> None:
    """A gradient of 3, then zeros: without AMSGrad the denominator falls by a third, with it it stays."""
    p = parameter(torch.ones(512))
    optimizer = getattr(optim8, name)([p], betas=(0.0, 0.5), amsgrad=True, optim_bits=optim_bits, min_8bit_size=0)
    for gradient in (3.0, 0.0, 0.0):
        p.grad = torch.full_like(p, gradient)
        optimizer.step()
    state = optim8.convert.to_torch(optimizer)["state"][0]
    # Codes of the one value of a block, which is its absmax, are exact to some ulps.
    assert torch.allclose(state["max_exp_avg_sq"], torch.tensor(4.5), rtol=2.0**-20)
    assert torch.allclose(state["exp_avg_sq"], torch.tensor(4.5 / 4), rtol=2.0**-20)


@pytest.mark.parametrize("optim_bits", [8, 16, 32])
def test_amsgrad_goes_through_copies_files_and_directories(optim_bits: int, tmp_path: Any) -> None:
    options = {"amsgrad": True, "optim_bits": optim_bits, "min_8bit_size": 0}
    params, optimizer = make(optim8.AdamW8bit, **options)
    paged_params, paged = make(optim8.AdamW8bit, paged=Pager(directory=tmp_path, keep=True), **options)
    steps(params, optimizer, 0, 3)
    steps(paged_params, paged, 0, 3)
    saved = through_a_file(optimizer.state_dict())
    for each in (paged, copy.deepcopy(optimizer), copy.deepcopy(paged), through_a_file(optimizer, weights_only=False)):
        other = [each.state[p] for p in each.param_groups[0]["params"]]
        assert [{k: bits(v) for k, v in entry.items()} for entry in other] == [
            {k: bits(v) for k, v in optimizer.state[p].items()} for p in params
        ]
    twins, loaded = make(optim8.AdamW8bit, **options)
    loaded.load_state_dict(saved)
    for twin, p in zip(twins, params, strict=True):
        twin.data.copy_(p.data)
    steps(params, optimizer, 3, 5)
    steps(twins, loaded, 3, 5)
    assert [bits(p) for p in twins] == [bits(p) for p in params]


def test_state_that_an_option_asks_for_later_is_missed_by_name() -> None:
    params, optimizer = make(optim8.AdamW8bit)
    steps(params, optimizer, 0, 1)
    optimizer.param_groups[0]["amsgrad"] = True
    before = [bits(p) for p in params]
    with pytest.raises(ValueError, match=r"parameter 0 .*lacks state\['max_exp_avg_sq"):
        steps(params, optimizer, 1, 2)
    assert [bits(p) for p in params] == before
