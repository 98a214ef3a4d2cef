"""torch.optim's Adam and AdamW: their dicts load here, ours load there, and both go on as if nothing had been."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from cases import CASES
from support.convert_harness import CARRIERS, assert_holds, assert_same_step, make_params, ours, steps, twins
from support.harness import bits, snapshot

import optim8
from optim8 import _native, rules

PAIRS = {"Adam8bit": torch.optim.Adam, "AdamW8bit": torch.optim.AdamW}
HYPER: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.03}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "maximize": {"maximize": True},
    "lr as a tensor": {"lr": torch.tensor(3e-3), "foreach": False},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("optim_bits", [8, 16, 32])
@pytest.mark.parametrize("name", PAIRS)
def test_their_dict_loads_here(name: str, optim_bits: int, variant: str, dtype: torch.dtype) -> None:
    theirs_params = make_params(dtype)
    theirs = PAIRS[name](theirs_params, **{**HYPER, **VARIANTS[variant]})
    steps(theirs_params, theirs, 0, 3)
    params = twins(theirs_params)
    optimizer = ours(name, params, optim_bits=optim_bits, fused=None)
    optimizer.load_state_dict(CARRIERS["torch.save"](theirs.state_dict()))
    group = optimizer.param_groups[0]
    assert {key: group[key] for key in HYPER} == HYPER
    assert group["maximize"] == (variant == "maximize")
    assert (group["foreach"], group["fused"], group["capturable"]) == (None, None, False), "how to run is ours"
    large = [p.numel() >= 4096 and optim_bits == 8 for p in params]
    assert [optimizer.precision(p) == "8bit" for p in params] == large
    for p, q in zip(params, theirs_params, strict=True):
        assert optimizer.state[p]["step"] == 3
        assert_holds(optimizer, CASES[name], p, theirs.state[q])
    if dtype == torch.float32 and optim_bits == 32:
        assert_same_step(params, optimizer, theirs_params, theirs, 3)
    else:
        steps(params, optimizer, 3, 4)


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("optim_bits", [8, 16, 32])
@pytest.mark.parametrize("name", PAIRS)
def test_our_dict_loads_there_and_steps(name: str, optim_bits: int, carrier: str) -> None:
    params = make_params()
    optimizer = ours(name, params, **HYPER, optim_bits=optim_bits)
    steps(params, optimizer, 0, 3)
    before = snapshot(optimizer, params)
    with optim8.convert.report() as report:
        written = CARRIERS[carrier](optim8.convert.to_torch(optimizer))
    assert {row.how for row in report.rows} == ({"copied"} if optim_bits == 32 else {"copied", "widened"})
    assert all(row.max_error == row.relative_error == 0 for row in report.rows)
    others = twins(params)
    theirs = PAIRS[name](others, lr=0.5)
    theirs.load_state_dict(written)
    assert {key: theirs.param_groups[0][key] for key in HYPER} == HYPER
    # Versions of torch that do not know this option yet keep it as it is.
    known = PAIRS[name](make_params()).param_groups[0].keys() | {"decoupled_weight_decay"}
    assert theirs.param_groups[0].keys() == known
    back = twins(params)
    again = ours(name, back, optim_bits=optim_bits)
    again.load_state_dict(theirs.state_dict())
    for p, q in zip(back, others, strict=True):
        assert again.state[p]["step"] == 3
        assert_holds(again, CASES[name], p, theirs.state[q])
    assert_same_step(others, theirs, params, optimizer, 3)
    assert snapshot(optimizer) != before
    # The dict has memory of its own.
    assert all(
        t.data_ptr() not in {s.data_ptr() for e in optimizer.state.values() for s in e.values() if s.numel()}
        for e in optim8.convert.to_torch(optimizer)["state"].values()
        for t in e.values()
        if t.numel()
    )


def test_groups_names_and_partial_state() -> None:
    """Ids, names and what schedulers keep in a group; parameters that had no gradient have no state."""
    a, b, c = make_params()[:3]
    groups = [
        {"params": [("c", c), ("a", a)], "lr": 0.1, "initial_lr": 0.2, "tag": "first"},
        {"params": [("b", b)], "betas": (0.5, 0.6), "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, **HYPER)
    a.grad, b.grad = torch.ones_like(a), torch.full_like(b, -1.0)
    theirs.step()
    b.grad = None
    theirs.step()
    d, e, f = twins([a, b, c])
    optimizer = optim8.AdamW8bit([{"params": [("z", f), ("x", d)]}, {"params": [("y", e)]}], lr=1.0)
    optimizer.load_state_dict(theirs.state_dict())
    first, second = optimizer.param_groups
    assert (first["lr"], first["initial_lr"], first["tag"], first["betas"]) == (0.1, 0.2, "first", HYPER["betas"])
    assert (second["lr"], second["betas"], second["weight_decay"]) == (HYPER["lr"], (0.5, 0.6), 0.0)
    assert first["param_names"] == ["z", "x"]
    assert first["optim_bits"] == 8
    assert f not in optimizer.state or not optimizer.state[f]
    assert (optimizer.state[d]["step"], optimizer.state[e]["step"]) == (2, 1)
    assert_holds(optimizer, CASES["AdamW8bit"], d, theirs.state[a])
    written = optim8.convert.to_torch(optimizer)
    assert set(written["state"]) == {1, 2}
    assert [group["params"] for group in written["param_groups"]] == [[0, 1], [2]]
    assert written["param_groups"][0]["tag"] == "first"


@pytest.mark.parametrize("decay, loads", [(0.0, True), (0.1, False)])
@pytest.mark.parametrize("name, other", [("Adam8bit", torch.optim.AdamW), ("AdamW8bit", torch.optim.Adam)])
def test_a_weight_decay_does_not_change_its_meaning(name: str, other: Any, decay: float, loads: bool) -> None:
    theirs_params = make_params()
    theirs = other(theirs_params, weight_decay=decay)
    steps(theirs_params, theirs, 0, 1)
    params = twins(theirs_params)
    optimizer = ours(name, params, lr=0.5)
    if loads:
        optimizer.load_state_dict(theirs.state_dict())
        assert optimizer.param_groups[0]["lr"] == 1e-3
        return
    before = snapshot(optimizer, params)
    saved = theirs.state_dict()
    saved["param_groups"][0].setdefault("decoupled_weight_decay", other is torch.optim.AdamW)
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['decoupled_weight_decay'\] is (True|False) .* 0\.1"):
        optimizer.load_state_dict(saved)
    assert snapshot(optimizer, params) == before
    del saved["param_groups"][0]["decoupled_weight_decay"]  # as older versions of torch write it: it cannot be told
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["weight_decay"] == decay


Break = Callable[[dict[str, Any]], Any]
NAN = float("nan")
BROKEN: dict[str, tuple[Break, str]] = {
    "amsgrad in a group": (
        lambda d: d["param_groups"][0].update(amsgrad=True),
        r"state\[0\]\['max_exp_avg_sq'\] must be .*got nothing",
    ),
    "a state of another shape": (
        lambda d: d["state"][0].update(exp_avg=torch.zeros(5002)),
        r"state\[0\]\['exp_avg'\] must be float32 .*\(5003,\), got float32 \(5002,\)",
    ),
    "transposed": (
        lambda d: d["state"][1].update(exp_avg_sq=d["state"][1]["exp_avg_sq"].t()),
        r"state\[1\]\['exp_avg_sq'\].*\(70, 60\), got float32 \(60, 70\)",
    ),
    "integers": (lambda d: d["state"][0].update(exp_avg=torch.zeros(5003, dtype=torch.int32)), "got int32"),
    "no second moment": (lambda d: d["state"][0].pop("exp_avg_sq"), r"state\[0\]\['exp_avg_sq'\].*got nothing"),
    "no step": (lambda d: d["state"][5].pop("step"), r"state\[5\]\['step'\].*got nothing"),
    "a step of words": (lambda d: d["state"][5].update(step="3"), r"state\[5\]\['step'\].*got str"),
    "steps of two": (lambda d: d["state"][5].update(step=torch.ones(2)), r"state\[5\]\['step'\]"),
    "a step below 0": (lambda d: d["state"][5].update(step=torch.tensor(-1.0)), r"state\[5\]\['step'\].*-1"),
    "another name": (lambda d: d["state"][5].update(momentum=torch.ones(1)), r"state\[5\]\['momentum'\] is no state"),
    "NaN to be quantized": (lambda d: d["state"][0]["exp_avg"][7:8].fill_(NAN), r"state\[0\]\['exp_avg'\].*finite"),
    "negative": (lambda d: d["state"][2]["exp_avg_sq"].fill_(-1.0), r"state\[2\]\['exp_avg_sq'\].*negative"),
    "a group too many": (lambda d: d["param_groups"].append({"params": []}), "param_groups must be 1"),
    "a parameter too few": (lambda d: d["param_groups"][0]["params"].pop(), r"param_groups\[0\] must have 6"),
    "a state for no parameter": (lambda d: d["state"].update({17: d["state"].pop(4)}), r"state\[17\]"),
    "betas of three": (lambda d: d["param_groups"][0].update(betas=(0.1, 0.2, 0.3)), "betas must be a pair"),
    "lr below 0": (lambda d: d["param_groups"][0].update(lr=-1.0), "lr must be at least 0"),
    "no params": (lambda d: d["param_groups"][0].pop("params"), r"param_groups\[0\].*'params'"),
    "no state": (lambda d: d.pop("state"), "'state' must be a dict, got NoneType"),
    "groups that are a dict": (lambda d: d.update(param_groups={}), "'param_groups' must be a list"),
    "a state that is a list": (lambda d: d["state"].update({1: [1]}), r"state\[1\] must be a dict, got list"),
    "of SGD": (
        lambda d: d.update(state={i: {"momentum_buffer": torch.ones(1)} for i in d["state"]}),
        r"state\[0\]\['momentum_buffer'\] is no state of this optimizer \(it has step, exp_avg, exp_avg_sq\)",
    ),
    "of RMSprop": (
        lambda d: d.update(state={i: {"step": torch.ones(()), "square_avg": torch.ones(1)} for i in d["state"]}),
        r"state\[0\]\['square_avg'\] is no state of this optimizer",
    ),
    "of Rprop": (
        lambda d: d.update(state={i: {"step": torch.ones(()), "prev": torch.ones(1)} for i in d["state"]}),
        r"state\[0\]\['prev'\] is no state of optim8, torch",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_does_not_fit_is_refused_whole(what: str) -> None:
    theirs_params = make_params()
    theirs = torch.optim.AdamW(theirs_params, **HYPER)
    steps(theirs_params, theirs, 0, 2)
    params = make_params(seed=1)
    optimizer = optim8.AdamW8bit(params, lr=0.5)
    steps(params, optimizer, 5, 6)
    broken = CARRIERS["a copy"](theirs.state_dict())
    change, message = BROKEN[what]
    change(broken)
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match=message) as error:
        optimizer.load_state_dict(broken)
    assert "AdamW8bit.load_state_dict: " in str(error.value)
    assert snapshot(optimizer, params) == before
    steps(params, optimizer, 6, 7)


@pytest.mark.parametrize("what", [None, 3, [], "state.pt"], ids=str)
def test_what_is_no_dict_is_refused(what: Any) -> None:
    with pytest.raises(
        TypeError, match=r"AdamW8bit\.load_state_dict: state_dict must be a dict, .* got " + type(what).__name__
    ):
        optim8.AdamW8bit(make_params()).load_state_dict(what)


def test_adam_is_not_lion() -> None:
    theirs_params = make_params()
    theirs = torch.optim.AdamW(theirs_params, **HYPER)
    steps(theirs_params, theirs, 0, 1)
    optimizer = optim8.Lion8bit(make_params())
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['eps'\] is no option of lion: the dict is of Adam"):
        optimizer.load_state_dict(theirs.state_dict())


def test_a_report_says_what_was_lost() -> None:
    theirs_params = make_params()
    theirs = torch.optim.AdamW(theirs_params)
    steps(theirs_params, theirs, 0, 1)
    optimizer = optim8.AdamW8bit(twins(theirs_params))
    with optim8.convert.report() as report:
        optimizer.load_state_dict(theirs.state_dict())
    rows = {row.name: row for row in report.rows}
    assert len(rows) == 2 * len(theirs_params)
    assert rows["state[2]['exp_avg']"] == optim8.convert.Row("state[2]['exp_avg']", "copied", 0.0, 0.0)
    for moment, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        row = rows[f"state[0]['{moment}']"]
        was = theirs.state[theirs_params[0]][moment]
        code = torch.from_numpy(reference.dynamic_map(signed))
        # Within half the widest gap of the table, times the largest value; of a root, whose square that moves by.
        largest = was.abs().max() if signed else was.max().sqrt()
        half_gap = float(code.diff().max() / 2 * largest)
        limit = half_gap if signed else (float(largest) + half_gap) ** 2 - float(largest) ** 2
        assert 0 < row.max_error <= limit * 1.001
        assert row.how == "quantized"
        assert 0 < row.relative_error < 0.02
    assert "state[0]['exp_avg']" in str(report)
    assert "largest error" in str(report)
    with optim8.convert.report() as unasked:
        pass
    optimizer.load_state_dict(theirs.state_dict())
    assert unasked.rows == []


def test_to_torch_refuses_what_torch_cannot_say() -> None:
    params = make_params()
    optimizer = optim8.AdamW8bit(params)
    steps(params, optimizer, 0, 1)
    with optim8.override(params[1], lr=0.5), pytest.raises(ValueError, match=r"parameter 1 of group 0 .* lr"):
        optim8.convert.to_torch(optimizer)
    with optim8.override(params[1], optim_bits=32):
        assert bits(optim8.convert.to_torch(optimizer)["state"][1]["exp_avg"]) == bits(
            optimizer.state[params[1]]["exp_avg"]
        )
    with pytest.raises(TypeError, match="got AdamW"):
        optim8.convert.to_torch(torch.optim.AdamW(params))  # type: ignore[arg-type]


def test_paged_optimizers_convert_too() -> None:
    """State goes straight to where it lives, and comes back from there."""
    theirs_params = make_params()
    theirs = torch.optim.AdamW(theirs_params, **HYPER)
    steps(theirs_params, theirs, 0, 2)
    params, others = twins(theirs_params), twins(theirs_params)
    paged, plain = optim8.PagedAdamW8bit(params), optim8.AdamW8bit(others)
    for optimizer in (paged, plain):
        optimizer.load_state_dict(theirs.state_dict())
    assert {place.tier for place in paged.placement()} == {"disk"}
    steps(params, paged, 2, 4)
    steps(others, plain, 2, 4)
    assert [bits(p) for p in params] == [bits(p) for p in others]
    written, expected = optim8.convert.to_torch(paged), optim8.convert.to_torch(plain)
    assert written["param_groups"] == expected["param_groups"]
    assert {i: {k: bits(v) for k, v in e.items()} for i, e in written["state"].items()} == {
        i: {k: bits(v) for k, v in e.items()} for i, e in expected["state"].items()
    }


def test_a_rule_that_others_do_not_share_is_not_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new optimizer may have moments of the same names with another meaning."""
    known = {
        **rules.every(),
        "novel": dataclasses.replace(rules.rule("adamw"), name="novel", family="novel", torch_name=None),
    }
    monkeypatch.setattr(rules, "every", lambda: known)
    monkeypatch.setattr(_native.cpu(), "conflict", lambda rule, group: None)  # the compiled table has no such rule
    monkeypatch.setattr(rules, "variant", lambda family, options: known[family])

    class Novel(optim8.AdamW8bit):
        rule = "novel"

    theirs_params = make_params()
    theirs = torch.optim.AdamW(theirs_params)
    steps(theirs_params, theirs, 0, 1)
    optimizer = Novel(twins(theirs_params))
    with pytest.raises(
        ValueError, match=r"Novel\.load_state_dict: novel cannot be converted for torch.*; .*adamw.* can"
    ):
        optimizer.load_state_dict(theirs.state_dict())
    optimizer.load_state_dict(optimizer.state_dict())
    for write, library in ((optim8.convert.to_torch, "torch"), (optim8.convert.to_bitsandbytes, "bitsandbytes")):
        with pytest.raises(ValueError, match=rf"novel cannot be converted for {library}.*; .*adamw.* can"):
            write(optimizer)


def test_amsgrad_can_be_dropped() -> None:
    theirs_params = make_params()
    theirs = torch.optim.AdamW(theirs_params, amsgrad=True)
    steps(theirs_params, theirs, 0, 1)
    optimizer = optim8.AdamW8bit(twins(theirs_params))
    state_dict = CARRIERS["a copy"](theirs.state_dict())
    for entry in state_dict["state"].values():
        del entry["max_exp_avg_sq"]
    for group in state_dict["param_groups"]:
        group["amsgrad"] = False
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["amsgrad"] is False


@pytest.mark.parametrize("optim_bits", [8, 16, 32])
@pytest.mark.parametrize("name", PAIRS)
def test_amsgrad_comes_along_both_ways(name: str, optim_bits: int) -> None:
    case = dataclasses.replace(
        CASES[name],
        states={**CASES[name].states, "max_exp_avg_sq": False},
        roots=CASES[name].roots | {"max_exp_avg_sq"},
        only_with={},
    )
    theirs_params = make_params()
    theirs = PAIRS[name](theirs_params, **HYPER, amsgrad=True, foreach=False)
    steps(theirs_params, theirs, 0, 3)
    params, others = twins(theirs_params), twins(theirs_params)
    optimizer = ours(name, params, optim_bits=optim_bits)
    optimizer.load_state_dict(CARRIERS["torch.save"](theirs.state_dict()))
    assert optimizer.param_groups[0]["amsgrad"] is True
    for p, q in zip(params, theirs_params, strict=True):
        assert_holds(optimizer, case, p, theirs.state[q])
    back = PAIRS[name](others, lr=0.5, foreach=False)
    back.load_state_dict(optim8.convert.to_torch(optimizer))
    assert [entry.keys() for entry in back.state.values()] == [entry.keys() for entry in theirs.state.values()]
    assert_same_step(others, back, params, optimizer, 3)
