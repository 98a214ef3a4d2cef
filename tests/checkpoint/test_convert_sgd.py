"""torch.optim's SGD: its dicts count no steps, and those without momentum hold nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES
from support.convert_harness import CARRIERS, assert_holds, assert_same_step, make_params, ours, steps, twins

import optim8

SGD: dict[str, dict[str, Any]] = {
    "momentum": {"lr": 0.1, "momentum": 0.9},
    "weight decay": {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, "nesterov": True},
    "dampening": {"lr": 0.1, "momentum": 0.9, "dampening": 0.4},
    "maximize": {"lr": 0.1, "momentum": 0.9, "dampening": 0.4, "maximize": True},
}
SGD_DEFAULTS: dict[str, Any] = {
    "momentum": 0,
    "dampening": 0,
    "weight_decay": 0,
    "nesterov": False,
    "maximize": False,
}


@pytest.mark.parametrize("optim_bits", [8, 16, 32])
@pytest.mark.parametrize("taken", [1, 3])
@pytest.mark.parametrize("variant", SGD)
def test_a_dict_of_torch_sgd_loads_here(variant: str, taken: int, optim_bits: int) -> None:
    """It has no count of steps; the dampening that the first step leaves out counts from the next on."""
    theirs_params = make_params()
    theirs = torch.optim.SGD(theirs_params, **SGD[variant])
    steps(theirs_params, theirs, 0, taken)
    saved = theirs.state_dict()
    assert all(entry.keys() == {"momentum_buffer"} for entry in saved["state"].values())
    params = twins(theirs_params)
    optimizer = ours("SGD8bit", params, optim_bits=optim_bits)
    optimizer.load_state_dict(CARRIERS["torch.save"](saved))
    options = {**SGD_DEFAULTS, **SGD[variant]}
    assert {key: optimizer.param_groups[0][key] for key in options} == options
    large = [p.numel() >= 4096 and optim_bits == 8 for p in params]
    assert [optimizer.precision(p) == "8bit" for p in params] == large
    for p, q in zip(params, theirs_params, strict=True):
        assert_holds(optimizer, CASES["SGD8bit"], p, theirs.state[q])
    for t in range(taken, taken + 3):
        if optim_bits == 32:
            assert_same_step(params, optimizer, theirs_params, theirs, t)
        else:
            steps(params, optimizer, t, t + 1)


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("optim_bits", [8, 16, 32])
@pytest.mark.parametrize("variant", SGD)
def test_torch_sgd_loads_our_dict_and_goes_on(variant: str, optim_bits: int, carrier: str) -> None:
    params = make_params()
    optimizer = ours("SGD8bit", params, **SGD[variant], optim_bits=optim_bits)
    steps(params, optimizer, 0, 3)
    written = CARRIERS[carrier](optim8.convert.to_torch(optimizer))
    others = twins(params)
    theirs = torch.optim.SGD(others, lr=0.5)
    theirs.load_state_dict(written)
    options = {**SGD_DEFAULTS, **SGD[variant]}
    assert {key: theirs.param_groups[0][key] for key in options} == options
    assert theirs.param_groups[0].keys() == torch.optim.SGD(make_params()).param_groups[0].keys()
    assert all(theirs.state[q].keys() == {"momentum_buffer"} for q in others)
    for p, q in zip(params, others, strict=True):
        if optimizer.precision(p) == "32bit":
            assert torch.equal(theirs.state[q]["momentum_buffer"], optimizer.state[p]["momentum_buffer"])
    assert_same_step(others, theirs, params, optimizer, 3)
    if optim_bits == 32:
        assert_same_step(others, theirs, params, optimizer, 4)


def test_torch_sgd_without_momentum_loads_here() -> None:
    """It has no state: here the next step makes it."""
    theirs_params = make_params()
    theirs = torch.optim.SGD(theirs_params, lr=0.1, weight_decay=1e-2)
    steps(theirs_params, theirs, 0, 2)
    params = twins(theirs_params)
    optimizer = ours("SGD8bit", params, lr=0.5, optim_bits=32)
    optimizer.load_state_dict(CARRIERS["torch.save"](theirs.state_dict()))
    for t in (2, 3):
        assert_same_step(params, optimizer, theirs_params, theirs, t)
