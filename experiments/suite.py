"""The table of optimizers in docs/optimizers.md, from the table of rules: what torch.optim calls each, what its state
takes, and what differs."""

from __future__ import annotations

import torch

from optim8 import optim, rules
from optim8.optim import BlockwiseOptimizer
from optim8.rules import Rule
from optim8.state.layout import layout_of

_SIZE = 2**24  # values of a parameter that shows the bytes: the count of steps is none of them

# By rule: what somebody who comes from the namesake, or from another library, must know besides the state's precision.
DIFFERS = {
    "adam": "torch's `decoupled_weight_decay=True` is `AdamW8bit`",
    "adamw": "nothing",
    "sgd": "`momentum=0` keeps no state; a `momentum` that is set later starts with that step's gradient, as in torch",
    "rmsprop": "the two averages of `centered` are subtracted, and so have 16 bits",
    "adagrad": "the sums are made at the first step of a parameter, not with the optimizer; no sparse gradients",
    "adadelta": "nothing",
    "adamax": "nothing",
    "nadam": "nothing",
    "radam": "nothing",
    "lion": "as lion-pytorch's and bitsandbytes', without their way to say a decoupled weight decay",
    "ademamix": "names and defaults of bitsandbytes; the slow moment has 16 bits, since a step changes it by "
    "far less than a code of 8",
    "lamb": "no clip and no cap, both bias corrections, decay inside the ratio; a ratio for every tensor, 1 where the "
    "norm of the parameter or of the update is 0; without a gradient a decay shrinks weights by `lr`, whatever it is",
    "lars": "`lr` stays outside of the momentum, so that a change of it acts at once; ratio 1 where the norm of the "
    "parameter is 0",
    "muon": "stacks of matrices (3-D) as well; groups with `use_muon=False` step as AdamW; what is no matrix is "
    'refused when it is given; `adjust_lr_fn="spectral_unclamped"` on every torch',
}


def optimizers() -> list[type[BlockwiseOptimizer]]:
    """The classes with 8-bit state, one for each rule, in the order of the rules."""
    classes = [getattr(optim, name) for name in optim.__all__ if name.endswith("8bit")]
    order = [rule.family for rule in rules.every().values()]
    return sorted((cls for cls in classes if not cls.always_paged), key=lambda cls: order.index(cls.rule))


def bytes_of(variant: Rule) -> float:
    """Bytes of 8-bit state for each value of a large parameter."""
    param = torch.empty(_SIZE, device="meta")
    return layout_of(variant.moments, param, 8).nbytes / _SIZE


def _bytes(family: str) -> str:
    """Of each variant of a rule, with the option that selects it."""
    cells = []
    for variant in rules.every().values():
        if variant.family == family:
            option = variant.name.removeprefix(family).replace("_", " ").strip()
            cells.append(f"{option} {bytes_of(variant):.2f}".strip() + f" ({4 * len(variant.moments)})")
    return ", ".join(cells)


def render() -> str:
    """The table.

    Raises:
        ValueError: DIFFERS says nothing of a rule.
    """
    headers = ["torch.optim", "optim8", "bytes a parameter in 8 bits (in float32)", "what differs"]
    rows = [headers, ["---"] * len(headers)]
    for cls in optimizers():
        if cls.rule not in DIFFERS:
            raise ValueError(f"suite: DIFFERS must say what {cls.rule} does unlike others. Add it.")
        namesake = rules.rule(cls.rule).torch_name
        cells = [f"`torch.optim.{namesake}`" if namesake else "none", f"`{cls.__name__}`", _bytes(cls.rule)]
        rows.append([*cells, DIFFERS[cls.rule]])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
