"""Orthogonalization of matrices by a Newton-Schulz iteration, and what goes with it in a step: its options, and how far
one goes along the result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, Literal, TypeAlias, get_args

import torch

Coefficients: TypeAlias = Sequence[float]
Adjustment: TypeAlias = Literal["original", "match_rms_adamw", "spectral_unclamped"]
ADJUSTMENTS = get_args(Adjustment)
MOST_STEPS = 99  # as torch.optim


def normalize_options(owner: str, group: dict[str, Any]) -> None:
    """Check the options of a parameter group that are not numbers, and store them as plain ones: the coefficients as a
    tuple of floats, the number of iterations as an int.

    Raises:
        ValueError, TypeError: the first option that cannot be honoured.
    """
    given = group["ns_coefficients"]
    numbers = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else []
    if len(numbers) != 3 or not all(isinstance(each, Real) and math.isfinite(each) for each in numbers):
        raise ValueError(
            f"{owner}: ns_coefficients must be three finite numbers, the factors of X, X^3 and X^5 in an iteration, "
            f"got {given!r}. The default is (3.4445, -4.775, 2.0315)."
        )
    steps = group["ns_steps"]
    if isinstance(steps, bool) or not isinstance(steps, Integral):
        raise TypeError(f"{owner}: ns_steps must be a whole number of iterations, got {steps!r}.")
    if not 0 <= int(steps) <= MOST_STEPS:
        raise ValueError(f"{owner}: ns_steps must be from 0 to {MOST_STEPS}, got {steps}. 5 is usual.")
    adjust = group["adjust_lr_fn"]
    if adjust is not None and adjust not in ADJUSTMENTS:
        known = ", ".join(map(repr, ADJUSTMENTS))
        raise ValueError(f"{owner}: adjust_lr_fn must be None (as 'original') or one of {known}, got {adjust!r}.")
    group["ns_coefficients"], group["ns_steps"] = tuple(map(float, numbers)), int(steps)


def lr_factor(adjust: Adjustment | None, shape: Sequence[int]) -> float:
    """By what a step along an orthogonal matrix multiplies the learning rate.

    "original", or None: sqrt(max(1, rows / columns)) (Jordan et al. 2024). "match_rms_adamw": 0.2 sqrt(max(rows,
    columns)), a step as large in the mean square as AdamW's (Liu et al., arXiv 2502.16982, equation 4).
    "spectral_unclamped": sqrt(rows / columns) (Bernstein 2025, "Deriving Muon").

    Args:
        shape: of the parameter; rows and columns are the last two, neither of them 0.
    """
    rows, columns = shape[-2:]
    if adjust == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    ratio = rows / columns
    return math.sqrt(ratio if adjust == "spectral_unclamped" else max(1.0, ratio))


def orthogonalize(matrices: torch.Tensor, coefficients: Coefficients, steps: int, eps: float) -> torch.Tensor:
    """Move the singular values of each matrix towards 1, and keep its singular vectors (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon; Bernstein and Newhouse, arXiv 2409.20325, appendix A).

    A matrix X is divided by its Frobenius norm, and each iteration makes it a X + b (X X^T) X + c (X X^T)^2 X, all in
    bfloat16. Five iterations with torch.optim's coefficients bring a singular value of at least 1 % of the norm to
    between 0.68 and 1.14, within the rounding of bfloat16; what is far below that is nothing but this rounding. What
    comes of one matrix does not depend on the values of the others; torch may sum its products in another order where
    there are other numbers of them.

    Args:
        matrices: (count, rows, columns), bfloat16. Left as it is.
        coefficients: a, b, c.
        steps: iterations.
        eps: the least that a matrix is divided by.

    Returns:
        (count, rows, columns), bfloat16.
    """
    if matrices.numel() == 0:
        return matrices.clone()
    a, b, c = coefficients
    # The product X X^T is then the smaller of the two that could be taken.
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if tall else matrices
    # Of each by itself: a sum over a batch may run in another order.
    norms = torch.stack([matrix.norm() for matrix in x])
    x = x / norms.clamp(min=eps)[:, None, None]
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
