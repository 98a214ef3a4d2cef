"""The Newton-Schulz iteration of Muon8bit: against float64, torch.optim.Muon, and stacks against single matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
import torch
from support.rounding import Rounded

from optim8.step import orthogonal

COEFFICIENTS = (3.4445, -4.775, 2.0315)
# Of larger matrices torch's products depend on how it splits them: not the same alone, in a stack and transposed.
SHAPES = [(1, 1), (1, 9), (9, 1), (6, 4), (33, 17), (64, 64), (96, 32), (32, 96)]


def stack_of(shape: tuple[int, int], count: int = 5) -> torch.Tensor:
    """Matrices in bfloat16, ordinary ones, one with tiny values, one of rank 1 and one of zeros."""
    generator = torch.Generator().manual_seed(shape[0] * 1000 + shape[1])
    stack = torch.randn(count, *shape, generator=generator)
    stack[1] *= 1e-20
    stack[2] = stack[2, :1] * stack[2, :, :1]
    stack[3] = 0
    return stack.bfloat16()


def of_torch(matrix: torch.Tensor, **options: Any) -> torch.Tensor:
    """What torch.optim.Muon takes off a parameter of zeros for a gradient at lr 1."""
    param = torch.nn.Parameter(torch.zeros_like(matrix))
    param.grad = matrix.clone()
    torch.optim.Muon([param], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, **options).step()
    return -param.detach()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_stack_gives_the_bits_of_each_matrix_and_of_torch(shape: tuple[int, int]) -> None:
    stack = stack_of(shape)
    kept = stack.clone()
    for steps in (0, 1, 5):
        together = orthogonal.orthogonalize(stack, COEFFICIENTS, steps, 1e-7)
        assert torch.equal(stack, kept)
        assert together.dtype == torch.bfloat16
        for each, alone in zip(together, stack, strict=True):
            assert torch.equal(each, orthogonal.orthogonalize(alone[None], COEFFICIENTS, steps, 1e-7)[0])
            # A float32 gradient, so that torch keeps its buffer; its values are those of bfloat16. A factor of 1.
            square_or_wide = alone.float() if shape[0] <= shape[1] else None
            if square_or_wide is not None:
                assert torch.equal(each.float(), of_torch(square_or_wide, ns_steps=steps))
    assert not together[3].any(), "zeros stay zeros"


@pytest.mark.parametrize("shape", [(96, 32), (9, 1)], ids=str)
def test_transposing_a_rectangle_transposes_the_result(shape: tuple[int, int]) -> None:
    stack = stack_of(shape)
    result = orthogonal.orthogonalize(stack, COEFFICIENTS, 5, 1e-7)
    assert torch.equal(result, orthogonal.orthogonalize(stack.mT.contiguous(), COEFFICIENTS, 5, 1e-7).mT)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (6, 4), (5, 5), (20, 33), (300, 513), (513, 300)], ids=str)
@pytest.mark.parametrize("coefficients", [COEFFICIENTS, (2.0, -1.5, 0.5)], ids=str)
def test_against_float64(shape: tuple[int, int], coefficients: tuple[float, float, float]) -> None:
    """Each iteration by itself, from what the one before has left: over several the bound on every rounding grows some
    20 times with each, and soon allows anything."""
    for matrix in stack_of(shape):
        given = Rounded.exact(matrix.double().numpy())
        expected = reference.newton_schulz(given, coefficients, 0, 1e-7)
        for steps in range(6):
            both = orthogonal.orthogonalize(torch.stack([matrix, matrix]), coefficients, steps, 1e-7).double().numpy()
            assert (np.abs(both - expected.value) <= expected.error).all()
            got = both[0]
            assert expected.error.max() < 0.15, "a bound that allows anything tests nothing"
            expected = reference.newton_schulz_iteration(Rounded.exact(got), coefficients)


def test_singular_values_end_near_1() -> None:
    """Of a singular value s the iteration makes a s + b s^3 + c s^5; after five of them, 0.68 to 1.14 for every s from
    0.01 to 1. Rounding to bfloat16 adds some percent where these are all of a size, as here."""
    s = np.geomspace(0.01, 1, 10001)
    for _ in range(5):
        s = COEFFICIENTS[0] * s + COEFFICIENTS[1] * s**3 + COEFFICIENTS[2] * s**5
    assert 0.68 < s.min() < s.max() < 1.14
    left, _ = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(1)))
    right, _ = torch.linalg.qr(torch.randn(96, 64, generator=torch.Generator().manual_seed(2)))
    matrix = left @ torch.diag(torch.linspace(0.3, 1, 64)) @ right.T
    result = orthogonal.orthogonalize(matrix[None].bfloat16(), COEFFICIENTS, 5, 1e-7)[0].double()
    values = torch.linalg.svdvals(result)
    assert 0.66 < values.min() < values.max() < 1.18
    # The singular vectors are those of the matrix: what is left beside the diagonal is rounding.
    inside = left.double().T @ result @ right.double()
    assert (inside - torch.diag(torch.diagonal(inside))).norm() < 0.05 * inside.norm()


def test_the_least_divisor() -> None:
    tiny = torch.full((1, 2, 2), 1e-20).bfloat16()
    assert torch.equal(orthogonal.orthogonalize(tiny, COEFFICIENTS, 0, 2.0**-10), tiny * 2**10)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)], ids=str)
def test_matrices_without_values(shape: tuple[int, int]) -> None:
    assert orthogonal.orthogonalize(torch.zeros(2, *shape).bfloat16(), COEFFICIENTS, 5, 1e-7).shape == (2, *shape)


@pytest.mark.parametrize("shape, original, match, spectral", [
    ((64, 16), 2.0, 1.6, 2.0),
    ((16, 64), 1.0, 1.6, 0.5),
    ((7, 64, 16), 2.0, 1.6, 2.0),
])  # fmt: skip
def test_factors_by_hand(shape: tuple[int, ...], original: float, match: float, spectral: float) -> None:
    assert orthogonal.lr_factor(None, shape) == orthogonal.lr_factor("original", shape) == original
    assert orthogonal.lr_factor("match_rms_adamw", shape) == pytest.approx(match, rel=1e-15)
    assert orthogonal.lr_factor("spectral_unclamped", shape) == spectral


@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)], ids=str)
def test_factors_are_those_of_torch(shape: tuple[int, int], adjust: Any) -> None:
    matrix = stack_of(shape)[0].float()
    update = orthogonal.orthogonalize(matrix[None].bfloat16(), COEFFICIENTS, 5, 1e-7)[0].float()
    expected = update * np.float32(orthogonal.lr_factor(adjust, shape))
    assert torch.equal(of_torch(matrix, adjust_lr_fn=adjust), expected)


@pytest.mark.parametrize("options, error, message", [
    ({"ns_coefficients": (1.0, 2.0)}, ValueError, r"Muon8bit: ns_coefficients must be three.*\(1.0, 2.0\)"),
    ({"ns_coefficients": "abc"}, ValueError, "ns_coefficients must be three"),
    ({"ns_coefficients": (1.0, 2.0, float("inf"))}, ValueError, "ns_coefficients must be three finite"),
    ({"ns_coefficients": 3.0}, ValueError, "ns_coefficients must be three"),
    ({"ns_steps": 100}, ValueError, "ns_steps must be from 0 to 99, got 100"),
    ({"ns_steps": -1}, ValueError, "ns_steps must be from 0 to 99, got -1"),
    ({"ns_steps": 2.5}, TypeError, "ns_steps must be a whole number of iterations, got 2.5"),
    ({"ns_steps": True}, TypeError, "ns_steps must be a whole number of iterations, got True"),
    ({"adjust_lr_fn": "rms"}, ValueError, "adjust_lr_fn must be None .* or one of 'original'.*got 'rms'"),
])  # fmt: skip
def test_options_that_cannot_be_honoured(options: dict[str, Any], error: type[Exception], message: str) -> None:
    group = {"ns_coefficients": COEFFICIENTS, "ns_steps": 5, "adjust_lr_fn": None, **options}
    with pytest.raises(error, match=message):
        orthogonal.normalize_options("Muon8bit", group)


def test_options_are_stored_as_plain_numbers() -> None:
    group = {"ns_coefficients": [np.float32(2), -1, 0.5], "ns_steps": np.int64(3), "adjust_lr_fn": "original"}
    orthogonal.normalize_options("Muon8bit", group)
    assert group == {"ns_coefficients": (2.0, -1.0, 0.5), "ns_steps": 3, "adjust_lr_fn": "original"}
    assert type(group["ns_steps"]) is int
