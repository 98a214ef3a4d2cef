"""Zeros that are none, and values that became zeros: the report counts what the next steps will do wrong with them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.convert_harness import ours, twins
from support.harness import bits

import optim8

SIZE = 5000


def sparse_steps(optimizer: Any, p: torch.nn.Parameter, first: int, last: int) -> None:
    """The even values have no gradient, the odd ones none that is small."""
    for t in range(first, last):
        p.grad = torch.rand(SIZE, generator=torch.Generator().manual_seed(t)) + 0.5
        p.grad[::2] = 0
        optimizer.step()


@pytest.mark.peers
@pytest.mark.parametrize("layout", ["wrapped", "flat"])
@pytest.mark.parametrize("name, most", [("Lion8bit", 1.0), ("AdamW8bit", 0.1)])
def test_zeros_of_a_cpu_checkpoint_of_bitsandbytes(name: str, most: float, layout: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    p = torch.nn.Parameter(torch.zeros(SIZE))
    theirs = getattr(bnb.optim, name)([p], lr=1e-3, weight_decay=0.0)
    sparse_steps(theirs, p, 0, 3)
    saved = theirs.state_dict() if layout == "wrapped" else torch.optim.Optimizer.state_dict(theirs)
    before = copy.deepcopy(saved)
    q, r = twins([p, p])
    as_it_is, repaired = ours(name, [q]), ours(name, [r])
    with optim8.convert.report() as report:
        as_it_is.load_state_dict(saved)
    (note,) = report.notes
    assert (note.name, note.count) == (f"{name}.load_state_dict: state[0]['state1']", SIZE // 2)
    assert "2500 values have code 131" in str(report)
    assert "with_exact_zeros" in note.text
    with optim8.convert.report() as report:
        repaired.load_state_dict(optim8.convert.with_exact_zeros(saved))
    assert report.notes == []
    entries = [[value for value in entry.values() if not isinstance(value, dict)] for entry in before["state"].values()]
    assert [bits(v) for e in entries for v in e if isinstance(v, torch.Tensor)] == [
        bits(v) for e in saved["state"].values() for v in e.values() if isinstance(v, torch.Tensor)
    ], "the dict that was given is as it was"
    for optimizer, param in ((as_it_is, q), (repaired, r)):
        start = param.detach().clone()
        sparse_steps(optimizer, param, 3, 5)
        moved = (param.detach() - start)[::2].abs() / 1e-3
        if optimizer is repaired:
            assert not moved.any()
        else:
            assert 0 < moved.max() <= 2 * most * 1.001
            assert name != "Lion8bit" or (moved > 1.999).all()
    assert torch.equal(q[1::2], r[1::2]), "what has gradients takes the same steps"


def test_what_is_no_dict_of_bitsandbytes() -> None:
    for wrong in ([], {}, {"state": []}):
        with pytest.raises(TypeError, match="with_exact_zeros: state_dict must be"):
            optim8.convert.with_exact_zeros(wrong)  # type: ignore[arg-type]
    p = torch.nn.Parameter(torch.ones(SIZE))
    theirs = torch.optim.AdamW([p])
    p.grad = torch.ones(SIZE)
    theirs.step()
    saved = theirs.state_dict()
    assert optim8.convert.with_exact_zeros(saved)["state"][0]["exp_avg"] is saved["state"][0]["exp_avg"]


@pytest.mark.parametrize("optim_bits", [8, 16, 32])
def test_second_moments_that_float16_lost_are_counted(optim_bits: int) -> None:
    """The fact: torch's state of a float16 parameter has 0 for what is below 6e-8, and float32 steps then divide by
    eps."""
    p = torch.nn.Parameter(torch.zeros(SIZE, dtype=torch.float16))
    theirs = torch.optim.AdamW([p], lr=1e-3, weight_decay=0.0, foreach=False)
    p.grad = torch.full((SIZE,), 1e-3, dtype=torch.float16)
    p.grad[:100] = 1.0
    p.grad[-50:] = 0.0
    theirs.step()
    assert int((theirs.state[p]["exp_avg_sq"] == 0).sum()) == SIZE - 100
    q = torch.nn.Parameter(torch.zeros(SIZE))
    optimizer = optim8.AdamW8bit([q], optim_bits=optim_bits)
    with optim8.convert.report() as report:
        optimizer.load_state_dict(theirs.state_dict())
    (note,) = report.notes
    assert note.name == "AdamW8bit.load_state_dict: state[0]['exp_avg_sq']"
    assert note.count == SIZE - 150
    q.grad = torch.zeros(SIZE)
    optimizer.step()
    assert 1e3 < float(q.detach()[200].abs()) / 1e-3 < 1e5


def test_torchs_fused_optimizers_take_fused_from_the_dict() -> None:
    """The fact of the docs: a dict says how a step runs, so fused=None meets GradScaler's scale unfused."""
    params = [torch.nn.Parameter(torch.ones(SIZE))]
    optimizer = optim8.AdamW8bit(params)
    params[0].grad = torch.ones(SIZE)
    optimizer.step()

    def scaled_step(others: list[torch.nn.Parameter], theirs: torch.optim.Optimizer) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale((others[0] * 2).sum()).backward()
        scaler.step(theirs)
        scaler.update()

    for fused in (None, True):
        others = twins(params)
        theirs = torch.optim.AdamW(others, fused=True)
        theirs.load_state_dict(optim8.convert.to_torch(optimizer))
        assert theirs.param_groups[0]["fused"] is None
        for group in theirs.param_groups:
            group["fused"] = fused
        if fused is None:
            with pytest.raises((AssertionError, RuntimeError, ValueError)):
                scaled_step(others, theirs)
            continue
        scaled_step(others, theirs)
        assert bool((others[0] != params[0]).all())
    ours_fused = optim8.AdamW8bit(twins(params), fused=True)
    assert optim8.convert.to_torch(ours_fused)["param_groups"][0]["fused"] is True, "what the optimizer says goes along"
