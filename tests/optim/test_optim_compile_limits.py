"""Steps that torch.compile leaves outside of its programs, which have the bits of eager steps: all of them without
fullgraph=True. With it, those that cannot be in a program are an error that says why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import CASES
from support.compilation import compiled, give_grads, make_params
from support.harness import bits, snapshot

import optim8


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def test_without_fullgraph_a_step_is_native_code(device: torch.device) -> None:
    """One graph break, no graph, and no guards on its hundreds of tensors."""
    params = make_params(device)
    optimizer = CASES["AdamW8bit"].make(params)
    step = compiled(optimizer, fullgraph=False)
    for t in range(4):
        give_grads(params, t)
        optimizer.param_groups[0]["lr"] = 0.1 / (t + 1)
        step()
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 0
    assert len(counters["graph_break"]) == 1
    assert not counters["recompile_limit"]


def test_a_loss_scale_is_left_outside(device: torch.device) -> None:
    """Without fullgraph the step is outside of the program and has the eager bits; with it, the error says why."""
    results = []
    for way in ("eager", "compiled", "fullgraph"):
        params = make_params(device)
        optimizer = optim8.AdamW8bit(params, fused=True, min_8bit_size=0)
        optimizer.grad_scale = torch.tensor(4.0, device=device)
        optimizer.found_inf = torch.tensor(0.0, device=device)
        give_grads(params, 0)
        if way == "fullgraph":
            with pytest.raises(torch._dynamo.exc.Unsupported, match=r"GradScaler .* Use fused=False"):
                compiled(optimizer)()
            assert not optimizer.state
            continue
        step = optimizer.step if way == "eager" else compiled(optimizer, fullgraph=False)
        step()
        results.append(snapshot(optimizer, params))
    assert results[0] == results[1]


def test_paged_state_is_left_outside(device: torch.device) -> None:
    results = []
    for way in ("eager", "compiled", "fullgraph"):
        params = make_params(device)
        optimizer = optim8.AdamW8bit(params, paged=True, min_8bit_size=0)
        give_grads(params, 0)
        if way == "fullgraph":
            with pytest.raises(torch._dynamo.exc.Unsupported, match=r"state is paged.* Use paged=False"):
                compiled(optimizer)()
            continue
        step = optimizer.step if way == "eager" else compiled(optimizer, fullgraph=False)
        for t in range(3):
            give_grads(params, t)
            step()
        results.append(snapshot(optimizer, params))
    assert results[0] == results[1]


def test_what_eager_refuses_is_refused(device: torch.device) -> None:
    params = make_params(device)
    optimizer = CASES["AdamW8bit"].make(params)
    give_grads(params, 0)
    params[1].grad = torch.ones(300, device=device).to_sparse()
    before = [bits(p) for p in params]
    with pytest.raises(ValueError, match=r"parameter 1 of group 0 has a gradient .*sparse"):
        compiled(optimizer, fullgraph=False)()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="parameter 1 of group 0 has a gradient"):
        compiled(optimizer)()
    assert [bits(p) for p in params] == before
    assert not optimizer.state


def test_a_monitor_looks_at_compiled_steps(device: torch.device) -> None:
    class Writer:
        def __init__(self) -> None:
            self.calls: list[Any] = []

        def add_scalar(self, *call: Any) -> None:
            self.calls.append(call)

        def add_histogram(self, name: str, values: Any, step: int, bins: Any) -> None:
            self.calls.append((name, step))

    seen = []
    for way in ("eager", "compiled", "fullgraph"):
        params = make_params(device)
        optimizer = CASES["AdamW8bit"].make(params)
        writer = Writer()
        with optim8.monitor(optimizer, writer, every=2):
            give_grads(params, 0)
            if way == "fullgraph":
                with pytest.raises(torch._dynamo.exc.Unsupported, match=r"monitor.*remove\(\)"):
                    compiled(optimizer)()
                continue
            step = optimizer.step if way == "eager" else compiled(optimizer, fullgraph=False)
            for t in range(6):
                give_grads(params, t)
                step()
        seen.append((writer.calls, snapshot(optimizer, params)))
    assert seen[0] == seen[1]
    assert seen[0][0]


def test_what_is_set_after_a_step_was_compiled_counts(device: torch.device) -> None:
    params = make_params(device)
    optimizer = optim8.AdamW8bit(params, fused=True, min_8bit_size=0)
    step = compiled(optimizer, fullgraph=False)
    give_grads(params, 0)
    step()
    calls = []
    with_hook = optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    step()
    step()
    assert calls == [1, 1]
    with_hook.remove()
    before = snapshot(optimizer, params)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(1.0)
    step()
    assert snapshot(optimizer, params) == before
    del optimizer.grad_scale, optimizer.found_inf
    step()
    assert all(int(optimizer.state[p]["step"]) == 4 for p in params)
