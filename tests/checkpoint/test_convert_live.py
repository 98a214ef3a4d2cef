"""from_torch: an optimizer of torch.optim goes on here in the middle of a run, and its scheduler with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, Case
from support.convert_harness import WITH_TORCH, assert_holds, assert_same_step, make_params, of_torch, steps, twins
from support.harness import snapshot
from torch.optim import lr_scheduler

import optim8


def in_groups(case: Case, params: list[torch.nn.Parameter], **more: Any) -> torch.optim.Optimizer:
    """Two named groups with options and notes of their own."""
    hyper = {**case.hypers[0], "maximize": False}
    groups = [
        {"params": [(f"first.{i}", p) for i, p in enumerate(params[:1])], "tag": "first"},
        {"params": [(f"second.{i}", p) for i, p in enumerate(params[1:])], "lr": 0.02, "weight_decay": 0.0},
    ]
    return of_torch(case, groups[: 1 + (len(params) > 1)], hyper, **more)


@pytest.mark.parametrize("optim_bits", [8, 16, 32])
@pytest.mark.parametrize("case", WITH_TORCH, ids=str)
def test_it_goes_on_with_all_that_it_had(case: Case, optim_bits: int) -> None:
    theirs_params = make_params()
    theirs = in_groups(case, theirs_params)
    steps(theirs_params, theirs, 0, 3)
    for group in theirs.param_groups:
        group["initial_lr"] = 0.5
    before = snapshot(theirs, theirs_params)
    optimizer = optim8.from_torch(theirs, optim_bits=optim_bits, min_8bit_size=1, rounding="nearest")
    assert snapshot(theirs, theirs_params) == before
    assert type(optimizer) is case.cls
    for ours, was in zip(optimizer.param_groups, theirs.param_groups, strict=True):
        assert {name: ours[name] for name in was if name != "decoupled_weight_decay" or name in ours} == {
            name: value for name, value in was.items() if name != "decoupled_weight_decay" or name in ours
        }
        assert all(p is q for p, q in zip(ours["params"], was["params"], strict=True))
        assert (ours["optim_bits"], ours["min_8bit_size"], ours["rounding"]) == (optim_bits, 1, "nearest")
    for p in theirs_params:
        assert optimizer.precision(p) == (f"{optim_bits}bit" if p.numel() else "32bit")
        assert_holds(optimizer, case, p, theirs.state[p])
    memory = {t.data_ptr() for e in theirs.state.values() for t in e.values() if t.numel()}
    assert not memory & {t.data_ptr() for e in optimizer.state.values() for t in e.values() if t.numel()}
    if optim_bits == 32:
        others = twins(theirs_params)
        twin = in_groups(case, others)
        twin.load_state_dict(theirs.state_dict())
        for t in (3, 4):
            assert_same_step(theirs_params, optimizer, others, twin, t)
    optimizer.add_param_group({"params": [("added", torch.nn.Parameter(torch.ones(3, 3)))]})
    added, defaults = optimizer.param_groups[-1], theirs.defaults
    assert {name: added[name] for name in case.hypers[0]} == {
        name: defaults.get(name, added[name]) for name in case.hypers[0]
    }


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda t: 0.7**t),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=12),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 8),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, total_iters=4), lr_scheduler.CosineAnnealingLR(optimizer, 8)],
        milestones=[4],
    ),
}


def move(scheduler: Any, optimizer: Any) -> None:
    """As the docstring of from_torch says."""
    scheduler.optimizer = optimizer
    for each in getattr(scheduler, "_schedulers", ()):
        each.optimizer = optimizer


@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05)], ids=["a number", "a tensor"])
@pytest.mark.parametrize("how", ["moved", "anew"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", ["SGD8bit", "AdamW8bit", "NAdam8bit"])
def test_schedulers_go_on(name: str, scheduler: str, how: str, lr: Any) -> None:
    """Learning rates, momenta and betas are those of a run that stayed with torch."""
    case, make = CASES[name], SCHEDULERS[scheduler]
    runs: list[tuple[Any, Any, Any]] = []
    for _ in range(2):
        params = make_params()
        optimizer = of_torch(case, params, {**case.hypers[0], "lr": lr.clone() if isinstance(lr, torch.Tensor) else lr})
        runs.append((params, optimizer, make(optimizer)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="The epoch parameter in `scheduler.step", category=UserWarning)
        if scheduler == "SequentialLR" and how == "moved":  # its second one has not stepped yet
            warnings.filterwarnings("ignore", message="Seems like `optimizer.step\\(\\)` has been overridden")
        for params, optimizer, schedule in runs:
            for t in range(3):
                steps(params, optimizer, t, t + 1)
                schedule.step()
        (others, stayed, stayed_schedule), (params, theirs, schedule) = runs
        optimizer = optim8.from_torch(theirs, optim_bits=32)
        if how == "moved":
            move(schedule, optimizer)
        else:
            was, schedule = schedule.state_dict(), make(optimizer)
            schedule.load_state_dict(was)
            optimizer.load_state_dict(theirs.state_dict())
        for t in range(3, 10):
            for key in stayed.param_groups[0].keys() & {"lr", "betas", "momentum"}:
                assert optimizer.param_groups[0][key] == stayed.param_groups[0][key], (t, key)
            assert_same_step(params, optimizer, others, stayed, t)
            for p, q in zip(params, others, strict=True):
                p.data.copy_(q)
            for each in (schedule, stayed_schedule):
                each.step()


@pytest.mark.parametrize("name", ["Adagrad", "Adadelta"])
def test_a_scheduler_that_needs_a_momentum_says_so_as_for_torch(name: str) -> None:
    theirs = getattr(torch.optim, name)([torch.nn.Parameter(torch.ones(3))])
    for optimizer in (theirs, optim8.from_torch(theirs)):
        with pytest.raises(ValueError, match="momentum"):
            SCHEDULERS["OneCycleLR"](optimizer)


def test_a_tensor_lr_becomes_a_copy() -> None:
    """Else a scheduler of the one would move the other."""
    lr = torch.tensor(0.05)
    optimizer = optim8.from_torch(torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))], lr=lr, foreach=False))
    ours = optimizer.param_groups[0]["lr"]
    assert torch.equal(ours, lr)
    assert ours.data_ptr() != lr.data_ptr()


@pytest.mark.parametrize("fused", [True, False])
def test_how_it_runs_comes_along_unless_told(fused: bool) -> None:
    theirs = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))], fused=fused)
    assert optim8.from_torch(theirs).param_groups[0]["fused"] is fused
    told = optim8.from_torch(theirs, fused=not fused)
    assert told.param_groups[0]["fused"] is not fused
    assert told._step_supports_amp_scaling is not fused


def test_it_can_be_paged() -> None:
    params = make_params()
    theirs = torch.optim.AdamW(params)
    steps(params, theirs, 0, 2)
    optimizer = optim8.from_torch(theirs, paged=True)
    assert {place.tier for place in optimizer.placement()} == {"disk"}
    for p in params:
        assert_holds(optimizer, CASES["AdamW8bit"], p, theirs.state[p])


class OfSomebody(torch.optim.AdamW):
    """It may step otherwise."""


class Lion(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-3})


class Mystery(Lion):
    """Nobody knows how it steps."""


@pytest.mark.parametrize(
    "cls, nearest",
    [
        (torch.optim.SparseAdam, r"torch\.optim\.\w*\.SparseAdam\. .* optim8\.Adam8bit, which needs dense gradients"),
        (torch.optim.LBFGS, r"optim8\.SGD8bit"),
        (torch.optim.Rprop, r"optim8\.RMSprop8bit"),
        (torch.optim.ASGD, r"optim8\.SGD8bit, which does not average"),
        (torch.optim.Adafactor, r"optim8\.AdamW8bit"),
        (OfSomebody, r"OfSomebody\. .* optim8\.AdamW8bit, if it steps in the same way"),
        (Lion, r"optim8\.Lion8bit, if"),
        (Mystery, r"optim8\.AdamW8bit, if"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_without_a_counterpart_the_nearest_is_named(cls: Any, nearest: str) -> None:
    with pytest.raises(TypeError, match=rf"from_torch: optimizer must be torch\.optim's .*{nearest}"):
        optim8.from_torch(cls([torch.nn.Parameter(torch.ones(3))]))


@pytest.mark.parametrize("what", [None, "AdamW", torch.optim.AdamW])
def test_what_is_no_optimizer_is_refused(what: Any) -> None:
    with pytest.raises(TypeError, match=r"from_torch: optimizer must be one of torch\.optim, got"):
        optim8.from_torch(what)


def test_ours_is_refused() -> None:
    with pytest.raises(TypeError, match=r"must be one of torch\.optim, got AdamW8bit"):
        optim8.from_torch(optim8.AdamW8bit([torch.nn.Parameter(torch.ones(3))]))


@pytest.mark.parametrize(
    "options, message",
    [({"lr": 0.1}, "got 'lr'"), ({"optimbits": 8}, "got 'optimbits'. Did you mean 'optim_bits'")],
)
def test_other_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"from_torch: options must be of .*{message}"):
        optim8.from_torch(torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))]), **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"differentiable": True}, "differentiable=True is not supported"),
        (
            {"decoupled_weight_decay": True, "weight_decay": 0.1},
            r"param_groups\[0\]\['decoupled_weight_decay'\] is True",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim8.from_torch(torch.optim.Adam([torch.nn.Parameter(torch.ones(3))], **options))
