"""One NaN or infinite gradient element: its own parameter does what torch.optim does, nothing else notices."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import reference
import torch
from cases import Case
from support.harness import ALL, DTYPES, codes_of, moments, parameter, values
from support.pairs import pairwise

BAD = {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf")}
PLACES = {"alone": [0], "block ends": [255, 256], "last": [599], "tail": [512, 599], "the largest of its block": [77]}


def _warm(case: Case, row: int, dtype: torch.dtype, state_bits: int, device: torch.device) -> tuple[Any, Any]:
    """A parameter and its optimizer after three steps; element 77 always had by far its block's largest gradient."""
    rng = np.random.default_rng(row)
    p = parameter(torch.from_numpy(rng.standard_normal(600)).to(device, dtype))
    optimizer = case.make([p], case.hypers[row], optim_bits=state_bits)
    for _ in range(3):
        g = rng.standard_normal(600) * 10.0 ** rng.uniform(-6, 0, 600)
        g[77] = 50
        p.grad = torch.from_numpy(g).to(device, dtype)
        optimizer.step()
    return p, optimizer


def _step(pair: tuple[Any, Any], g: torch.Tensor) -> tuple[Any, Any]:
    p, optimizer = copy.deepcopy(pair)
    p.grad = g
    optimizer.step()
    return p, optimizer


def _as_torch(case: Case, hyper: Mapping[str, Any], p: float, old: float, bad: float) -> float:
    """What the 32-bit optimizer makes of the one parameter, whose old first moment is `old`."""
    if case.torch_class is not None:
        q = parameter(torch.tensor([p], dtype=torch.float32), torch.tensor([bad]))
        case.torch_class([q], **hyper).step()  # a gradient that is not finite decides alone, whatever the state
        return float(q.detach())
    if not all(case.states.values()):
        return float("nan")  # an infinite moment is divided by an infinite one
    g = -bad if hyper.get("maximize") else bad
    if case.has_norms:
        return p - hyper["lr"] * g  # whatever finite factors there are
    # Lion, with torch's own sign: torch.sign(NaN) = 0.
    beta1 = hyper["betas"][0]
    sign = torch.sign(torch.tensor(beta1 * old + (1 - beta1) * g)).item()
    return p * (1 - hyper["lr"] * hyper["weight_decay"]) - hyper["lr"] * sign


@pairwise(bad=BAD, where=PLACES, state_bits=[8, 16, 32], dtype=DTYPES)
@ALL
def test_one_bad_element_stays_one_element(
    case: Case, bad: str, where: str, state_bits: int, dtype: str, device: torch.device
) -> None:
    places = PLACES[where]
    for row, hyper in enumerate(case.hypers):
        pair = _warm(case, row, DTYPES[dtype], state_bits, device)
        rng = np.random.default_rng(99)
        zeroed = torch.from_numpy(rng.standard_normal(600)).to(device, DTYPES[dtype])
        zeroed[places] = 0
        poisoned = zeroed.clone()
        poisoned[places] = BAD[bad]
        old_p, old = values(pair[0]), moments(pair[1], case, pair[0])
        (q, clean), (p, optimizer) = _step(pair, zeroed), _step(pair, poisoned)
        others = np.setdiff1d(np.arange(600), places)
        assert (values(p)[others] == values(q)[others]).all()
        for name, signed in case.states_of(hyper).items():
            ours, theirs = moments(optimizer, case, p)[name].value, moments(clean, case, q)[name].value
            assert (ours[others] == theirs[others]).all(), name
            if state_bits == 8:
                codes = codes_of(optimizer.state[p][case.codes(name)])
                assert (codes[others] == codes_of(clean.state[q][case.codes(name)])[others]).all(), name
                assert (codes[places] == reference.zero_code(signed)).all(), name
                absmax = values(optimizer.state[p][case.absmax(name)])
                assert (absmax == values(clean.state[q][case.absmax(name)])).all(), name
        for i in places:
            expected = _as_torch(case, hyper, old_p[i], old[case.state].value[i], BAD[bad])
            actual = values(p)[i]
            # Two roundings in float32 (decay, step), one to the parameter's dtype.
            unit = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
            tolerance = (4 * 2.0**-24 + unit) * (abs(old_p[i]) + hyper["lr"])
            same = np.isnan(actual) if np.isnan(expected) else actual == expected
            assert same or abs(actual - expected) <= tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", BAD)
@ALL
def test_the_steps_after_a_bad_element_are_sound(case: Case, bad: str, dtype: str, device: torch.device) -> None:
    """Ten steps after one bad gradient no other parameter is off by a bit, and no state is NaN or infinite. Norms of a
    tensor go on without the parameter that is lost, so there the others take the same way at another pace."""
    pair = _warm(case, 0, DTYPES[dtype], 8, device)
    rng = np.random.default_rng(5)
    grads = [torch.from_numpy(rng.standard_normal(600)).to(device, DTYPES[dtype]) for _ in range(10)]
    ends = []
    for value in (0.0, BAD[bad]):
        p, optimizer = copy.deepcopy(pair)
        for i, g in enumerate(grads):
            p.grad = g.clone()
            p.grad[300] = value if i == 0 else 0.0
            optimizer.step()
            for name, moment in moments(optimizer, case, p).items():
                assert np.isfinite(moment.value).all(), name
        ends.append(values(p))
    others = np.arange(600) != 300
    if case.has_norms:
        start = values(pair[0])
        moved = [end[others] - start[others] for end in ends]
        assert np.abs(moved[1]).max() > 0
        # One of 600 norms' squares: a share of some hundredths at most where all are of one size.
        assert np.linalg.norm(moved[1] - moved[0]) < 0.1 * np.linalg.norm(moved[0])
    else:
        assert (ends[0] == ends[1])[others].all()


@ALL
def test_a_block_of_nothing_but_bad_elements(case: Case, device: torch.device) -> None:
    p = parameter(torch.ones(600, device=device))
    optimizer = case.make([p], case.hypers[0])
    p.grad = torch.ones(600, device=device)
    p.grad[256:512] = float("nan")
    optimizer.step()
    assert np.isfinite(values(p)[:256]).all()
    assert np.isfinite(values(p)[512:]).all()
    for name, moment in moments(optimizer, case, p).items():
        assert np.isfinite(moment.value).all(), name
        assert (moment.value[256:512] == 0).all(), name


@pytest.mark.parametrize("huge", [1e30, -3e38])
@ALL
def test_a_huge_finite_gradient_leaves_the_others_finite(case: Case, huge: float, device: torch.device) -> None:
    """Its square overflows. The others of its block lose small moments, which is what a block maximum means."""
    p, optimizer = _warm(case, 0, torch.float32, 8, device)
    scale = np.ones(600)
    if not case.is_scale_free:  # an update is as large as the gradients that its own element had
        scale[[77, 300]] = 50, abs(huge)
    for i in range(5):
        p.grad = torch.full((600,), 0.1, device=device)
        p.grad[300] = huge if i == 0 else 0.0
        before = values(p)
        optimizer.step()
        moved = np.abs(values(p) - before)
        assert np.isfinite(values(p)).all()
        for name, moment in moments(optimizer, case, p).items():
            assert np.isfinite(moment.value).all(), name
        limit = 20 * case.hypers[0]["lr"] * scale + 0.1 * np.abs(before)
        assert (moved <= limit).all(), "an update grew out of all proportion"


@pytest.mark.parametrize("state_bits", [8, 16, 32])
@ALL
def test_an_infinite_parameter_without_weight_decay_is_no_bad_element(
    case: Case, state_bits: int, device: torch.device
) -> None:
    """torch.optim skips a weight decay of 0, so 0 times infinity never arises: moments and others stay finite."""
    p = parameter(torch.ones(300, device=device), torch.linspace(0.5, 1, 300, device=device))
    with torch.no_grad():
        p[7] = float("inf")
    optimizer = case.make([p], case.without_decay(), optim_bits=state_bits)
    for _ in range(2):
        optimizer.step()
    assert p.detach()[7] == float("inf")
    for moment in moments(optimizer, case, p).values():
        assert np.isfinite(moment.value).all()
        assert moment.value[7] != 0
