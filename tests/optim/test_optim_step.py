"""One step from given states against the float64 reference, within what float32 rounding allows (rounding.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from cases import CASES, EVERY, Case, exported_names
from support.harness import (
    ALL,
    DTYPES,
    SIZES,
    assert_step,
    before_step,
    hostile,
    load_state,
    parameter,
    random_state,
    set_grad,
)
from support.pairs import pairwise

DTYPE_PAIRS = [
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("bfloat16", "float32"),
    ("float16", "float16"),
    ("float16", "float32"),
]
STEPS_BEFORE = (1, 9, 999, 250_000)  # beta^t from near 1 to 0


def test_every_exported_optimizer_is_in_the_table() -> None:
    assert exported_names() == set(CASES), "tests/cases.py needs one row per optimizer that optim8 exports"


FORMS = [(8, "dithered"), (8, "nearest"), (16, "dithered"), (16, "nearest"), (32, "nearest")]


@pairwise(state_bits__rounding=FORMS, p_dtype__g_dtype=DTYPE_PAIRS, row=range(3))
@ALL
def test_one_step_from_given_states(
    case: Case, row: int, p_dtype: str, g_dtype: str, state_bits: int, rounding: str, device: torch.device
) -> None:
    hyper = case.hypers[row]
    for t in STEPS_BEFORE:
        tensors = [
            parameter(
                hostile(n, DTYPES[p_dtype], seed=n + t, small=-6, large=1).to(device),
            )
            for n in SIZES
        ]
        for n, p in zip(SIZES, tensors, strict=True):
            set_grad(p, hostile(n, DTYPES[g_dtype], seed=2 * n + t).to(device))
        optimizer = case.make(tensors, hyper, optim_bits=state_bits, rounding=rounding)
        states = {i: random_state(case, n, state_bits, t, 3 * n + t, hyper) for i, n in enumerate(SIZES)}
        load_state(optimizer, states)
        before = [before_step(optimizer, case, p) for p in tensors]
        optimizer.step()
        for p, b in zip(tensors, before, strict=True):
            assert_step(optimizer, case, p, b, hyper, t + 1)


@pairwise(state_bits__rounding=FORMS, p_dtype=DTYPES, row=range(3))
@ALL
def test_the_first_steps_from_nothing(
    case: Case, row: int, p_dtype: str, state_bits: int, rounding: str, device: torch.device
) -> None:
    hyper = case.hypers[row]
    tensors = [parameter(hostile(n, DTYPES[p_dtype], seed=n, small=-6, large=1).to(device)) for n in SIZES]
    optimizer = case.make(tensors, hyper, optim_bits=state_bits, rounding=rounding)
    for t in (1, 2, 3):
        for n, p in zip(SIZES, tensors, strict=True):
            p.grad = hostile(n, DTYPES[p_dtype], seed=5 * n + t).to(device)
        before = [before_step(optimizer, case, p) for p in tensors]
        optimizer.step()
        for p, b in zip(tensors, before, strict=True):
            assert_step(optimizer, case, p, b, hyper, t)


@ALL
def test_a_large_tensor(case: Case, device: torch.device) -> None:
    """A size that is shared between threads, with a short last block."""
    n, hyper = 100_003, case.hypers[0]
    p = parameter(hostile(n, torch.float32, seed=1, small=-6, large=1).to(device))
    optimizer = case.make([p], hyper)
    for t in (1, 2):
        p.grad = hostile(n, torch.float32, seed=7 + t).to(device)
        before = before_step(optimizer, case, p)
        optimizer.step()
        assert_step(optimizer, case, p, before, hyper, t)


def _doubled(hyper: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = hyper[name]
    if isinstance(value, bool):
        return {**hyper, name: not value}
    if isinstance(value, tuple):
        return {**hyper, name: tuple(0.9 * b + 0.05 for b in value)}
    return {**hyper, name: 0.9 * value + 0.05 if 0.5 < value < 1 else 2 * value + 1e-3}  # rates stay below 1


@pytest.mark.parametrize(
    ("case", "wrong"),
    [
        (case, wrong)
        for case in EVERY
        for wrong in (*case.hypers[0], "maximize", "t")
        if wrong not in case.initial.values()  # of the first step
    ],
    ids=str,
)
def test_the_comparison_can_fail(case: Case, wrong: str, device: torch.device) -> None:
    """Each scalar of the step is noticed when the reference is given another one, so none is ignored unnoticed."""
    n, t, hyper = 4095, 9, dict(case.hypers[0])
    p = parameter(hostile(n, torch.float32, seed=1, small=-6, large=1).to(device))
    p.grad = hostile(n, torch.float32, seed=2, small=-3).to(device)
    optimizer = case.make([p], hyper)
    load_state(optimizer, {0: random_state(case, n, 8, t - 1, seed=3)})
    before = before_step(optimizer, case, p)
    optimizer.step()
    assert_step(optimizer, case, p, before, hyper, t)
    other = {**hyper, "maximize": True} if wrong == "maximize" else hyper if wrong == "t" else _doubled(hyper, wrong)
    with pytest.raises(AssertionError):
        assert_step(optimizer, case, p, before, other, t + (wrong == "t"))
