"""Whole weights out of a model and its optimizer, and in; what does not fit is refused, and nothing changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.harness import bits, snapshot

import optim8
from optim8.paging import Pager


def _trained(paged: Any = None, **options: Any) -> tuple[torch.nn.Module, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(70, 64), torch.nn.BatchNorm1d(64)).bfloat16()
    optimizer = optim8.AdamW8bit(model.parameters(), lr=1e-4, paged=paged, **options)
    for _ in range(3):
        model(torch.randn(8, 70).bfloat16()).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("master_bits", [16, 24, 32])
@pytest.mark.parametrize("where", ["resident", "paged"])
def test_weights_come_back_to_the_bit(master_bits: int, where: str, tmp_path: Path) -> None:
    pager = Pager(directory=tmp_path, bucket="64KiB") if where == "paged" else None
    model, optimizer = _trained(pager, master_bits=master_bits)
    weights = optim8.master_state_dict(model, optimizer)
    assert {name for name, value in weights.items() if value.dtype == torch.float32} >= {"0.weight", "0.bias"}
    finer = weights["0.weight"] != model.state_dict()["0.weight"].float()
    assert bool(finer.any()) == (master_bits != 16)
    before = snapshot(optimizer, model.parameters())
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    optim8.load_master_state_dict(model, optimizer, weights)
    assert snapshot(optimizer, model.parameters()) == before
    fresh, other = _trained(master_bits=master_bits)
    other.state.clear()
    optim8.load_master_state_dict(fresh, [other], weights)
    again = optim8.master_state_dict(fresh, other)
    assert {name: bits(value) for name, value in again.items()} == {name: bits(v) for name, v in weights.items()}


def test_what_does_not_fit_is_refused_whole() -> None:
    model, optimizer = _trained(master_bits=24)
    weights = optim8.master_state_dict(model, optimizer)
    before = snapshot(optimizer, model.parameters())
    fewer = {name: value for name, value in weights.items() if name != "0.bias"}
    for wrong, message in (
        ({**weights, "other": torch.ones(3)}, "has 'other' besides"),
        (fewer, "lacks '0.bias'"),
        ({**weights, "0.bias": torch.ones(3)}, r"'0.bias' must be a tensor \(64,\), got Tensor \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            optim8.load_master_state_dict(model, optimizer, wrong)
        assert snapshot(optimizer, model.parameters()) == before
    with pytest.raises(TypeError, match="optimizer must be one of optim8, or several, got SGD"):
        optim8.master_state_dict(model, torch.optim.SGD(model.parameters()))
    optimizer.param_groups[0]["master_bits"] = 32
    changed = snapshot(optimizer, model.parameters())
    with pytest.raises(ValueError, match="must be that of a weight of 32 bits, got 24"):
        optim8.load_master_state_dict(model, optimizer, {name: value * 2 for name, value in weights.items()})
    assert snapshot(optimizer, model.parameters()) == changed
