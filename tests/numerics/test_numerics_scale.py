"""Scale: equivariance by powers of two, second moments that stay positive, subnormal and all-zero blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
import torch
from cases import EVERY, Case
from hypothesis import given
from hypothesis import strategies as st
from support.harness import ALL, bits, codes_of, moments, parameter, values
from support.pairs import pairwise

V_CASES = [case for case in EVERY if not all(case.states.values())]
# The others do not move without eps, which has a scale of its own.
SCALED = [case for case in EVERY if case.moves_without_eps]


def _scaled_run(
    case: Case, hyper: dict[str, Any], k: int, data: torch.Tensor, grads: list[torch.Tensor], state_bits: int
) -> tuple[list[bytes], dict[str, bytes]]:
    """The parameter after each step with all gradients times 2^-k, and the codes at the end.

    Where an update is as large as the gradients, the parameter is times 2^-k too, and is given back without.
    """
    back = 0 if case.is_scale_free else k
    p = parameter(torch.ldexp(data, torch.tensor(-back, device=data.device)))
    optimizer = case.make([p], hyper, optim_bits=state_bits)
    path = []
    for g in grads:
        p.grad = torch.ldexp(g, torch.tensor(-k, device=g.device))
        optimizer.step()
        path.append(bits(torch.ldexp(p.detach(), torch.tensor(back, device=data.device))))
    state = optimizer.state[p]
    keys = [key(name) for name in case.states for key in (case.codes, case.low)]
    codes = {key: bits(state[key]) for key in keys if key in state}
    assert bool(codes) == (state_bits != 32)
    return path, codes


# Nothing may overflow or go subnormal on the way, in v the scale is 2^-2k: with k up to 60 that leaves 2^-6 to 2^7 for
# (1 - b2) g^2 and for g^2, so |g| from 8 to 11. With k up to 30 there is room for gradients over four decades.
@given(
    k=st.integers(-60, 60),
    narrow=st.booleans(),
    row=st.integers(0, 2),
    seed=st.integers(0, 2**31),
    state_bits=st.sampled_from([8, 8, 16, 32]),
)
@pytest.mark.parametrize("case", SCALED, ids=str)
def test_scaling_the_gradients_changes_no_code_and_no_update(
    case: Case, k: int, narrow: bool, row: int, seed: int, state_bits: int, device: torch.device
) -> None:
    hyper = dict(case.hypers[row])
    if "eps" in hyper:
        hyper["eps"] = 0.0
    hyper |= dict.fromkeys(case.initial.values(), 0.0)
    if case.decay_in_gradient and case.is_scale_free:
        hyper["weight_decay"] = 0.0  # decay is a part of the gradient that would not be scaled
    rng = np.random.default_rng(seed)
    n = 600
    k = k if narrow else k // 2
    low, high = (3, np.log2(11)) if narrow else (-10, 3)
    magnitude = 2.0 ** rng.uniform(low, high, (4, n))
    drawn = torch.from_numpy(magnitude * rng.choice([-1.0, 1.0], (4, n))).float().to(device)
    drawn[:, 300] = 0
    data = torch.from_numpy(rng.standard_normal(n)).float().to(device)
    unscaled = _scaled_run(case, hyper, 0, data, list(drawn), state_bits)
    scaled = _scaled_run(case, hyper, k, data, list(drawn), state_bits)
    assert scaled == unscaled
    assert scaled[0][0] != bits(data), "nothing moved, so nothing was tested"


@given(seed=st.integers(0, 2**31), decades=st.floats(0, 18), state=st.sampled_from([0, 3]))
@pytest.mark.parametrize("case", V_CASES, ids=str)
def test_a_positive_v_never_codes_to_zero(
    case: Case, seed: int, decades: float, state: int, device: torch.device
) -> None:
    rng = np.random.default_rng(seed)
    n = 1000
    p = parameter(torch.zeros(n, device=device))
    optimizer = case.make([p], case.without_decay(**dict.fromkeys(case.initial.values(), 0.0)))
    unsigned = [name for name, signed in case.states.items() if not signed and name not in case.least]
    for _ in range(state + 1):
        g = rng.choice([-1.0, 1.0], n) * 10.0 ** rng.uniform(-decades, 0, n)
        g[::97] = 0
        p.grad = torch.from_numpy(g).float().to(device)
        old = moments(optimizer, case, p)
        optimizer.step()
        for name in unsigned:
            # v is positive wherever the gradient or the old v is: nothing here is so small that float32 makes it 0.
            positive = (values(p.grad) != 0) | (old[name].value > 0)
            codes = codes_of(optimizer.state[p][case.codes(name)])
            assert (codes[positive] > 0).all()
            assert (codes[~positive] == 0).all()
            assert positive.sum() < n or state


@pytest.mark.parametrize("case", [case for case in V_CASES if case in SCALED], ids=str)
def test_a_small_v_beside_a_large_one_does_not_explode(case: Case, device: torch.device) -> None:
    """With v coded to 0 Adam's update of 10^-6 of the block's largest gradient would be 1 / sqrt(1 - b2)."""
    params = [parameter(torch.zeros(256, device=device)) for _ in range(2)]
    hyper = {**case.without_decay(**case.slow), "eps": 0.0, "lr": 1.0, "maximize": False}
    hyper |= dict.fromkeys(case.initial.values(), 0.0)
    optimizers = [case.make([p], hyper, optim_bits=optim_bits) for p, optim_bits in zip(params, (8, 32), strict=True)]
    for _ in range(30):
        moved = []
        for p, optimizer in zip(params, optimizers, strict=True):
            p.grad = torch.full((256,), 1e-6, device=device)
            p.grad[0] = 1.0
            before = values(p)
            optimizer.step()
            moved.append(np.abs(values(p) - before))
        # Here the codes are coarse: m is at most that above 10^-6, and the root at least the smallest positive one.
        signed, positive = (reference.dynamic_map(kind).astype(np.float64) for kind in (True, False))
        assert (moved[0] <= moved[1] * (signed[signed > 1e-6][0] / positive[1]) * (1 + 2.0**-18)).all()


ZERO_ROWS = {
    "zeros": lambda n: torch.zeros(n),
    "negative zeros": lambda n: -torch.zeros(n),
    "smallest subnormal": lambda n: torch.full((n,), 2.0**-149),
    "subnormals": lambda n: torch.linspace(-(2.0**-127), 2.0**-127, n),
    "one subnormal": lambda n: torch.nn.functional.pad(torch.tensor([-(2.0**-140)]), (7, n - 8)),
    "at the edge": lambda n: torch.linspace(-(2.0**-126), 2.0**-125, n),
    "reciprocal overflows": lambda n: torch.full((n,), 2.0**-128) * torch.linspace(-1, 1, n).sign(),
    "square is subnormal": lambda n: torch.linspace(-1e-21, 1e-20, n),
}


@pairwise(content=ZERO_ROWS, eps=[0.0, 1e-8], state_bits=[8, 16, 32])
@ALL
def test_subnormal_and_zero_blocks_stay_finite(
    case: Case, content: str, eps: float, state_bits: int, device: torch.device
) -> None:
    hyper = case.without_decay(1)
    if "betas" in hyper:
        hyper["betas"] = (0.9, 0.99, 0.999)[: len(hyper["betas"])]
    if "eps" in hyper:
        hyper["eps"] = eps
    p = parameter(torch.linspace(-1, 1, 600, device=device))
    optimizer = case.make([p], hyper, optim_bits=state_bits)
    largest = 0.0
    for _ in range(5):
        p.grad = ZERO_ROWS[content](600).to(device)
        before = values(p)
        optimizer.step()
        top = np.abs(values(p.grad)).max()
        is_sum = not case.is_scale_free
        if "trust_coefficient" in hyper and top > 0:  # what is added up is scaled to the norm of the parameter
            is_sum = True
            top *= hyper["trust_coefficient"] * np.linalg.norm(before) / np.linalg.norm(values(p.grad))
        largest = largest + top if is_sum else max(largest, top)  # a sum of gradients, or their mean
        assert np.isfinite(values(p)).all()
        unmoved = values(p.grad) == 0
        assert (values(p)[unmoved] == before[unmoved]).all(), "an element without gradient moved"
        for name, new in moments(optimizer, case, p).items():
            assert np.isfinite(new.value).all(), name
            most = largest + (hyper[case.least[name]] if name in case.least else 0.0)
            assert (np.abs(new.value) <= most * (1 + 2.0**-20) + 2.0**-148).all(), name
    # A normal gradient afterwards works as if nothing had been.
    p.grad = torch.full((600,), 0.5, device=device)
    optimizer.step()
    assert np.isfinite(values(p)).all()


@given(seed=st.integers(0, 2**31), row=st.integers(0, 2), zeros=st.lists(st.integers(0, 599), min_size=1, max_size=300))
@pytest.mark.parametrize("state_bits", [8, 16, 32])
@ALL
def test_without_gradient_only_weight_decay_moves(
    case: Case, state_bits: int, seed: int, row: int, zeros: list[int], device: torch.device
) -> None:
    hyper = dict(case.hypers[row])
    if case.decay_in_gradient:
        hyper["weight_decay"] = 0.0  # there decay is gradient
    hyper |= dict.fromkeys(case.initial.values(), 0.0)
    rng = np.random.default_rng(seed)
    p = parameter(torch.from_numpy(rng.standard_normal(600)).float().to(device))
    start, steps = values(p), 6
    optimizer = case.make([p], hyper, optim_bits=state_bits)
    for _ in range(steps):
        g = rng.standard_normal(600) * 10.0 ** rng.uniform(-9, 3, 600)
        g[zeros] = 0
        p.grad = torch.from_numpy(g).float().to(device)
        optimizer.step()
    factor = (1 - hyper["lr"] * hyper["weight_decay"]) ** steps
    # Each step: the factor rounded to float32 (one rounding, twice that where it is taken apart) and the product.
    roundings = 3 * steps
    if case.has_norms and hyper["weight_decay"]:
        # By how much depends on norms, but is the same for all of them: as the first of them moved, itself rounded.
        factor = values(p)[zeros[0]] / start[zeros[0]]
        roundings *= 2
        assert 0 < factor < 1
    tolerance = roundings * 2.0**-24 * np.abs(start) if hyper["weight_decay"] else 0.0
    assert (np.abs(values(p) - start * factor) <= tolerance)[zeros].all()
    for name, moment in moments(optimizer, case, p).items():
        if name in case.least:
            continue
        assert (moment.value[zeros] == 0).all(), name
        if state_bits == 8:
            codes = codes_of(optimizer.state[p][case.codes(name)])
            assert (codes[zeros] == reference.zero_code(case.states[name])).all(), name
