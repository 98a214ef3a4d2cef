"""What torch's own suite holds every optimizer to, for each of ours in both precisions: direction, groups, hooks, state
dicts, copies, and what is refused. test_optim_contract.py has signatures and schedulers one by one."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import EVERY, Case
from support.harness import ALL, bits, parameter, snapshot
from support.pairs import pairwise
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

BOTH = pytest.mark.parametrize("optim_bits", [8, 16, 32])
LAYOUTS = ["contiguous", "transposed", "columns of more", "every other"]


def _laid_out(values: torch.Tensor, layout: str) -> torch.nn.Parameter:
    """A leaf of the same values in this layout."""
    rows, columns = values.shape
    view = {
        "contiguous": lambda: torch.empty(rows, columns),
        "transposed": lambda: torch.empty(columns, rows).T,
        "columns of more": lambda: torch.empty(rows, 3 * columns)[:, columns : 2 * columns],
        "every other": lambda: torch.empty(2 * rows, 2 * columns)[::2, ::2],
    }[layout]().to(values.device)
    return torch.nn.Parameter(view.copy_(values))


class Line:
    """A linear model in the layout, its data, and the loss of the present values."""

    def __init__(self, device: torch.device, layout: str = "contiguous") -> None:
        generator = torch.Generator().manual_seed(3)
        self.weight = _laid_out(torch.randn(24, 30, generator=generator).to(device), layout)
        self.bias = _laid_out(torch.randn(24, 1, generator=generator).to(device), layout)
        self.data = torch.randn(30, 7, generator=generator).to(device)
        self.params = [self.weight, self.bias]

    def loss(self) -> torch.Tensor:
        return (self.weight @ self.data + self.bias).square().mean()

    def train(self, optimizer: Any, steps: int, after: Callable[[], Any] = lambda: None) -> float:
        for _ in range(steps):
            optimizer.zero_grad()
            self.loss().backward()
            optimizer.step()
            after()
        return self.loss().item()


DOWN: dict[str, Callable[[Any], list[Any]]] = {
    "none": lambda o: [],
    "StepLR": lambda o: [lr_scheduler.StepLR(o, 4, 0.9)],
    "warm-up and decay at once": lambda o: [lr_scheduler.LinearLR(o, 0.4, 1, 4), lr_scheduler.ExponentialLR(o, 0.99)],
}


@pairwise(case=EVERY, schedule=DOWN, layout=LAYOUTS, optim_bits=[8, 16, 32])
def test_it_goes_the_right_way(case: Case, optim_bits: int, layout: str, schedule: str, device: torch.device) -> None:
    for maximize, tensor_lr in ((False, False), (True, True)):
        line = Line(device, layout)
        before = line.loss().item()
        lr = torch.tensor(0.01 * case.rate) if tensor_lr else 0.01 * case.rate
        optimizer = case.make(line.params, {"lr": lr}, optim_bits=optim_bits, maximize=maximize)
        schedulers = DOWN[schedule](optimizer)
        after = line.train(optimizer, 12, lambda them=schedulers: [each.step() for each in them])
        assert (after > 1.05 * before) if maximize else (after < 0.95 * before)


@BOTH
@ALL
def test_a_step_without_any_gradient_changes_nothing(case: Case, optim_bits: int, device: torch.device) -> None:
    """Not even by weight decay, and not after steps with gradients either."""
    line = Line(device)
    optimizer = case.make(line.params, {**case.hypers[0], "weight_decay": 0.5}, optim_bits=optim_bits)
    before = [bits(p) for p in line.params]
    assert optimizer.step() is None
    assert [bits(p) for p in line.params] == before
    assert not any(optimizer.state.values())
    line.train(optimizer, 2)
    optimizer.zero_grad()
    assert all(p.grad is None for p in line.params)
    at_rest = snapshot(optimizer, line.params)
    optimizer.step()
    assert snapshot(optimizer, line.params) == at_rest


@BOTH
@ALL
def test_zero_gradients_from_the_start_change_nothing(case: Case, optim_bits: int, device: torch.device) -> None:
    line = Line(device)
    before = [bits(p) for p in line.params]
    optimizer = case.make(line.params, {"lr": 0.1, "weight_decay": 0.0}, optim_bits=optim_bits)
    for _ in range(3):
        for p in line.params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in line.params)
    assert [bits(p) for p in line.params] == before


@BOTH
@ALL
def test_options_of_a_group_are_of_that_group(case: Case, optim_bits: int, device: torch.device) -> None:
    """The group with weight decay ends smaller; the one with lr=0 does not move; what a group lacks is the default."""
    start, lr = torch.full((24, 30), 2.0, device=device), 1e-2 * case.rate
    decayed, plain, still = (parameter(start.clone()) for _ in range(3))
    groups = [
        {"params": decayed, "weight_decay": 0.9},
        {"params": [plain]},
        {"params": iter([still]), "lr": 0.0},
    ]
    optimizer = case.make(groups, {"lr": lr, "weight_decay": 0.0}, optim_bits=optim_bits)
    for t in range(8):
        for p in (decayed, plain, still):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t)).to(device)
        optimizer.step()
    assert decayed.mean() < plain.mean() - 0.01
    assert torch.equal(still, start)
    assert [(g["weight_decay"], g["lr"]) for g in optimizer.param_groups] == [(0.9, lr), (0.0, lr), (0.0, 0.0)]
    assert set(optimizer.defaults) <= set(optimizer.param_groups[1])


def _named() -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    return parameter(torch.ones(2, 3)), parameter(torch.ones(3))


REFUSED: dict[str, tuple[Callable[[Any, Any], Any], type[Exception], str]] = {
    "a parameter by itself": (lambda p, q: p, TypeError, "iterable of Tensors or dicts"),
    "a set in a group": (lambda p, q: [{"params": {p, q}}], TypeError, "ordered|set"),
    "no parameters": (lambda p, q: [], ValueError, "empty parameter list"),
    "a generator that is used up": (lambda p, q: iter(()), ValueError, "empty parameter list"),
    "an array": (lambda p, q: [p, p.detach().numpy()], TypeError, "can only optimize Tensors"),
    "a number": (lambda p, q: [p, 3.0], TypeError, "can only optimize Tensors"),
    "None": (lambda p, q: [p, None], TypeError, "can only optimize Tensors"),
    "nothing": (lambda p, q: None, TypeError, "iterable|NoneType"),
    "what is no leaf": (lambda p, q: [p, q * 2], ValueError, "can't optimize a non-leaf Tensor"),
    "a parameter of two groups": (
        lambda p, q: [{"params": p}, {"params": [q, p]}],
        ValueError,
        "appear in more than one parameter group",
    ),
    "names for some": (lambda p, q: [("weight", p), q], ValueError, "with/without names"),
    "names for some groups": (
        lambda p, q: [{"params": [p], "lr": 1e-2}, {"params": [("weight", q)]}],
        ValueError,
        "with/without names",
    ),
    "a group without parameters": (lambda p, q: [{"lr": 1e-2}], KeyError, "params"),
    "a group that is a list": (lambda p, q: [{"params": p}, [q]], TypeError, "dict"),
}


@pytest.mark.parametrize("what", REFUSED)
@ALL
def test_parameters_that_torch_refuses(case: Case, what: str) -> None:
    params, error, words = REFUSED[what]
    with pytest.raises(error, match=words):
        case.with_defaults(params(*_named()))


@ALL
def test_groups_that_torch_refuses_are_not_added(case: Case) -> None:
    p, q = _named()
    optimizer = case.with_defaults([("weight", p)])
    for group, error in (
        ({"params": [q]}, ValueError),  # has no name
        ({"params": {("bias", q)}}, TypeError),
        ({"params": [("weight", p)]}, ValueError),
        ([("bias", q)], TypeError),
        ({"params": [("bias", q * 2)]}, ValueError),
    ):
        with pytest.raises(error):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [("bias", q)]})
    assert [group["param_names"] for group in optimizer.param_groups] == [["weight"], ["bias"]]


# Without optim_bits a dict in 32 bits would be one of torch.optim, of which amsgrad is asked for.
LEAVES_OUT = ["fused", "foreach", "capturable", "differentiable", "maximize", "amsgrad", "min_8bit_size"]


@BOTH
@ALL
def test_dicts_of_older_versions_load(case: Case, optim_bits: int, device: torch.device) -> None:
    """Options that a group lacks have the values of the optimizer that loads."""
    line, twin = Line(device), Line(device)
    optimizer = case.make(line.params, optim_bits=optim_bits)
    line.train(optimizer, 3)
    older = copy.deepcopy(optimizer.state_dict())
    for name in LEAVES_OUT:
        older["param_groups"][0].pop(name, None)
    for p, q in zip(twin.params, line.params, strict=True):
        p.data.copy_(q.data)
    other = case.make(twin.params, case.hypers[1], optim_bits=optim_bits, maximize=False)
    other.load_state_dict(older)
    assert other.param_groups[0].keys() >= optimizer.param_groups[0].keys()
    line.train(optimizer, 2)
    twin.train(other, 2)
    assert [bits(p) for p in line.params] == [bits(p) for p in twin.params]


@BOTH
@ALL
def test_state_dicts_are_deterministic(case: Case, optim_bits: int, device: torch.device) -> None:
    """The same run gives the same dict, keys in order; asking for one changes nothing, nor does loading one's own."""
    dicts = []
    for asks in (False, True):
        line = Line(device)
        optimizer = case.make(line.params, optim_bits=optim_bits)
        for _ in range(3):
            line.train(optimizer, 1)
            if asks:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        dicts.append(optimizer.state_dict())
    first, second = dicts
    assert list(first["state"]) == list(second["state"]) == [0, 1]
    for index in (0, 1):
        one, two = first["state"][index], second["state"][index]
        assert list(one) == list(two)
        assert all((bits(one[key]), one[key].dtype) == (bits(two[key]), two[key].dtype) for key in one)
    assert first["param_groups"] == second["param_groups"]
    assert first["param_groups"][0]["params"] == [0, 1]


@BOTH
@ALL
def test_a_copy_has_all_that_a_user_sees(case: Case, optim_bits: int, device: torch.device) -> None:
    def public(optimizer: Any) -> set[str]:
        return {name for name in vars(optimizer) if not name.startswith("_")}

    line = Line(device)
    optimizer = case.make(line.params, optim_bits=optim_bits)
    for _ in range(2):
        twin = copy.deepcopy(optimizer)
        assert public(twin) == public(optimizer)
        assert twin.defaults == optimizer.defaults
        line.train(optimizer, 1)
    assert type(optimizer).__name__ in repr(optimizer)


@BOTH
@ALL
def test_hooks_of_a_step_run_in_order(case: Case, optim_bits: int, device: torch.device) -> None:
    line = Line(device)
    optimizer = case.make(line.params, optim_bits=optim_bits)
    seen: list[str] = []

    def note(name: str) -> Callable[..., None]:
        def hook(which: Any, args: Any, kwargs: Any) -> None:
            assert which is optimizer
            count = sum(float(entry["step"]) for entry in optimizer.state.values())
            seen.append(f"{name} at {count:g}")

        return hook

    handles = [
        register_optimizer_step_pre_hook(note("every before")),
        register_optimizer_step_post_hook(note("every after")),
        optimizer.register_step_pre_hook(note("before")),
        optimizer.register_step_post_hook(note("after")),
    ]
    try:
        line.train(optimizer, 1)
        assert seen == ["every before at 0", "before at 0", "after at 2", "every after at 2"]
    finally:
        for handle in handles:
            handle.remove()
    line.train(optimizer, 1)
    assert len(seen) == 4

    def with_closure(which: Any, args: Any, kwargs: Any) -> Any:
        return (args[0], lambda: torch.tensor(7.0)), kwargs

    with optimizer.register_step_pre_hook(with_closure):
        assert optimizer.step().item() == 7.0
    with optimizer.register_step_pre_hook(lambda *_: "no pair"), pytest.raises(RuntimeError, match="None or a tuple"):
        optimizer.step()


@BOTH
@ALL
def test_hooks_of_state_dicts(case: Case, optim_bits: int, device: torch.device) -> None:
    line = Line(device)
    optimizer = case.make(line.params, optim_bits=optim_bits)
    line.train(optimizer, 1)
    saved = optimizer.state_dict()
    seen: list[str] = []
    seen_at_once = {"lr": 0.125}

    def before_loading(which: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append("before loading")
        groups = [{**group, **seen_at_once} for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    hooks = [
        optimizer.register_load_state_dict_pre_hook(before_loading),
        optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("first of all"), prepend=True),
        optimizer.register_load_state_dict_post_hook(lambda o: seen.append(f"after loading {o.param_groups[0]['lr']}")),
        optimizer.register_state_dict_pre_hook(lambda o: seen.append("before saving")),
        optimizer.register_state_dict_post_hook(lambda o, d: seen.append("after saving") or {**d, "more": 5}),
    ]
    optimizer.load_state_dict(saved)
    assert seen == ["first of all", "before loading", "after loading 0.125"]
    assert saved["param_groups"][0]["lr"] == case.hypers[0]["lr"], "the dict of the caller stays as it was"
    del seen[:]
    again = optimizer.state_dict()
    assert seen == ["before saving", "after saving"]
    assert again["more"] == 5
    for hook in hooks:
        hook.remove()
    del seen[:]
    optimizer.load_state_dict(again)
    assert "more" not in optimizer.state_dict()
    assert not seen


@ALL
def test_a_profile_names_the_step(case: Case) -> None:
    line = Line(torch.device("cpu"))
    optimizer = case.make(line.params)
    with torch.autograd.profiler.profile() as profile:
        line.train(optimizer, 2)
    names = [event.key for event in profile.key_averages()]
    assert any(re.fullmatch(rf"Optimizer\.step#{case.name}\.step", name) for name in names)
    assert any(re.fullmatch(rf"Optimizer\.zero_grad#{case.name}\.zero_grad", name) for name in names)


@BOTH
@ALL
def test_gradients_are_read_only(case: Case, optim_bits: int, device: torch.device) -> None:
    """As torch's suite asks of every optimizer: neither a closure's nor a user's gradient is changed by a step."""
    for layout in ("contiguous", "every other"):
        line = Line(device, layout)
        optimizer = case.make(line.params, {**case.hypers[0], "weight_decay": 0.3}, optim_bits=optim_bits)
        line.loss().backward()
        before = [p.grad.clone() for p in line.params]
        held = [p.grad for p in line.params]
        optimizer.step()
        assert all(torch.equal(p.grad, grad) for p, grad in zip(line.params, before, strict=True))
        assert all(p.grad is grad for p, grad in zip(line.params, held, strict=True))
