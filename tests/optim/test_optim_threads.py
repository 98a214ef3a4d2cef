"""Threads that share an optimizer: their steps take turns, and what a step reads stays while it reads."""

from __future__ import annotations

import copy
import threading
import weakref
from typing import Any

import pytest
import torch
from cases import EVERY, Case
from support.harness import parameter, snapshot

ONE = pytest.mark.parametrize("case", EVERY[:1], ids=str)
SIZES = (700, 3, 100_000)


class Told(torch.nn.Parameter):
    """Calls `tell` whenever it is asked for its gradient."""

    tell: Any = None

    @property
    def grad(self) -> torch.Tensor | None:  # type: ignore[override]
        return self.tell()

    @grad.setter
    def grad(self, value: torch.Tensor | None) -> None:
        raise AssertionError("nobody sets it here")


def told(size: int, value: float) -> Told:
    """A parameter with a gradient that is made anew each time, which nobody else holds."""
    p = Told(torch.ones(size))
    p.tell = lambda: torch.full((size,), value)
    return p


def plain(values: tuple[float, ...]) -> list[torch.nn.Parameter]:
    return [parameter(torch.ones(n), torch.full((n,), v)) for n, v in zip(SIZES, values, strict=True)]


@ONE
def test_gradients_that_nobody_else_holds_stay_for_the_step(case: Case) -> None:
    """Memory of one that was freed would hold the next one."""
    ours: list[Any] = [told(5000, 0.5), told(5000, -2.0), told(5000, 3.0)]
    theirs = [parameter(torch.ones(5000), torch.full((5000,), v)) for v in (0.5, -2.0, 3.0)]
    a, b = case.make(ours), case.make(theirs)
    for _ in range(3):
        a.step()
        b.step()
    assert snapshot(a) == snapshot(b)


@ONE
def test_gradients_are_let_go_of_after_the_step(case: Case) -> None:
    p = told(5000, 0.5)
    made = []

    def tell() -> torch.Tensor:
        grad = torch.full((5000,), 0.5)
        made.append(weakref.ref(grad))
        return grad

    p.tell = tell
    good = case.make([p])
    good.step()
    p.tell = lambda: torch.ones(3)
    with pytest.raises(ValueError, match="shape"):
        good.step()
    assert made
    assert [ref() for ref in made] == [None] * len(made)


@pytest.mark.parametrize("second", ["step", "load"])
@ONE
def test_a_second_thread_waits_for_the_step(case: Case, second: str) -> None:
    """It comes in the middle of the gathering of the first."""
    theirs = plain((0.5, -2.0, 3.0))
    b = case.make(theirs)
    b.step()
    saved = copy.deepcopy(b.state_dict())
    ours: list[Any] = [told(n, v) for n, v in zip(SIZES, (0.5, -2.0, 3.0), strict=True)]
    a = case.make(ours)
    a.step()
    other = threading.Thread(target=a.step if second == "step" else lambda: a.load_state_dict(saved))
    normal = ours[1].tell

    def interrupted() -> torch.Tensor:
        ours[1].tell = normal
        other.start()
        other.join(0.3)  # ends at once where nothing keeps it waiting
        return normal()

    ours[1].tell = interrupted
    a.step()
    other.join()
    b.step()
    if second == "step":
        b.step()
    else:
        b.load_state_dict(saved)
    assert snapshot(a) == snapshot(b)


@ONE
def test_threads_that_step_one_optimizer_with_other_gradients_each(case: Case) -> None:
    """Rows of tensors of all sizes, in tables of all lengths: no step may see half of another's."""
    params = plain((0.5, -2.0, 3.0))
    grads = [p.grad for p in params]
    optimizer = case.make(params)
    optimizer.step()
    steps = 60

    def work(number: int) -> None:
        for t in range(steps):
            for i, p in enumerate(params):
                p.grad = grads[i] if (t + number + i) % 3 else None
            optimizer.step()

    workers = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for p in params:
        entry = optimizer.state[p]
        assert 1 <= entry["step"].item() <= 1 + 3 * steps
        assert torch.isfinite(p).all()
