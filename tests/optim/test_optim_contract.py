"""What torch.optim promises: signature, state, groups, learning rates, schedulers, closures."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from cases import EVERY, Case
from support.harness import (
    ALL,
    assert_step,
    before_step,
    bits,
    hostile,
    parameter,
    small_set,
    state_bits,
    values,
)
from support.pairs import pairwise
from torch.optim import lr_scheduler

BOTH = pytest.mark.parametrize("optim_bits", [8, 16, 32])


@ALL
def test_signature_and_defaults(case: Case) -> None:
    ours = {k: v for k, v in inspect.signature(case.cls).parameters.items() if k != "kwargs"}
    if case.torch_class is not None:
        theirs = inspect.signature(case.torch_class).parameters
        for name, parameter_ in theirs.items():
            if name == "decoupled_weight_decay" and name not in ours:  # torch's way to make AdamW of Adam
                continue
            assert ours[name].default == parameter_.default, name
            assert ours[name].kind == parameter_.kind, name
    for name, default in case.defaults.items():
        assert ours[name].default == default, name
    assert ours["min_8bit_size"].default == 4096
    assert ours["optim_bits"].default == 8
    assert ours["min_8bit_size"].kind == ours["optim_bits"].kind == inspect.Parameter.KEYWORD_ONLY
    group = case.cls([parameter(torch.ones(1, 1))]).param_groups[0]
    for name, parameter_ in ours.items():
        if name not in ("params", "paged"):
            assert group[name] == parameter_.default, name


@ALL
def test_state_is_plain_tensors_under_the_documented_names(case: Case, device: torch.device) -> None:
    p = parameter(torch.ones(10, 60, device=device), torch.ones(10, 60, device=device))
    for optim_bits in (8, 32):
        optimizer = case.make([p], optim_bits=optim_bits)
        assert len(optimizer.state) == 0
        optimizer.step()
        state = optimizer.state_dict()["state"][0]
        codes = {name: case.codes(name) if optim_bits == 8 else name for name in case.states}
        absmax = {case.absmax(name) for name in case.states} if optim_bits == 8 else set()
        low = {case.low(name) for name in case.states if optim_bits == 8 and case.is_wide(name, case.hypers[0])}
        assert set(state) == {"step", *case.running, *codes.values(), *low, *absmax}
        assert all(type(value) is torch.Tensor for value in state.values())
        assert (state["step"].dtype, state["step"].shape, state["step"].item()) == (torch.float32, (), 1.0)
        for name in case.states:
            assert state[codes[name]].shape == p.shape
            assert state[codes[name]].dtype == (torch.uint8 if optim_bits == 8 else torch.float32)
            if optim_bits == 8:
                assert (state[case.absmax(name)].shape, state[case.absmax(name)].dtype) == (
                    (3,),
                    torch.float32,
                )


@BOTH
@ALL
def test_groups_are_independent(case: Case, optim_bits: int, device: torch.device) -> None:
    """Each parameter of a multi-group optimizer ends as in an optimizer of its own with its group's options."""
    datas = [hostile(600, torch.float32, seed=i, small=-2, large=0).to(device) for i in range(4)]
    options: list[dict[str, Any]] = [
        dict(case.hypers[0]),
        dict(case.hypers[1]),
        {**case.hypers[2], "min_8bit_size": 601},
        {**case.hypers[0], "lr": 0.5, "optim_bits": 8 if optim_bits == 32 else 32},
    ]
    grouped = [parameter(d.clone()) for d in datas]
    groups = [{"params": [p], **o} for p, o in zip(grouped, options, strict=True)]
    optimizer = case.make(groups[:3], optim_bits=optim_bits)
    alone = [parameter(d.clone()) for d in datas]
    own = [
        case.with_defaults([p], **{"min_8bit_size": 0, "optim_bits": optim_bits, **o})
        for p, o in zip(alone, options, strict=True)
    ]
    for t in range(4):
        for i in range(4):
            for p in (grouped[i], alone[i]):
                p.grad = hostile(600, torch.float32, seed=10 * t + i).to(device)
        if t == 1:
            optimizer.add_param_group(groups[3])
        optimizer.step()
        for i in range(3 if t == 0 else 4):
            own[i].step()
    own_bits = f"{optim_bits}bit"
    expected = [own_bits, own_bits, "32bit", "8bit" if optim_bits == 32 else "32bit"]
    assert [optimizer.precision(p) for p in grouped] == expected
    for i in range(4):
        assert bits(grouped[i]) == bits(alone[i]), i
        assert state_bits(optimizer, grouped[i]) == state_bits(own[i], alone[i]), i


@ALL
def test_named_parameters(case: Case, device: torch.device) -> None:
    model = torch.nn.Linear(8, 4).to(device)
    twin = copy.deepcopy(model)
    ours, plain = case.make(model.named_parameters()), case.make(twin.parameters())
    assert ours.param_groups[0]["param_names"] == ["weight", "bias"]
    for m, optimizer in ((model, ours), (twin, plain)):
        m(torch.ones(2, 8, device=device)).sum().backward()
        optimizer.step()
    assert all(bits(a) == bits(b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@ALL
def test_lr_as_a_tensor(case: Case, device: torch.device) -> None:
    ends = []
    for lr in (0.0123, torch.tensor(0.0123, dtype=torch.float64), torch.tensor([0.0123], dtype=torch.float64)):
        params, optimizer = small_set(case, device, lr=lr)
        optimizer.step()
        optimizer.step()
        ends.append([bits(p) for p in params])
    assert ends[0] == ends[1] == ends[2]
    lr = torch.tensor(0.5)
    params, optimizer = small_set(case, device, lr=lr)
    lr.fill_(0.0)
    before = [bits(p) for p in params]
    optimizer.step()
    assert [bits(p) for p in params] == before, "the tensor is read at each step, not once"


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3], 0.1),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (t + 1)),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 3),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8),  # also moves the betas, or the momentum
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-1, 2, cycle_momentum=False),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.5)], [2]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


@pairwise(case=EVERY, kind=SCHEDULERS, lr_is_a_tensor=[False, True])
def test_schedulers(case: Case, kind: str, lr_is_a_tensor: bool, device: torch.device) -> None:
    """Every step uses what the scheduler has put into the group."""
    n, hyper = 300, dict(case.hypers[0])
    p = parameter(hostile(n, torch.float32, seed=1, small=-2, large=0).to(device))
    optimizer = case.make([p], {**hyper, "lr": torch.tensor(hyper["lr"]) if lr_is_a_tensor else hyper["lr"]})
    if kind == "OneCycleLR" and hyper.keys().isdisjoint({"betas", "momentum"}):
        with pytest.raises(ValueError, match="momentum"):  # as with torch's
            SCHEDULERS[kind](optimizer)
        return
    scheduler = SCHEDULERS[kind](optimizer)
    seen = []
    for t in range(1, 6):
        p.grad = hostile(n, torch.float32, seed=t).to(device)
        group = optimizer.param_groups[0]
        now = {key: group[key] for key in hyper}
        now["lr"] = float(now["lr"])
        seen.append(tuple(now.values()))
        before = before_step(optimizer, case, p)
        optimizer.step()
        assert_step(optimizer, case, p, before, now, t)
        scheduler.step(*([1.0] if kind == "ReduceLROnPlateau" else []))
    assert len(set(seen)) > 1


@ALL
def test_closure(case: Case, device: torch.device) -> None:
    params, optimizer = small_set(case, device)
    twins, plain = small_set(case, device)
    calls = []

    def closure() -> torch.Tensor:
        assert torch.is_grad_enabled()
        calls.append(1)
        optimizer.zero_grad()
        loss = sum(((p - 1) ** 2).sum() for p in params)
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert len(calls) == 1
    assert loss.item() == pytest.approx(sum(((values(p) - 1) ** 2).sum() for p in twins))
    for p in twins:
        p.grad = 2 * (p.detach() - 1)
    assert plain.step() is None
    assert [bits(p) for p in params] == [bits(p) for p in twins]
