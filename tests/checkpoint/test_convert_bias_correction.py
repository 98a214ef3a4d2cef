"""optimi's and heavyball's AdamW: averages that hold their bias correction, and 16-bit weights with a part beside them.

The dicts are built from torch's state with the keys that optimi 0.3.3 and heavyball 3.2.1 write; where these are
installed, theirs are read too.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.convert_harness import Params, assert_same_step, make_params, ours, steps, twins
from support.harness import snapshot

import optim8
from optim8.state.weights import join, low_of

STEPS = 5
HYPER: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-9, "weight_decay": 0.03}


def trained(kind: str = "AdamW") -> tuple[Params, torch.optim.Optimizer]:
    params = make_params(channels_last=False)
    optimizer = getattr(torch.optim, kind)(params, **HYPER)
    steps(params, optimizer, 0, STEPS)
    return params, optimizer


def averages(entry: dict[str, Any]) -> dict[str, torch.Tensor]:
    """torch's moments, divided by their bias correction."""
    return {
        name: entry[name].double().div(1 - beta**STEPS).float()
        for name, beta in zip(("exp_avg", "exp_avg_sq"), HYPER["betas"], strict=True)
    }


def as_optimi(saved: dict[str, Any], **options: Any) -> dict[str, Any]:
    hyper = {name: value for name, value in HYPER.items() if name != "betas"}
    hyper.update(zip(("beta1", "beta2"), HYPER["betas"], strict=True))
    run = dict.fromkeys(("max_lr", "kahan_sum", "foreach")) | {
        "triton": False,
        "gradient_release": False,
        "setup": True,
    }
    count = {"step": torch.tensor(STEPS, dtype=torch.int32), "params": saved["param_groups"][0]["params"]}
    group = {**hyper, **run, **count, "decouple_wd": True, "decouple_lr": False, "max_lr": None}
    state = {key: {**averages(entry), "kahan_comp": None} for key, entry in saved["state"].items()}
    return {"state": state, "param_groups": [{**group, **options}]}


def as_heavyball(saved: dict[str, Any], **options: Any) -> dict[str, Any]:
    off = dict.fromkeys(("caution", "cautious_weight_decay", "mars", "is_preconditioning"), False)
    run = {
        "multi_tensor": True,
        "storage_dtype": "float32",
        "mars_gamma": 0.0025,
        "beta2_scale": 0.8,
        "param_count": 9000,
    }
    rates = {"base_lr": HYPER["lr"], "prev_lr": torch.tensor(HYPER["lr"]), "warmup_steps": 0, "param_count": 9000}
    count = {"step": None, "step_count": torch.tensor(STEPS), "params": saved["param_groups"][0]["params"]}
    group = {**HYPER, **off, **run, **rates, **count, "ecc": None, "param_ecc": None}
    state = {}
    for key, entry in saved["state"].items():
        view = {f"update_by_adam_{name}_0": value for name, value in averages(entry).items()}
        state[key] = {0: {**({"step": torch.tensor(STEPS)} if key == 0 else {}), **view, "is_initialized": {0}}}
    return {"state": state, "param_groups": [{**group, **options}], "heavyball": {"inner_group": {}}}


BUILT: dict[str, Callable[..., dict[str, Any]]] = {"optimi": as_optimi, "heavyball": as_heavyball}


@pytest.mark.parametrize("optim_bits", [8, 32])
@pytest.mark.parametrize("library", BUILT)
def test_the_state_is_torchs(library: str, optim_bits: int) -> None:
    theirs_params, theirs = trained()
    params = twins(theirs_params)
    optimizer = ours("AdamW8bit", params, lr=0.5, optim_bits=optim_bits)
    with optim8.convert.report() as report:
        optimizer.load_state_dict(copy.deepcopy(BUILT[library](theirs.state_dict())))
    group = optimizer.param_groups[0]
    assert {name: group[name] for name in HYPER} == HYPER
    assert {row.how for row in report.rows} <= {"copied", "quantized"}
    assert ("RAdam" in str(report)) == (library == "optimi"), "which it cannot be told from"
    for p, q in zip(params, theirs_params, strict=True):
        assert float(optimizer.state[p]["step"]) == STEPS
        if optim_bits == 32:
            for name in ("exp_avg", "exp_avg_sq"):  # a division and a multiplication in float32
                torch.testing.assert_close(optimizer.state[p][name], theirs.state[q][name], rtol=2**-22, atol=0)
    if optim_bits == 32:
        assert_same_step(params, optimizer, theirs_params, theirs, STEPS)
    assert optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())) is None


def test_a_decay_that_follows_the_schedule() -> None:
    """optimi's `decouple_lr` shrinks by lr / max_lr * weight_decay: here the decay is over max_lr."""
    _, theirs = trained()
    optimizer = ours("AdamW8bit", make_params(channels_last=False))
    optimizer.load_state_dict(as_optimi(theirs.state_dict(), decouple_wd=False, decouple_lr=True, max_lr=0.25))
    assert optimizer.param_groups[0]["weight_decay"] == HYPER["weight_decay"] / 0.25


OPTIMI_ADAM = {"decouple_wd": False}
REFUSED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "a penalty": ("AdamW8bit", "optimi", OPTIMI_ADAM, "weight_decay is 0.03, which is decoupled here"),
    "no penalty": ("Adam8bit", "optimi", {}, "weight_decay is 0.03, which is an L2 penalty here"),
    "another rule": ("Lion8bit", "optimi", {}, "lion cannot be converted for optimi; adam, adamw can"),
    "Adam": ("Adam8bit", "heavyball", {}, "adam cannot be converted for heavyball; adamw can"),
    "mars": ("AdamW8bit", "heavyball", {"mars": True}, r"\['mars'\] is True, which changes the update"),
    "caution": ("AdamW8bit", "heavyball", {"caution": True}, r"\['caution'\] is True"),
    "warm-up": ("AdamW8bit", "heavyball", {"warmup_steps": 6}, r"\['warmup_steps'\] is 6 after 5 steps.* scheduler"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_go_on_otherwise_is_refused(what: str) -> None:
    name, library, options, message = REFUSED[what]
    _, theirs = trained()
    params = make_params(channels_last=False)
    optimizer = ours(name, params)
    steps(params, optimizer, 0, 1)
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(BUILT[library](theirs.state_dict(), **options))
    assert snapshot(optimizer, params) == before


@pytest.mark.parametrize("library", BUILT)
@pytest.mark.parametrize("key, value", [("exp_avg_sq", torch.zeros(3)), ("second", torch.zeros(3)), (1, {})])
def test_a_state_that_does_not_fit_is_named(library: str, key: Any, value: Any) -> None:
    _, theirs = trained()
    saved = BUILT[library](theirs.state_dict())
    entry = saved["state"][0]
    if library == "heavyball" and key != 1:
        key, entry = {"exp_avg_sq": "update_by_adam_exp_avg_sq_0"}.get(key, key), entry[0]
    entry[key] = value
    with pytest.raises(ValueError, match=r"AdamW8bit\.load_state_dict: state\[0\]\[.*\] (must be|is no state)"):
        ours("AdamW8bit", make_params(channels_last=False)).load_state_dict(saved)


def test_the_floor_of_heavyballs_division_is_noted() -> None:
    _, theirs = trained()
    with optim8.convert.report() as report:
        ours("AdamW8bit", make_params(channels_last=False)).load_state_dict(as_heavyball(theirs.state_dict(), eps=1.0))
    concerned = {note.name: note.count for note in report.notes if "100 eps" in note.text}
    assert [count for name, count in concerned.items() if name.endswith("state[0]['exp_avg_sq']")] == [5003]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("master_bits", [16, 24, 32])
def test_the_rest_of_a_weight_goes_on(master_bits: int, dtype: torch.dtype) -> None:
    wide = [torch.nn.Parameter(torch.linspace(-3, 3, 5000))]
    theirs = torch.optim.AdamW(wide, **HYPER)
    steps(wide, theirs, 0, STEPS)
    saved = as_optimi(theirs.state_dict(), kahan_sum=True)
    params = [torch.nn.Parameter(wide[0].detach().to(dtype))]
    last_bit = (torch.nextafter(params[0].detach(), torch.tensor(9.0, dtype=dtype)) - params[0].detach()).float()
    rest = (last_bit * torch.linspace(-0.24, 0.24, 5000)).to(dtype)
    saved["state"][0]["kahan_comp"] = rest
    optimizer = ours("AdamW8bit", params, master_bits=master_bits)
    with optim8.convert.report() as report:
        optimizer.load_state_dict(saved)
    lost = [note.count for note in report.notes if "master_bits=24 or 32" in note.text]
    if master_bits == 16:
        assert lost == [int((rest != 0).sum())]
        assert "param_low" not in optimizer.state[params[0]]
        return
    assert lost == []
    weights = join(params[0], optimizer.state[params[0]]["param_low"])
    error = (weights - (params[0].detach().float() + rest.float())).abs() / last_bit
    assert float(error.max()) <= (2.0**-8 if master_bits == 24 else 0), "of a last bit, or of that below a power of two"


def test_a_rest_never_moves_the_parameter() -> None:
    """Ties, neighbours of half the distance below a power of two, and rests that are larger than the last bit."""
    param = torch.tensor([1.0, 1.0, 1.0, -1.0, 1.5, 1.5, 0.0, 2.0, float("nan")]).bfloat16()
    half = 2.0**-8
    rest = torch.tensor([half, -half, -half / 2, half, half, 3 * half, 1e-3, 0.0, 1.0])
    low = low_of(param, rest)
    weights = join(param, low)
    assert torch.equal(weights.bfloat16()[:-1], param[:-1])
    kept = (weights - param.float())[:-1] / rest[:-1]
    assert kept[torch.tensor([0, 2, 4])].tolist() == pytest.approx([1.0, 1.0, 1.0], abs=0.01)
    assert 0.4 < float(kept[1]) < 0.5
    assert [int(low[i]) for i in (5, 6, 7)] == [0, 0, 0]


def of_packages() -> dict[str, tuple[str, torch.dtype, dict[str, Any], float]]:
    """Package, dtype of parameters, options, and how far steps may differ, relative to them: float32, what a rest of 8
    bits loses of each average, and bfloat16's rounding of averages and update beside Kahan's sum, which has no decay:
    p * (1 - lr * weight_decay) rounds to p."""
    exact = {"lr": 1e-3, "weight_decay": 0.1}
    return {
        "optimi": ("optimi", torch.float32, exact, 1e-5),
        "optimi decouple_lr": ("optimi", torch.float32, {**exact, "decouple_lr": True}, 1e-5),
        "optimi Kahan": ("optimi", torch.bfloat16, {"lr": 1e-3, "weight_decay": 0.0}, 2.0**-6),
        "heavyball": ("heavyball", torch.float32, exact, 1e-5),
        "heavyball ecc": ("heavyball", torch.float32, {**exact, "ecc": "bf16+8"}, 2.0**-12),
        "heavyball param_ecc": ("heavyball", torch.bfloat16, {**exact, "ecc": "bf16+16", "param_ecc": "bf16+16"}, 1e-3),
    }


@pytest.mark.peers
@pytest.mark.parametrize("what", of_packages())
def test_their_dicts_go_on(what: str) -> None:
    name, dtype, options, within = of_packages()[what]
    library = pytest.importorskip(name)
    if name == "heavyball":
        importlib.import_module("heavyball.utils").compile_mode = None
    theirs_params = make_params(dtype, channels_last=False)[:2]
    theirs = library.AdamW(theirs_params, **options)
    steps(theirs_params, theirs, 0, STEPS)
    params = twins(theirs_params)
    optimizer = ours("AdamW8bit", params, optim_bits=32, **({} if dtype == torch.float32 else {"master_bits": 32}))
    optimizer.load_state_dict(copy.deepcopy(theirs.state_dict()))

    def weights() -> tuple[torch.Tensor, torch.Tensor]:
        mine = [join(p, optimizer.state[p]["param_low"]) if dtype != torch.float32 else p.detach() for p in params]
        there = []
        for p in theirs_params:
            entry = theirs.state[p]
            rest = entry.get("kahan_comp")
            if name == "heavyball" and dtype != torch.float32:
                half = torch.frexp(p.detach().float())[1].sub(9).double().exp2()  # of the last bit
                rest = entry[0]["param::ecc"] / 32767 * half
            there.append(p.detach().float() if rest is None else p.detach().float() + rest.float())
        return torch.cat([w.flatten() for w in mine]), torch.cat([w.flatten() for w in there])

    mine, before = weights()
    torch.testing.assert_close(mine, before, rtol=2.0**-15, atol=0)
    steps(theirs_params, theirs, STEPS, STEPS + 3)
    steps(params, optimizer, STEPS, STEPS + 3)
    mine, after = weights()
    assert float((mine - after).norm()) <= within * float((after - before).norm())
