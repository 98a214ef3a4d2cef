"""Rules whose step depends on norms of the whole tensor: zeros, numbers whose squares leave float32, other tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, EVERY, Case
from support.harness import bits, hostile, parameter, state_bits, torch_threads, values
from support.rounding import Rounded

NORMED = pytest.mark.parametrize("case", [case for case in EVERY if case.has_norms], ids=str)


def stepped(case: Case, data: torch.Tensor, grad: torch.Tensor, **options: Any) -> tuple[torch.nn.Parameter, Any]:
    """A parameter after its first step, and its optimizer."""
    p = parameter(data.clone(), grad)
    optimizer = case.make([p], **options)
    optimizer.step()
    return p, optimizer


@pytest.mark.parametrize("decay", [0.0, 0.1])
@NORMED
def test_where_a_norm_is_zero_the_ratio_is_one(case: Case, decay: float, device: torch.device) -> None:
    """The parameter, the gradient, or both are 0; a tensor that begins at 0 can leave it."""
    n = 1000
    x, zero = hostile(n, torch.float32, seed=1, small=-2, large=0), torch.zeros(n)
    for start, grad in ((zero, x), (x, zero), (zero, zero)):
        hyper = case.without_decay(weight_decay=decay)
        p, _ = stepped(case, start.to(device), grad.to(device), hyper=hyper, optim_bits=32)
        old = {name: Rounded.exact(np.zeros(n)) for name in case.states}
        expected, _ = case.rule(Rounded.exact(values(start)), Rounded.exact(values(grad)), old, t=1, **hyper)
        assert (np.abs(values(p) - expected.value) <= expected.error).all()
        still = not bool(grad.any()) and (decay == 0 or not bool(start.any()))
        assert torch.equal(p.detach().cpu(), start) == still


@pytest.mark.parametrize("scale", [1e-41, 1e-36, 1e-25, 1e-12, 1e15, 1e20, 1e35])
@NORMED
def test_norms_of_numbers_whose_squares_leave_float32(case: Case, scale: float, device: torch.device) -> None:
    """All elements of parameter and gradient are so small or so large; the ratio is what it is in float64. Subnormal
    numbers have fewer bits, so both sides begin from the same ones."""
    n = 777
    rng = np.random.default_rng(3)
    start, grad = (torch.from_numpy((rng.uniform(0.5, 1, n) * scale).astype(np.float32)) for _ in range(2))
    if case.name == "LAMB8bit":
        grad = torch.from_numpy(rng.standard_normal(n).astype(np.float32))  # its direction does not depend on the scale
    hyper = case.without_decay(lr=0.5)
    p, _ = stepped(case, start.to(device), grad.to(device), hyper=hyper, optim_bits=32)
    old = {name: Rounded.exact(np.zeros(n)) for name in case.states}
    expected, _ = case.rule(Rounded.exact(values(start)), Rounded.exact(values(grad)), old, t=1, **hyper)
    assert (np.abs(values(p) - expected.value) <= expected.error).all()
    # The bound is not so wide that a norm of 0 would pass, but where a number has a few bits only.
    moved = np.abs(expected.value - values(start))
    assert scale < 1e-37 or (expected.error < 1e-3 * moved).all()


@pytest.mark.parametrize("scale", [2.0**-149, 2.0**-140, 2.0**-126, 2.0**-124])
def test_a_ratio_beyond_float32_still_scales_the_gradient(scale: float, device: torch.device) -> None:
    """Where LARS divides by the norm of a tiny gradient, the quotient overflows but the scaled gradient does not."""
    n, case = 777, CASES["LARS8bit"]
    rng = np.random.default_rng(3)
    start = torch.from_numpy(rng.standard_normal(n).astype(np.float32))
    grad = torch.from_numpy((rng.integers(0, 4, n) * rng.choice([-1.0, 1.0], n) * scale).astype(np.float32))
    hyper = case.without_decay(trust_coefficient=1.0)
    p, optimizer = stepped(case, start.to(device), grad.to(device), hyper=hyper, optim_bits=32)
    scaled = values(grad) * (np.linalg.norm(values(start)) / np.linalg.norm(values(grad)))
    # A square and eight sums in float32 in each norm, of which the root halves what is off; the ratio; the product.
    assert (np.abs(values(optimizer.state[p]["momentum_buffer"]) - scaled) <= 11 * 2.0**-24 * np.abs(scaled)).all()
    assert (values(p) != values(start))[scaled != 0].all()


@NORMED
def test_other_tensors_and_threads_change_nothing(case: Case, device: torch.device) -> None:
    """Tensors of several megabytes and small ones, in one step or each alone, by one thread or three."""
    sizes = (3_000_001, 5, 0, 1_500_000, 700, 262_144, 256 * 1024 * 3 + 1)
    data = [hostile(n, torch.float32, seed=n, small=-3, large=0).to(device) for n in sizes]
    grads = [hostile(n, torch.float32, seed=n + 1, small=-3, large=0).to(device) for n in sizes]
    ends = []
    for threads in (1, 3):
        with torch_threads(threads):
            params = [parameter(x.clone(), g) for x, g in zip(data, grads, strict=True)]
            optimizer = case.make(params)
            optimizer.step()
            ends.append([(bits(p), state_bits(optimizer, p)) for p in params])
    assert ends[0] == ends[1]
    for (end, state), x, g in zip(ends[0], data, grads, strict=True):
        p, optimizer = stepped(case, x, g)
        assert (bits(p), state_bits(optimizer, p)) == (end, state)


@NORMED
def test_a_gradient_scale_counts_in_the_norms(case: Case) -> None:
    """Under GradScaler with fused=True the step divides the gradient itself."""
    x, g = (hostile(4000, torch.float32, seed=s, small=-2, large=0) for s in (1, 2))
    plain, _ = stepped(case, x, g)
    p = parameter(x.clone(), 1024 * g)
    optimizer = case.make([p], fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    optimizer.step()
    assert bits(p) == bits(plain)


@NORMED
def test_every_variant_has_its_ratio(case: Case) -> None:
    """Those that keep less than row 0 of the hyper-parameters."""
    for option in case.only_with.values():
        hyper = {**case.hypers[0], option: 0.0, "nesterov": False}
        x, g = (hostile(3000, torch.float32, seed=s, small=-2, large=0) for s in (1, 2))
        p, optimizer = stepped(case, x, g, hyper=hyper)
        assert not optimizer.state.get(p)
        old = {name: Rounded.exact(np.zeros(x.numel())) for name in case.states}
        expected, _ = case.rule(Rounded.exact(values(x)), Rounded.exact(values(g)), old, t=1, **hyper)
        assert (np.abs(values(p) - expected.value) <= expected.error).all()


@NORMED
def test_flat_parts_of_parameters_are_refused(case: Case) -> None:
    import torch.distributed.fsdp

    p = parameter(torch.ones(300), torch.ones(300))
    p._fsdp_flattened = True  # as FullyShardedDataParallel marks the parts of its ranks
    optimizer = case.make([p])
    with pytest.raises(ValueError, match=f"{case.name}: needs norms of whole parameters.*fully_shard"):
        optimizer.step()
    assert bits(p) == bits(torch.ones(300))
    assert not optimizer.state.get(p)
