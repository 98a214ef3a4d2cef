"""Gradients of a long run: the optimizers that are compared all see the same ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 256  # values, a row of the parameter
Index = tuple[slice, slice]
MEAN = 0.3  # of the gradients, over their deviation: parameters have a direction


@dataclass(frozen=True)
class Case:
    """Random gradients, and what becomes of the scale of the changed half: every second value of each block.

    small: the factor on its gradients, all the time.
    once_in: its gradients are 0 but for one step in so many, at random, for each value on its own.
    sigma: of the lognormal scales of all gradients; each value has its own, all the time.
    change: the factor by which its gradients change at once, after the step that `long_run.py` says.
    drift: the factor by which they have changed at the end, bit by bit.
    constant: no random gradients; always -1 for the changed half, and 1 for the others.
    by_block: the changed half is every second block.
    beta2: of the second moment; a rule that has none leaves the case out. None: the rule's default.
    times: it takes so many times as many steps, and so do its checkpoints; what changes at once changes as early.
    every_rule: whether all rules take it, not only the one that is looked at closely.
    """

    name: str
    small: float = 1.0
    once_in: int = 1
    sigma: float = 0.0
    change: float = 1.0
    drift: float = 1.0
    constant: bool = False
    by_block: bool = False
    beta2: float | None = None
    times: int = 1
    every_rule: bool = False

    def parts(self) -> dict[str, Index]:
        """The changed half of the values, and the others."""
        every, odd, even = slice(None), slice(1, None, 2), slice(0, None, 2)
        return {
            "changed": (odd, every) if self.by_block else (every, odd),
            "others": (even, every) if self.by_block else (every, even),
        }

    def scale(self, step: int, changed_after: int, steps: int) -> float:
        """The factor on gradients of the changed half."""
        return self.small * (self.change if step > changed_after else 1.0) * float(self.drift ** (step / steps))


STEADY = Case("nothing changes", every_rule=True)
FALL = Case("half fall to 1/10", change=0.1, every_rule=True)
DEEP_FALL = Case("half fall to 1/100", change=0.01, every_rule=True)
LONG_FALL = Case("half fall to 1/100, longer", change=0.01, times=3)  # v is down after 9 of its time constants
DOUBLE = Case("half double", change=2.0)
RISE_SLOWLY = Case("half rise slowly, 10 times", drift=10.0)
FALL_SLOWLY = Case("half fall slowly, to 1/10", drift=0.1)
# The first loses what the code lacks at -1, once. In the second the block's absmax loses it in every step.
CONSTANT = Case("-1 and 1 in each block", constant=True, every_rule=True)
CONSTANT_BLOCKS = Case("blocks of -1, blocks of 1", constant=True, by_block=True, every_rule=True)
# What a block holds side by side.
SMALL = tuple(
    Case(f"half have gradients of {size}", small=float(size))
    for size in ("0.1", "0.01", "1e-3", "1e-4", "1e-5", "1e-6")
)
SPREAD = tuple(Case(f"scales lognormal, sigma {sigma:g}", sigma=sigma) for sigma in (1.5, 2.0, 3.0))
RARE = tuple(Case(f"half get a gradient once in {steps} steps", once_in=steps) for steps in (50, 100, 500))
RARE_AND_SMALL = Case("half get one of 1/30 once in 100 steps", once_in=100, small=1 / 30)
CASES = (
    STEADY,
    FALL,
    DEEP_FALL,
    LONG_FALL,
    DOUBLE,
    RISE_SLOWLY,
    FALL_SLOWLY,
    *(
        Case(f"beta2 {beta2}, {case.name}", change=case.change, beta2=beta2)
        for beta2 in (0.95, 0.9999)
        for case in (STEADY, FALL)
    ),
    CONSTANT,
    CONSTANT_BLOCKS,
    *SMALL,
    *SPREAD,
    *RARE,
    RARE_AND_SMALL,
)


def gradients(case: Case, blocks: int, steps: int, changed_after: int, seed: int) -> Iterator[Tensor]:
    """Those of each step; the tensor is the same every time, to be copied. Cases differ by the scale alone."""
    generator, of_scales = (torch.Generator().manual_seed(each) for each in (seed, seed + 1))
    gradient = torch.ones(blocks, BLOCK)
    changed = gradient[case.parts()["changed"]]
    scales = torch.randn(gradient.shape, generator=of_scales).mul_(case.sigma).exp_()
    for step in range(1, steps + 1):
        if case.constant:
            changed.fill_(-1)
        else:
            torch.randn(gradient.shape, generator=generator, out=gradient)
            gradient += MEAN
            gradient *= scales
            changed *= case.scale(step, changed_after, steps)
            if case.once_in > 1:
                changed *= torch.rand(changed.shape, generator=of_scales) < 1 / case.once_in
        yield gradient
