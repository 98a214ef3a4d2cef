"""How a step asks tensors and state dicts: directly where it can, and then as Python would have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import EVERY, Case
from support.harness import ALL, bits, parameter, small_set, snapshot

from optim8.step.parts import LocalStep
from optim8.step.scaling import UNSCALED

ONE = pytest.mark.parametrize("case", EVERY[:1], ids=str)


class OwnGradient(torch.nn.Parameter):
    """Its gradient is what it was told last, not what torch keeps."""

    told: torch.Tensor

    @property
    def grad(self) -> torch.Tensor:  # type: ignore[override]
        return self.told

    @grad.setter
    def grad(self, value: torch.Tensor) -> None:
        self.told = value


class OwnSearch(torch.nn.Parameter):
    """Finds its attributes in a way of its own."""

    told: torch.Tensor

    def __getattribute__(self, name: str) -> Any:
        return super().__getattribute__("told" if name == "grad" else name)


class Plain(torch.Tensor):
    """Overrides nothing."""


class Inert(torch.Tensor):
    """Takes part in torch's functions as what it is."""

    __torch_function__ = torch._C._disabled_torch_function_impl


GRADIENTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "plain": lambda g: g,
    "subclass": lambda g: g.as_subclass(Plain),
    "subclass without functions": lambda g: g.as_subclass(Inert),
    "negated lazily": lambda g: torch._neg_view(-g),
    "subclass, negated lazily": lambda g: torch._neg_view(-g).as_subclass(Plain),
}


def set_told(p: Any, g: torch.Tensor) -> None:
    p.told = g


@pytest.mark.parametrize("cls", [OwnGradient, OwnSearch])
@ONE
def test_a_parameter_that_has_its_gradient_elsewhere(case: Case, cls: type, device: torch.device) -> None:
    """Between parameters that do not, so that what is remembered of one type is not used for another."""
    data = [torch.linspace(-1, 1, n, device=device) for n in (300, 300, 300, 5)]
    ours: list[Any] = [parameter(d.clone(), torch.ones_like(d)) for d in data]
    theirs = [parameter(d.clone(), torch.ones_like(d)) for d in data]
    for i in (1, 3):
        ours[i] = cls(data[i].clone())
        torch.Tensor.grad.__set__(ours[i], torch.full_like(data[i], 1e9))  # type: ignore[attr-defined]
    a, b = case.make(ours), case.make(theirs)
    for t in range(3):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            q.grad = torch.linspace(-3, 2 + t, q.numel(), device=device)
            if i in (1, 3):
                set_told(p, q.grad.clone())
            else:
                p.grad = q.grad.clone()
        a.step()
        b.step()
    assert snapshot(a) == snapshot(b)


@ONE
def test_a_type_that_is_patched_between_two_steps(
    case: Case, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Patched(torch.nn.Parameter):
        pass

    p = Patched(torch.ones(300, device=device))
    q = parameter(torch.ones(300, device=device))
    a, b = case.make([p]), case.make([q])
    p.grad = torch.ones_like(p)
    q.grad = torch.ones_like(q)
    a.step()
    b.step()
    other = torch.linspace(-1, 1, 300, device=device)
    monkeypatch.setattr(Patched, "grad", property(lambda self: other), raising=False)
    q.grad = other.clone()
    a.step()
    b.step()
    assert bits(p) == bits(q)


@pytest.mark.parametrize("kind", GRADIENTS)
@ONE
def test_kinds_of_gradients_in_turn(case: Case, kind: str, device: torch.device) -> None:
    """A kind that needs care amid gradients that do not."""
    params, a = small_set(case, device)
    stay, b = small_set(case, device)
    with torch.no_grad():
        params[0].grad = GRADIENTS[kind](params[0].grad.clone())
        params[2].grad = GRADIENTS[kind](params[2].grad.clone())
    assert params[0].grad.is_neg() == kind.endswith("negated lazily")
    for _ in range(2):
        a.step()
        b.step()
    assert [bits(p) for p in params] == [bits(p) for p in stay]
    assert snapshot(a) == snapshot(b)


def reverse(optimizer: Any) -> None:
    """The state's parameters, and the entries of each, in the opposite order; the names are other strings."""
    items = [(p, {"".join(list(k)): v for k, v in reversed(entry.items())}) for p, entry in optimizer.state.items()]
    optimizer.state.clear()
    optimizer.state.update(reversed(items))


def rotate(optimizer: Any) -> None:
    items = list(optimizer.state.items())
    optimizer.state.clear()
    optimizer.state.update([*items[1:], items[0]])


def add_a_note(optimizer: Any) -> None:
    """What others keep in the same dicts does not matter."""
    for p, entry in list(optimizer.state.items()):
        optimizer.state[p] = {"note": 1, **entry}
    optimizer.state["a stranger"] = {}
    rotate(optimizer)


@pytest.mark.parametrize("change", [reverse, rotate, add_a_note])
@pytest.mark.parametrize("optim_bits", [8, 16, 32])
@ALL
def test_state_in_another_order(
    case: Case, change: Callable[[Any], None], optim_bits: int, device: torch.device
) -> None:
    _, a = small_set(case, device, optim_bits=optim_bits)
    _, b = small_set(case, device, optim_bits=optim_bits)
    for _ in range(2):
        a.step()
        b.step()
        change(a)
    a.step()
    b.step()
    for p, q in zip(a.param_groups[0]["params"], b.param_groups[0]["params"], strict=True):
        assert bits(p) == bits(q)
        assert {k: bits(a.state[p][k]) for k in b.state[q]} == {k: bits(v) for k, v in b.state[q].items()}


@ALL
def test_gradients_that_come_and_go(case: Case, device: torch.device) -> None:
    """The state's order is that of the first gradients, not that of the parameters."""
    params, optimizer = small_set(case, device)
    alone = [small_set(case, device) for _ in params]  # of each, only one parameter ever has a gradient
    grads = [p.grad for p in params]
    for _, others in alone:
        for q in others.param_groups[0]["params"]:
            q.grad = None
    for turn in ({2}, {0, 2}, {1, 3}, {0, 1, 2, 3}, set(), {3, 0}):
        for i, p in enumerate(params):
            p.grad = grads[i] if i in turn else None
            alone[i][0][i].grad = p.grad
            alone[i][1].step()
        optimizer.step()
    for i, p in enumerate(params):
        q, other = alone[i][0][i], alone[i][1]
        assert bits(p) == bits(q)
        assert {k: bits(v) for k, v in optimizer.state[p].items()} == {k: bits(v) for k, v in other.state[q].items()}


@pytest.mark.parametrize("threads", [1, 2])
@ONE
def test_what_is_called_meanwhile_cannot_leave_a_step_half_done(case: Case, threads: int) -> None:
    """It is called once, for no rows too; its error comes when all is stepped and counted."""
    sizes = (100_000, 0, 70_000)
    ours = [parameter(torch.linspace(-1, 1, n), torch.linspace(-2, 3, n)) for n in sizes]
    theirs = [parameter(p.detach().clone(), p.grad.clone()) for p in ours if p.grad is not None]
    a, b = case.make(ours), case.make(theirs)
    a.step()
    b.step()
    calls = []

    def fail() -> None:
        calls.append(len(a.stepper._table))
        raise KeyboardInterrupt

    table = a.stepper._table
    local_step = LocalStep(case.name, a.stepper._parts(a, None, UNSCALED), a.state)
    a.stepper._gather(a, local_step)
    with pytest.raises(KeyboardInterrupt):
        table.run_cpu(threads, meanwhile=fail)
    table.clear()
    with pytest.raises(KeyboardInterrupt):
        table.run_cpu(threads, meanwhile=fail)
    assert calls == [3, 0]
    b.step()
    assert snapshot(a) == snapshot(b)


@ALL
def test_a_graph_notices_that_a_step_changed_what_it_saved(case: Case, device: torch.device) -> None:
    p = parameter(torch.ones(300, device=device), torch.ones(300, device=device))
    optimizer = case.make([p])
    for _ in range(2):
        loss = (p * p).sum()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
