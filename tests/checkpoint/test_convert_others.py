"""lion-pytorch and torchao: their dicts load here; ours load into lion-pytorch and step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import CASES
from support.convert_harness import CARRIERS, assert_holds, assert_same_step, make_params, ours, steps, twins
from support.harness import bits, snapshot

import optim8

pytestmark = pytest.mark.peers
LION: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.95), "weight_decay": 0.3}
ADAM: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.03}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optim_bits", [8, 16, 32])
def test_lion_pytorch(optim_bits: int, dtype: torch.dtype) -> None:
    lion_pytorch = pytest.importorskip("lion_pytorch")
    theirs_params = make_params(dtype)
    theirs = lion_pytorch.Lion(theirs_params, **LION)
    steps(theirs_params, theirs, 0, 3)
    params = twins(theirs_params)
    optimizer = optim8.Lion8bit(params, optim_bits=optim_bits)
    optimizer.load_state_dict(CARRIERS["torch.save"](theirs.state_dict()))
    assert {key: optimizer.param_groups[0][key] for key in LION} == LION
    for p, q in zip(params, theirs_params, strict=True):
        assert_holds(optimizer, CASES["Lion8bit"], p, theirs.state[q])
    if dtype == torch.float32 and optim_bits == 32:
        assert_same_step(params, optimizer, theirs_params, theirs, 3)
    steps(params, optimizer, 4, 5)
    others = twins(params)
    back = lion_pytorch.Lion(others, lr=0.5)
    written = CARRIERS["torch.save"](optim8.convert.to_torch(optimizer))
    assert written["param_groups"][0].keys() == theirs.state_dict()["param_groups"][0].keys()
    back.load_state_dict(written)
    if dtype == torch.float32:
        assert_same_step(others, back, params, optimizer, 5)


def test_lion_pytorch_only_descends() -> None:
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['maximize'\] must be False"):
        optim8.convert.to_torch(optim8.Lion8bit(make_params(), maximize=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("there", ["8bit", "4bit", "Fp8"])
@pytest.mark.parametrize("optim_bits", [8, 16, 32])
@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
def test_torchao(kind: str, optim_bits: int, there: str, dtype: torch.dtype) -> None:
    torchao = pytest.importorskip("torchao.optim")
    theirs_params = make_params(dtype, channels_last=False)
    theirs = getattr(torchao, f"{kind}{there}")(theirs_params, **ADAM)
    with torch.compiler.set_stance("force_eager"):  # its step compiles itself, which takes a minute
        steps(theirs_params, theirs, 0, 3)
    params = twins(theirs_params)
    optimizer = ours(f"{kind}8bit", params, optim_bits=optim_bits)
    optimizer.load_state_dict(CARRIERS["torch.save"](theirs.state_dict()))
    group = optimizer.param_groups[0]
    assert {key: group[key] for key in ADAM} == pytest.approx({**ADAM, "betas": pytest.approx(ADAM["betas"])})
    assert type(group["lr"]) is float
    quantized, case = 0, CASES[f"{kind}8bit"]
    for p, q in zip(params, theirs_params, strict=True):
        state, was = optimizer.state[p], theirs.state[q]
        assert state["step"] == 3
        if hasattr(was["exp_avg"], "codes"):
            quantized += 1
            means = {name: was[name].dequantize() for name in ("exp_avg", "exp_avg_sq")}
            if there == "8bit" and optim_bits == 8:
                assert bits(state["exp_avg_codes"]) == bits(was["exp_avg"].codes)
                assert bits(state["exp_avg_absmax"]) == bits(was["exp_avg"].scale)
                assert_holds(optimizer, replace(case, states={"exp_avg_sq": False}), p, means)
                continue
            assert_holds(optimizer, case, p, means)
        else:
            assert_holds(optimizer, case, p, {k: was[k] for k in ("exp_avg", "exp_avg_sq")})
    assert quantized > 0
    steps(params, optimizer, 3, 4)


def test_torchao_with_a_broken_part_is_refused() -> None:
    torchao = pytest.importorskip("torchao.optim")
    theirs_params = make_params(channels_last=False)
    theirs = torchao.AdamW8bit(theirs_params)
    with torch.compiler.set_stance("force_eager"):
        steps(theirs_params, theirs, 0, 1)
    params = twins(theirs_params)
    optimizer = optim8.AdamW8bit(params)
    before = snapshot(optimizer, params)
    broken = theirs.state_dict()
    broken["state"][5]["exp_avg"].scale.neg_()
    with pytest.raises(ValueError, match=r"AdamW8bit.load_state_dict: state\[5\]\['exp_avg'\] must be finite and not"):
        optimizer.load_state_dict(broken)
    assert snapshot(optimizer, params) == before
