"""torch.amp.GradScaler: as with torch.optim, also where fused=True asks that the step takes the scale itself."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from cases import Case
from support.harness import ALL, bits, parameter, snapshot

import optim8

FUSED = pytest.mark.parametrize("fused", [None, False, True])


def scaled(device: torch.device, **options: Any) -> tuple[list[torch.nn.Parameter], Any, Any]:
    """Parameters of several sizes with scaled gradients, their optimizer and the scaler."""
    params = [parameter(torch.linspace(-1, 1, n, device=device)) for n in (5000, 3, 0)]
    optimizer = optim8.AdamW8bit(params, lr=0.01, **options)
    scaler = torch.amp.GradScaler(device.type, init_scale=1000.0)
    scaler.scale(sum((2 * p * p).sum() for p in params)).backward()
    return params, optimizer, scaler


@FUSED
def test_a_skipped_step_is_no_step(fused: bool | None, device: torch.device) -> None:
    """Hooks, and whoever wraps `step`, see that it is left out; with fused=True it is called and does nothing."""
    params, optimizer, scaler = scaled(device, fused=fused)
    calls: list[int] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    params[0].grad[7] = float("inf")
    before = [bits(p) for p in params]
    scaler.step(optimizer)
    scaler.update()
    assert len(calls) == bool(fused)
    assert [bits(p) for p in params] == before
    assert all(not entry or entry["step"] == 0 for entry in optimizer.state.values())
    assert scaler.get_scale() == 500
    scaler.scale(params[1].sum()).backward()
    for p in params:
        p.grad = torch.ones_like(p)
    scaler.step(optimizer)
    assert len(calls) == 1 + bool(fused)
    assert optimizer.state[params[0]]["step"] == 1


@FUSED
@pytest.mark.parametrize("kind", ["plain", "channels last"])
def test_gradients_are_unscaled_after_the_step(fused: bool | None, kind: str, device: torch.device) -> None:
    """What is logged of them then is what it would be without a scaler, as in torch, fused or not."""
    p = parameter(torch.ones(2, 3, 4, 5, device=device))
    optimizer = optim8.AdamW8bit([p], fused=fused)
    scaler = torch.amp.GradScaler(device.type, init_scale=1000.0)
    scaler.scale(torch.zeros((), device=device))
    p.grad = torch.full_like(p, 3000.0)
    if kind == "channels last":
        p.grad = p.grad.to(memory_format=torch.channels_last)
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(p.grad, torch.full_like(p, 3.0))
    assert optimizer.state[p]["step"] == 1


def test_clipped_gradients_are_unscaled_once(device: torch.device) -> None:
    """scaler.unscale_ before the step: nothing is left to do in it."""
    for fused in (None, True):
        params, optimizer, scaler = scaled(device, fused=fused)
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        before = [bits(p.grad) for p in params]
        scaler.step(optimizer)
        assert [bits(p.grad) for p in params] == before


@ALL
def test_who_unscales_is_as_in_torch(case: Case) -> None:
    """Only fused=True takes the scale into the step; a copy keeps that. Lightning refuses to clip then."""
    for fused in (None, False, True):
        optimizer = case.make([parameter(torch.ones(3), torch.ones(3))], fused=fused)
        optimizer.step()
        for one in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            assert getattr(one, "_step_supports_amp_scaling", False) is bool(fused)
        optimizer.load_state_dict(case.make([parameter(torch.ones(3))], fused=True).state_dict())
        assert optimizer._step_supports_amp_scaling is bool(fused)


@pytest.mark.parametrize("accumulated", [False, True])
def test_a_step_that_fails_under_a_scaler_leaves_gradients(accumulated: bool, device: torch.device) -> None:
    """With fused=True, where they were not unscaled before."""
    params, optimizer, scaler = scaled(device, fused=True)
    if accumulated:
        scaler.scale(sum((p * p).sum() for p in params)).backward()
    params[1].data = params[1].data.double()
    before = [bits(p.grad) for p in params], snapshot(optimizer)
    with pytest.raises(ValueError, match="parameter 1 of group 0"):
        scaler.step(optimizer)
    assert ([bits(p.grad) for p in params], snapshot(optimizer)) == before
