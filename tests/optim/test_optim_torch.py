"""50 steps with 32-bit state against torch.optim in float32, within what float32 rounding allows (rounding.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import EVERY, Case
from support.harness import parameter, values
from support.rounding import Rounded


@pytest.mark.parametrize("row", [0, 1, 2, "training"])
@pytest.mark.parametrize("case", [case for case in EVERY if case.torch_class], ids=str)
def test_50_steps_are_torchs(case: Case, row: int | str, device: torch.device) -> None:
    """The reference, carried on with its bounds, is near both. torch does the same operations with more roundings (a
    multiplication and an addition for a fused one, a division for a reciprocal): at most twice as many."""
    assert case.torch_class is not None
    p, q = (parameter(torch.linspace(-0.02, 0.02, 300, device=device)) for _ in range(2))
    hyper = {**case.training} if isinstance(row, str) else {**case.hypers[row]}
    ours = case.make([p], hyper, optim_bits=32)
    theirs = case.torch_class([q], **hyper, foreach=False)  # torch 2.13's fused SGD and Adagrad are wrong on CPU
    options = ours.param_groups[0]
    exact, bound = Rounded.exact(values(p)), np.zeros(300)
    states = {
        name: Rounded.exact(np.full(300, np.float32(case.start(name, options)))) for name in case.states_of(options)
    }
    states |= {name: Rounded.exact(start) for name, start in case.running.items()}
    rng = np.random.default_rng(7)
    scale = 10.0 ** rng.uniform(-3, 1, 300)
    for t in range(1, 51):
        grad = torch.from_numpy(rng.standard_normal(300) * scale).float().to(device)
        p.grad, q.grad = grad, grad.clone()
        exact, states = case.rule(exact, Rounded.exact(values(grad)), states, **{**options, "t": t})
        ours.step()
        theirs.step()
        bound = exact.error
        assert (np.abs(values(p) - exact.value) <= bound).all(), t
        assert (np.abs(values(q) - exact.value) <= 2 * bound).all(), t
    moved = np.abs(exact.value - np.linspace(-0.02, 0.02, 300))
    assert (bound <= 1e-3 * moved).mean() > 0.5, "a bound that tells something"
    for name in states:
        for optimizer, of, times in ((ours, p, 1), (theirs, q, 2)):
            found = values(optimizer.state[of][name])
            assert (np.abs(found - states[name].value) <= times * states[name].error).all(), name
