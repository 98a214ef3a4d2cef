"""Every optimizer that torch.optim has too: its dicts load here, ours load there, and both go on as if nothing had
been. Dicts of another rule are refused."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from cases import CASES, EVERY, Case
from support.convert_harness import (
    CARRIERS,
    WITH_TORCH,
    assert_holds,
    assert_same_step,
    make_params,
    of_torch,
    ours,
    steps,
    twins,
)
from support.harness import bits, snapshot

import optim8
from optim8 import rules
from optim8.checkpoint.formats import groups, torch_optim

ROWS = [(case, row) for case in WITH_TORCH for row in range(len(case.hypers))]
each_row = pytest.mark.parametrize("case, row", ROWS, ids=lambda value: str(value))
SCALARS = ("step", *dict.fromkeys(name for case in EVERY for name in case.running))


def kept(hyper: Mapping[str, Any]) -> dict[str, Any]:
    """Hyper-parameters as groups keep them."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in hyper.items()}


@pytest.mark.parametrize("optim_bits", [8, 16, 32])
@each_row
def test_their_dict_loads_here(case: Case, row: int, optim_bits: int) -> None:
    hyper = case.hypers[row]
    theirs_params = make_params()
    theirs = of_torch(case, theirs_params, hyper)
    steps(theirs_params, theirs, 0, 3)
    params = twins(theirs_params)
    optimizer = ours(case.name, params, optim_bits=optim_bits)
    optimizer.load_state_dict(CARRIERS["torch.save"](theirs.state_dict()))
    written = theirs.param_groups[0]
    for name in hyper.keys() & written.keys():
        assert optimizer.param_groups[0][name] == written[name], name
    assert [optimizer.precision(p) for p in params] == [
        f"{optim_bits}bit" if p.numel() >= 4096 else "32bit" for p in params
    ]
    for p, q in zip(params, theirs_params, strict=True):
        for name in theirs.state[q].keys() & SCALARS:
            assert float(optimizer.state[p][name]) == float(theirs.state[q][name])
        assert_holds(optimizer, case, p, theirs.state[q])
    if optim_bits == 32:
        for t in (3, 4):
            assert_same_step(params, optimizer, theirs_params, theirs, t)
    else:
        steps(params, optimizer, 3, 4)


@pytest.mark.parametrize("optim_bits", [8, 16, 32])
@each_row
def test_our_dict_loads_there_and_steps(case: Case, row: int, optim_bits: int) -> None:
    hyper = dict(case.hypers[row])
    fresh = of_torch(case, make_params(), hyper)
    if "maximize" not in fresh.param_groups[0]:
        hyper.pop("maximize", None)
    params = make_params()
    optimizer = ours(case.name, params, **hyper, optim_bits=optim_bits)
    steps(params, optimizer, 0, 3)
    before = snapshot(optimizer, params)
    with optim8.convert.report() as report:
        written = CARRIERS["torch.save"](optim8.convert.to_torch(optimizer))
    assert {row.how for row in report.rows} <= ({"copied"} if optim_bits == 32 else {"copied", "widened"})
    assert all(row.max_error == row.relative_error == 0 for row in report.rows)
    assert snapshot(optimizer, params) == before
    others = twins(params)
    theirs = of_torch(case, others, {"lr": 0.5})
    theirs.load_state_dict(written)
    group = theirs.param_groups[0]
    assert {name: group[name] for name in kept(hyper)} == kept(hyper)
    # Versions of torch that do not know this option yet keep it as it is.
    assert group.keys() == fresh.param_groups[0].keys() | ({"decoupled_weight_decay"} & group.keys())
    steps(fresh.param_groups[0]["params"], fresh, 0, 1)
    assert [s.keys() for s in theirs.state.values()] == [s.keys() for s in fresh.state.values()]
    again = ours(case.name, twins(params), optim_bits=optim_bits)
    again.load_state_dict(theirs.state_dict())
    for p, q in zip(again.param_groups[0]["params"], others, strict=True):
        assert_holds(again, case, p, theirs.state[q])
    for t in (3, 4) if optim_bits == 32 else (3,):
        assert_same_step(others, theirs, params, optimizer, t)


@pytest.mark.parametrize("case", WITH_TORCH, ids=str)
def test_a_dict_without_steps(case: Case) -> None:
    """The options come along, and the first steps are the same in both directions; the sums of Adagrad are there."""
    hyper = {name: value for name, value in case.hypers[0].items() if name != "maximize"}
    theirs_params = make_params()
    theirs = of_torch(case, theirs_params, hyper)
    params, others, anew = (twins(theirs_params) for _ in range(3))
    optimizer = ours(case.name, params, optim_bits=32)
    optimizer.load_state_dict(copy.deepcopy(theirs.state_dict()))
    back = of_torch(case, others, {})
    back.load_state_dict(optim8.convert.to_torch(ours(case.name, twins(params), **hyper)))
    assert [len(entry) for entry in theirs.state.values()] == [len(entry) for entry in back.state.values()]
    assert_same_step(params, optimizer, theirs_params, theirs, 0)
    assert_same_step(others, back, anew, of_torch(case, anew, hyper), 0)


# Their class, and the classes here that may load it: the rule is the same, or weight decay is 0.
RELATIVES = {"Adam": {"Adam8bit", "AdamW8bit"}}
THEIRS = [
    name
    for name, thing in vars(torch.optim).items()
    if isinstance(thing, type) and issubclass(thing, torch.optim.Optimizer) and name not in ("Optimizer", "LBFGS")
]


def state_of(name: str) -> dict[str, Any]:
    """The dict of an optimizer of torch.optim after two steps with its defaults, of a matrix."""
    p = torch.nn.Parameter(torch.linspace(-1, 1, 4900).view(70, 70))
    options = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(torch.optim, name)([p], lr=0.1, **options)
    for _ in range(2):
        p.grad = torch.linspace(1, -2, 4900).view(70, 70)
        if name == "SparseAdam":
            p.grad = p.grad.to_sparse()
        optimizer.step()
    return copy.deepcopy(optimizer.state_dict())  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", EVERY, ids=str)
@pytest.mark.parametrize("name", THEIRS)
def test_only_the_namesake_loads(name: str, case: Case) -> None:
    p = torch.nn.Parameter(torch.ones(70, 70))
    optimizer = ours(case.name, [p], lr=0.5)
    p.grad = torch.ones(70, 70)
    optimizer.step()
    before, saved = snapshot(optimizer, [p]), state_of(name)
    if case.name in RELATIVES.get(name, {f"{name}8bit"}):
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["lr"] == 0.1
        return
    named = r"\['\w+'\] (is|must)" if rules.rule(case.cls.rule).torch_name else "cannot be converted|\\['\\w+'\\] is"
    with pytest.raises(ValueError, match=rf"{case.name}\.load_state_dict: .*({named})"):
        optimizer.load_state_dict(saved)
    assert snapshot(optimizer, [p]) == before


@pytest.mark.parametrize(
    "name, here, key",
    [
        ("RAdam", "Adam8bit", "amsgrad"),
        ("NAdam", "AdamW8bit", "amsgrad|momentum_decay"),
        ("Adam", "RAdam8bit", "amsgrad"),
        ("Adam", "NAdam8bit", "amsgrad|momentum_decay"),
        ("NAdam", "RAdam8bit", "momentum_decay"),
        ("RAdam", "NAdam8bit", "momentum_decay"),
        ("Adamax", "RAdam8bit", "decoupled_weight_decay"),
        ("SGD", "RMSprop8bit", "alpha"),
        ("AdamW", "Lion8bit", "eps"),
        ("Adadelta", "RMSprop8bit", "alpha"),
    ],
)
def test_the_key_that_tells_them_apart_is_named(name: str, here: str, key: str) -> None:
    with pytest.raises(ValueError, match=rf"param_groups\[0\]\['({key})'\]"):
        ours(here, [torch.nn.Parameter(torch.ones(70, 70))]).load_state_dict(state_of(name))


@pytest.mark.parametrize("other", EVERY, ids=str)
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_our_own_dicts_are_told_apart(case: Case, other: Case) -> None:
    """Only Adam's from AdamW's are not: the same states, and the same options."""

    def stepped(cls: Any, hyper: Mapping[str, Any]) -> Any:
        p = torch.nn.Parameter(torch.linspace(-1, 1, 4900).view(70, 70))
        optimizer = cls([p], **hyper)
        p.grad = torch.linspace(1, -2, 4900).view(70, 70)
        optimizer.step()
        return optimizer

    saved = stepped(case.cls, case.hypers[0]).state_dict()
    optimizer = stepped(other.cls, {})
    if case is other or {case.name, other.name} == {"Adam8bit", "AdamW8bit"}:
        optimizer.load_state_dict(saved)
        return
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=rf"{other.name}\.load_state_dict: .*\['\w+'\] (is|must)"):
        optimizer.load_state_dict(saved)
    assert snapshot(optimizer) == before


def test_a_note_named_as_an_option_of_another_optimizer_is_a_note() -> None:
    """As the `rho` that SAM writes into the groups of the optimizer that it wraps."""
    for name in ("AdamW", "SGD", "RMSprop"):
        saved = state_of(name)
        saved["param_groups"][0].update(rho=0.05, adaptive=False)
        optimizer = ours(f"{name}8bit", [torch.nn.Parameter(torch.ones(70, 70))])
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["rho"] == 0.05


@pytest.mark.parametrize("initial", [0.0, 0.25])
def test_the_sums_of_adagrad_before_the_first_step(initial: float) -> None:
    """torch makes them with the optimizer, and its load_state_dict needs them."""
    params = make_params()
    theirs = torch.optim.Adagrad(twins(params), initial_accumulator_value=initial)
    optimizer = optim8.Adagrad8bit(params, initial_accumulator_value=initial)
    written = optim8.convert.to_torch(optimizer)["state"]
    expected = theirs.state_dict()["state"]
    assert written.keys() == expected.keys()
    for key, entry in expected.items():
        assert {name: bits(value) for name, value in entry.items()} == {n: bits(v) for n, v in written[key].items()}
        assert all(value.stride() == written[key][name].stride() for name, value in entry.items())
    assert not any(optimizer.state.values())
    optimizer.load_state_dict(theirs.state_dict())
    for p, q in zip(params, theirs.param_groups[0]["params"], strict=True):
        assert float(optimizer.state[p]["step"]) == 0
        assert_holds(optimizer, CASES["Adagrad8bit"], p, theirs.state[q])


@pytest.mark.parametrize("key, options", [("momentum_buffer", {"momentum": 0.9}), ("grad_avg", {"centered": True})])
def test_a_state_that_the_group_asks_for_must_be_there(key: str, options: dict[str, Any]) -> None:
    saved = state_of("RMSprop")
    saved["param_groups"][0].update(options)
    with pytest.raises(ValueError, match=rf"state\[0\]\['{key}'\] must be .*, got nothing"):
        optim8.RMSprop8bit([torch.nn.Parameter(torch.ones(70, 70))]).load_state_dict(saved)


@pytest.mark.parametrize("value", [None, "0.9", -1.0])
def test_the_scalar_of_nadam_must_be_there(value: Any) -> None:
    saved = state_of("NAdam")
    saved["state"][0].update(mu_product=value)
    if value is None:
        del saved["state"][0]["mu_product"]
    with pytest.raises(ValueError, match=r"state\[0\]\['mu_product'\] must be"):
        optim8.NAdam8bit([torch.nn.Parameter(torch.ones(70, 70))]).load_state_dict(saved)


@pytest.mark.parametrize("case", WITH_TORCH, ids=str)
def test_the_options_are_those_that_torch_writes(case: Case) -> None:
    """What tells the dicts of optimizers apart: a class of torch that gets a further option must be looked at."""
    written = of_torch(case, make_params(), {}).param_groups[0].keys()
    run = {"maximize", "params", *torch_optim.WAYS_TO_RUN}
    added = {"decoupled_weight_decay"} if case.name in ("Adam8bit", "AdamW8bit") else set()
    assert written - run - added == set(torch_optim.written(case.cls.rule))


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_where_weight_decay_goes_is_known(case: Case) -> None:
    hyper = {"decoupled_weight_decay": False}
    assert groups.adds_decay(case.cls.rule, hyper) == case.decay_in_gradient


def test_both_ends_name_every_rule() -> None:
    """A message about a rule that cannot be converted lists those that can, each once."""
    names = {rule.family for rule in rules.every().values() if rule.torch_name} | {"lion"}
    with pytest.raises(ValueError, match="cannot be converted for torch") as error:
        optim8.convert.to_torch(optim8.AdEMAMix8bit([torch.nn.Parameter(torch.ones(3))]))
    listed = re.search(r"lion-pytorch; ([\w, ]+) can", str(error.value))
    assert listed
    assert sorted(listed[1].split(", ")) == sorted(names)
