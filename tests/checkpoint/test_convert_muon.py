"""Muon's dicts: torch.optim's both ways, and those of muon-optimizer and pytorch_optimizer, which lack some options."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.convert_harness import CARRIERS, assert_same_step, steps, twins
from support.harness import bits, snapshot

import optim8
from optim8.checkpoint.formats import torch_optim

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
HYPER: dict[str, Any] = {
    "lr": 0.03,
    "weight_decay": 0.2,
    "momentum": 0.8,
    "nesterov": False,
    "eps": 1e-5,
    "ns_steps": 3,
    "ns_coefficients": (3.0, -4.0, 2.0),
    "adjust_lr_fn": "match_rms_adamw",
}


def matrices() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((70, 60), (30, 200), (8, 5))]


@pytest.mark.parametrize("optim_bits", [8, 16, 32])
def test_their_dict_loads_here(optim_bits: int) -> None:
    theirs_params = matrices()
    theirs = torch.optim.Muon(theirs_params, **HYPER)
    steps(theirs_params, theirs, 0, 3)
    params = twins(theirs_params)
    optimizer = optim8.Muon8bit(params, optim_bits=optim_bits)
    optimizer.load_state_dict(CARRIERS["torch.save"](theirs.state_dict()))
    assert {name: optimizer.param_groups[0][name] for name in HYPER} == HYPER
    assert optimizer.param_groups[0]["use_muon"] is True
    back = twins(params)
    other = torch.optim.Muon(back)
    other.load_state_dict(CARRIERS["torch.save"](optim8.convert.to_torch(optimizer)))
    assert other.state_dict()["param_groups"] == theirs.state_dict()["param_groups"]
    for p, q, was in zip(params, back, theirs_params, strict=True):
        assert other.state[q].keys() == theirs.state[was].keys() == {"momentum_buffer"}
        moment, before = other.state[q]["momentum_buffer"], theirs.state[was]["momentum_buffer"]
        if optimizer.precision(p) == "32bit":
            assert bits(moment) == bits(before)
        else:
            assert (moment - before).norm() < 0.03 * before.norm()
    assert_same_step(back, other, params, optimizer, 3)
    if optim_bits == 32:
        steps(theirs_params, theirs, 3, 4)
        assert [bits(p) for p in params] == [bits(p) for p in theirs_params]


def test_from_torch() -> None:
    theirs_params = matrices()
    theirs = torch.optim.Muon(
        [{"params": [p], "tag": i, "lr": 0.1 / (i + 1)} for i, p in enumerate(theirs_params)], **HYPER
    )
    steps(theirs_params, theirs, 0, 3)
    others = twins(theirs_params)
    twin = torch.optim.Muon([{"params": [p]} for p in others])
    twin.load_state_dict(copy.deepcopy(theirs.state_dict()))
    optimizer = optim8.from_torch(theirs, optim_bits=32)
    assert type(optimizer) is optim8.Muon8bit
    for ours, was in zip(optimizer.param_groups, theirs.param_groups, strict=True):
        assert {name: ours[name] for name in was} == was
    for t in (3, 4):
        assert_same_step(theirs_params, optimizer, others, twin, t)


def test_the_options_are_those_that_torch_writes() -> None:
    assert torch.optim.Muon(matrices()).param_groups[0].keys() - {"params"} == set(torch_optim.written("muon"))


def buffers(params: list[torch.nn.Parameter]) -> dict[int, dict[str, Any]]:
    return {i: {"momentum_buffer": torch.full_like(p, 0.5).detach()} for i, p in enumerate(params)}


RELATIVES: dict[str, dict[str, Any]] = {
    "muon-optimizer": {"lr": 0.02, "weight_decay": 0, "momentum": 0.9},
    "pytorch_optimizer": {
        "use_muon": True,
        "lr": 0.02,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 0.0,
        "ns_steps": 5,
        "ns_coeffs": [(3.4445, -4.775, 2.0315)],
        "ns_method": "newton_schulz",
        "ns_reset_steps": (2,),
        "use_adjusted_lr": False,
        "weight_decouple": True,
        "foreach": None,
        "step": 3,
    },
}


@pytest.mark.parametrize("library", RELATIVES)
def test_what_a_relative_does_not_write_stays_as_it_is(library: str) -> None:
    params = matrices()
    written = RELATIVES[library]
    optimizer = optim8.Muon8bit(params, nesterov=False, eps=1e-4, ns_coefficients=(3.0, -4.0, 2.0))
    saved = {"state": buffers(params), "param_groups": [{**written, "params": [0, 1, 2]}]}
    optimizer.load_state_dict(CARRIERS["torch.save"](saved))
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.02, 0.9, 0.0)
    assert (group["nesterov"], group["eps"]) == (written.get("nesterov", False), 1e-4)
    assert group["ns_coefficients"] == (3.0, -4.0, 2.0)
    assert group.keys() == optim8.Muon8bit(matrices()).param_groups[0].keys()
    assert all(optimizer.state[p]["step"] == 1 for p in params)
    steps(params, optimizer, 0, 1)


@pytest.mark.parametrize(
    "option", [{"ns_method": "gram"}, {"use_adjusted_lr": True}, {"ns_coeffs": [(1.0, 2.0, 3.0)]}, {"beta2": 0.9}]
)
def test_options_of_a_relative_that_change_the_update_are_refused(option: dict[str, Any]) -> None:
    params = matrices()
    group = {**RELATIVES["pytorch_optimizer"], **option, "params": [0, 1, 2]}
    with pytest.raises(ValueError, match=rf"param_groups\[0\]\['{next(iter(option))}'\] is"):
        optim8.Muon8bit(params).load_state_dict({"state": buffers(params), "param_groups": [group]})


def test_groups_of_muon_optimizers_adamw() -> None:
    """As its MuonWithAuxAdam writes them; torch.optim's Muon has no such groups."""
    matrix, bias = torch.nn.Parameter(torch.ones(70, 70)), torch.nn.Parameter(torch.ones(70))
    groups = [
        {"use_muon": True, "lr": 0.02, "momentum": 0.95, "weight_decay": 0, "params": [0]},
        {"use_muon": False, "lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0, "params": [1]},
    ]
    first = torch.full((70,), 0.25)
    aux = {"exp_avg": first, "exp_avg_sq": first.square(), "step": 3}
    ours = [{"params": [matrix]}, {"params": [bias], "use_muon": False}]
    optimizer = optim8.Muon8bit(ours)
    optimizer.load_state_dict({"state": {0: {"momentum_buffer": torch.ones(70, 70)}, 1: aux}, "param_groups": groups})
    assert [group["use_muon"] for group in optimizer.param_groups] == [True, False]
    assert (optimizer.param_groups[1]["betas"], optimizer.param_groups[1]["eps"]) == ((0.9, 0.95), 1e-10)
    assert torch.equal(optimizer.state[bias]["exp_avg"], first)
    assert (optimizer.state[matrix]["step"], optimizer.state[bias]["step"]) == (1, 3)
    before = snapshot(optimizer)
    with pytest.raises(
        ValueError, match=r"param_groups\[1\]\['use_muon'\] must be True, got False: torch\.optim\.Muon"
    ):
        optim8.convert.to_torch(optimizer)
    assert snapshot(optimizer) == before


def test_torch_only_descends() -> None:
    with pytest.raises(ValueError, match=r"\['maximize'\] must be False, got True\. torch\.optim\.Muon only descends"):
        optim8.convert.to_torch(optim8.Muon8bit(matrices(), maximize=True))


def test_bitsandbytes_has_none() -> None:
    with pytest.raises(ValueError, match="muon cannot be converted for bitsandbytes"):
        optim8.convert.to_bitsandbytes(optim8.Muon8bit(matrices()))
