"""Adam's moments in 8 bits one at a time: which of the two moves steps, and what keeping the root of v changes.

Here a step is torch's arithmetic on float32 moments. Between two steps those that a form names are stored as
AdamW8bit's dithered rounding stores them, or v itself is instead of its root.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from slow_state.cases import BLOCK, DEEP_FALL, SMALL, SPREAD, STEADY, Case, gradients
from slow_state.subjects import OURS

BETA1, BETA2, EPS = 0.9, 0.999, 1e-15
M, ROOT, V = "m", "root of v", "v"
BOTH, DIRECT = (M, ROOT), (M, V)
FORMS = ((M,), (ROOT,), (V,), BOTH, DIRECT)  # what is in 8 bits
CASES = (STEADY, *SMALL, *SPREAD, DEEP_FALL)
ORDINARY = Case("scales lognormal, sigma 0.3", sigma=0.3)  # as within the blocks of most tensors
MOST = 1.1  # error of an update with the root, over that with v

Moments = tuple[Tensor, Tensor]


def name(form: Sequence[str]) -> str:
    return " and ".join(form)


def stored(form: Sequence[str], moments: Moments, step: int) -> Moments:
    """Both moments after encoding and decoding what the form names."""
    m, v = moments
    if M in form:
        m = _through(m, signed=True, step=step, place=0)
    if ROOT in form:
        v = _through(v.sqrt(), signed=False, step=step, place=1).square_()
    elif V in form:
        v = _through(v, signed=False, step=step, place=1)
    return m, v


def _through(values: Tensor, *, signed: bool, step: int, place: int) -> Tensor:
    from optim8 import codec

    numbers = torch.arange(values.shape[0])
    codes, absmax = codec.quantize_dithered(values.reshape(-1), numbers, signed=signed, step=step, place=place)
    return codec.dequantize(codes, absmax, signed=signed).view_as(values)


def advance(moments: Moments, gradient: Tensor) -> None:
    moments[0].lerp_(gradient, 1 - BETA1)
    moments[1].lerp_(gradient * gradient, 1 - BETA2)


def update(moments: Moments) -> Tensor:
    """Of either sign, and without the corrections of the first steps, which are the same for all forms."""
    return moments[0] / (moments[1].sqrt() + EPS)


def fresh(blocks: int) -> Moments:
    m, v = torch.zeros(2, blocks, BLOCK)
    return m, v


def lengths(
    case: Case, blocks: int, steps: int, changed_after: int, seed: int, tick: Callable[[], object]
) -> list[float]:
    """For each form the lengths of the changed half's steps over those of float32 moments, in the last sixth."""
    exact, exact_length = fresh(blocks), torch.zeros(blocks, BLOCK)
    found = [fresh(blocks) for _ in FORMS]
    length = [torch.zeros(blocks, BLOCK) for _ in FORMS]
    for step, gradient in enumerate(gradients(case, blocks, steps, changed_after, seed), 1):
        advance(exact, gradient)
        is_counted = step > steps - steps // 6
        if is_counted:
            exact_length += update(exact).abs()
        for at, form in enumerate(FORMS):
            advance(found[at], gradient)
            if is_counted:
                length[at] += update(found[at]).abs()
            found[at] = stored(form, found[at], step)
        tick()
    its = case.parts()["changed"]
    return [(each[its].sum() / exact_length[its].sum()).item() for each in length]


def one_step(
    blocks: int, steps: int, checkpoints: Sequence[int], seed: int, tick: Callable[[], object]
) -> list[list[float]]:
    """For each form and checkpoint what storing float32 moments once does to the update that they make: root of the
    mean square of the error over that of the update."""
    exact, errors = fresh(blocks), [list[float]() for _ in FORMS]
    for step, gradient in enumerate(gradients(ORDINARY, blocks, steps, steps, seed), 1):
        advance(exact, gradient)
        if step in checkpoints:
            right = update(exact)
            for form, its in zip(FORMS, errors):
                its.append(((update(stored(form, exact, step)) - right).norm() / right.norm()).item())
        tick()
    return errors


def measure(
    blocks: int,
    steps: int,
    checkpoints: Sequence[int],
    changed_after: int,
    seed: int,
    tick: Callable[[], object],
    figure: Callable[[float], float | None],
) -> dict[str, Any]:
    """Both, by the forms' names."""
    by_case = {case.name: lengths(case, blocks, steps, changed_after, seed, tick) for case in CASES}
    errors = one_step(blocks, steps, checkpoints, seed, tick)
    return {
        "lengths": [
            {"case": case, **{name(form): figure(value) for form, value in zip(FORMS, values)}}
            for case, values in by_case.items()
        ],
        "one_step": {name(form): [figure(value) for value in values] for form, values in zip(FORMS, errors)},
    }


def steps_of(steps: int) -> int:
    """How many steps `measure` takes, each of which ticks."""
    return (len(CASES) + 1) * steps


def judged(one_step: dict[str, list[Any]]) -> dict[str, Any]:
    """The goal for a single step, in the form of those in goals.py."""
    ratios = [root / direct for root, direct in zip(one_step[name(BOTH)], one_step[name(DIRECT)])]
    return {
        "what": "error of the update over one step, over that with v itself dithered",
        "case": ORDINARY.name,
        "least": 0.0,
        "most": MOST,
        "ranges": {OURS: [min(ratios), max(ratios)]},
        "reached": max(ratios) <= MOST,
    }
