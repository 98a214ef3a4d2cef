"""300 steps on a small real problem end where torch.optim ends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import Case
from support.harness import ALL, values
from support.rounding import Rounded

STEPS = 300


class ByReference(torch.optim.Optimizer):
    """The float64 reference of a case as an optimizer, for what torch.optim has no class for.

    Args:
        options: all hyper-parameters of the rule.
    """

    def __init__(self, params: Any, case: Case, options: dict[str, Any]) -> None:
        super().__init__(params, options)
        self.case = case

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["t"] = t = state.get("t", 0) + 1
                old = state.get("moments") or {
                    name: Rounded.exact(np.zeros(p.numel())) for name in self.case.states_of(group)
                }
                hyper = {name: value for name, value in group.items() if name != "params"}
                moved, new = self.case.rule(Rounded.exact(values(p)), Rounded.exact(values(p.grad)), old, t=t, **hyper)
                state["moments"] = {name: Rounded.exact(each.value) for name, each in new.items()}
                p.copy_(torch.from_numpy(moved.value).view(p.shape))


def _reference(case: Case, params: Any) -> torch.optim.Optimizer:
    if case.torch_class is not None:
        return case.torch_class(params, **case.training)
    if case.name == "Muon8bit":  # its groups without matrices
        return torch.optim.AdamW(params, **case.training)
    options = case.make([torch.nn.Parameter(torch.zeros(1))], case.training).param_groups[0]
    return ByReference(params, case, {name: value for name, value in options.items() if name != "params"})


def _train(make: Any, seed: int, device: torch.device) -> tuple[float, float]:
    """Regression on a noisy nonlinear function of 16 inputs: the loss at the start, and of 2048 points at the end."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2048, 16, generator=generator).to(device)
    w = torch.randn(16, 4, generator=generator).to(device)
    y = torch.sin(x @ w / 2).sum(1, keepdim=True) + 0.5 * torch.randn(2048, 1, generator=generator).to(device)
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(16, 128), torch.nn.GELU(), torch.nn.Linear(128, 64), torch.nn.GELU(), torch.nn.Linear(64, 1)
    ).to(device)
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    loss_of = torch.nn.functional.mse_loss
    start = loss_of(model(x), y).item()
    for t in range(STEPS):
        batch = slice(128 * (t % 16), 128 * (t % 16 + 1))
        optimizer.zero_grad()
        loss_of(model(x[batch]), y[batch]).backward()
        optimizer.step()
        schedule.step()
    return start, loss_of(model(x), y).item()


@pytest.mark.parametrize("seed", [1, 2, 3])
@ALL
def test_300_steps_end_within_one_percent_of_32bit(case: Case, seed: int, device: torch.device) -> None:
    start, expected = _train(lambda params: _reference(case, params), seed, device)
    _, actual = _train(lambda params: case.make(params, case.training), seed, device)
    assert expected < 0.7 * start, "the problem must have been learned for the comparison to mean anything"
    assert abs(actual - expected) <= 0.01 * expected
