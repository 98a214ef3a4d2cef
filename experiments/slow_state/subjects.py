"""The optimizers of a rule: with 32-bit state, ours with 8-bit state, and the peers'; and what their state holds."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import math
from typing import TYPE_CHECKING, Any

import torch
from shared.subjects import PEERS, Make, optimizers
from torch import Tensor

from slow_state.cases import BLOCK, Case

if TYPE_CHECKING:
    from optim8.rules import Moment, Rule

OURS = "optim8 dithered"
SUBJECTS = (OURS, "optim8 nearest", *PEERS)


def optimizer_of(rule: Rule) -> Any:
    """Our optimizer with this rule and 8-bit state."""
    return next(make for make in optimizers() if getattr(make, "rule", None) == rule.family)


def selection(rule: Rule) -> dict[str, Any]:
    """The options that make an optimizer step by this variant of its rule."""
    from optim8 import rules

    choices = [[(name, value) for value in values] for name, values in _SWITCHES.items() if rule.has(name)]
    defaults = {hyper.name: hyper.default for hyper in rule.hypers}
    options = map(dict, itertools.product(*choices))
    return next(chosen for chosen in options if rules.variant(rule.family, {**defaults, **chosen}) == rule)


def label(rule: Rule) -> str:
    """Our optimizer's name, with the options that select a variant of its rule."""
    defaults = {hyper.name: hyper.default for hyper in rule.hypers}
    variants = rule.name != rule.family
    chosen = [f"{name}={value}" for name, value in selection(rule).items() if variants and value != defaults[name]]
    return " ".join([optimizer_of(rule).__name__, *chosen])


_SWITCHES: dict[str, tuple[Any, ...]] = {"momentum": (0.9, 0.0), "amsgrad": (False, True), "centered": (False, True)}


def is_followed(rule: Rule) -> bool:
    """Whether it has state, and steps each element by itself."""
    from optim8 import rules

    of_matrices = {each.family for each in rules.every().values() if each.gives_direction}
    return bool(rule.moments) and rule.family not in of_matrices


def reference(rule: Rule) -> Make:
    """The same rule with float32 state: torch's where it has one."""
    if rule.torch_name is not None:
        make: Make = getattr(torch.optim, rule.torch_name)
        return make
    return functools.partial(optimizer_of(rule), optim_bits=32)


def subjects(rule: Rule, peers: bool, bits: int = 8) -> dict[str, Make]:
    """The 8-bit optimizers of this rule that are here; `bits`: of ours."""
    ours = optimizer_of(rule)
    found: dict[str, Make] = {
        f"optim8 {rounding}": functools.partial(ours, rounding=rounding, optim_bits=bits)
        for rounding in ("dithered", "nearest")
    }
    for library in PEERS if peers else ():
        if importlib.util.find_spec(library):
            make = getattr(importlib.import_module(f"{library}.optim"), ours.__name__, None)
            if make is not None:
                found[library] = make
    return found


def options(rule: Rule, case: Case) -> dict[str, Any]:
    """Learning rate 1, and nothing that hides the state: neither a decay nor an `eps` of notice."""
    found: dict[str, Any] = {"lr": 1.0, "weight_decay": 0.0, **selection(rule)}
    if rule.has("eps") and not rule.has("rho"):  # Adadelta's first steps are as long as its eps lets them be
        found["eps"] = 1e-15
    if rule.has("betas"):
        beta1, beta2, *more = next(hyper.default for hyper in rule.hypers if hyper.name == "betas")  # type: ignore[misc]
        found["betas"] = (beta1, case.beta2 or beta2, *more)
    return found


def decoded(state: dict[str, Any], moment: Moment, number: int) -> Tensor:
    """The values of a rule's moment, its `number`th, in the state of one parameter, whosever optimizer it is."""
    from optim8 import functional
    from optim8.state.moments import source_of, values

    if moment.codes in state:
        return values(moment, source_of(moment, state), torch.device("cpu"))
    if f"qmap{number}" in state:  # bitsandbytes
        codes, absmax, code = (state[f"{name}{number}"] for name in ("state", "absmax", "qmap"))
        return functional.dequantize_blockwise(codes, absmax=absmax, code=code, blocksize=BLOCK)
    held: Tensor = state[moment.name]  # torch, or torchao's subclass of a tensor
    return held if type(held) is Tensor else held.dequantize()


class Walk:
    """An optimizer under way.

    Its parameters are set to 0 before each step. So they then hold that step's update, and nothing is lost in a sum.
    """

    def __init__(self, make: Make, blocks: int, **options: Any) -> None:
        self.parameter = torch.nn.Parameter(torch.zeros(blocks, BLOCK))
        self.parameter.grad = torch.zeros(blocks, BLOCK)
        self.optimizer = make([self.parameter], **options)
        # Displacement and length since the last checkpoint, and the length up to there.
        self.displacement, self.length, self.before = (torch.zeros(blocks, BLOCK) for _ in range(3))

    @torch.no_grad()
    def step(self, gradient: Tensor) -> None:
        assert self.parameter.grad is not None
        self.parameter.zero_()
        self.parameter.grad.copy_(gradient)
        self.optimizer.step()
        self.displacement -= self.parameter  # positive where the gradient is
        self.length += self.parameter.abs()

    def moments(self, rule: Rule) -> list[Tensor]:
        state = self.optimizer.state[self.parameter]
        return [decoded(state, moment, number) for number, moment in enumerate(rule.moments, 1)]

    @property
    def path(self) -> Tensor:
        """The length from the start, of each value."""
        return self.before + self.length

    def start_anew(self) -> None:
        self.before += self.length
        self.displacement.zero_()
        self.length.zero_()


def compare(walk: Walk, exact: Walk, rule: Rule, case: Case) -> dict[str, dict[str, Any]]:
    """How a walk relates to that with float32 state since the last checkpoint, for each half of the values.

    length: sum of the magnitudes of all updates, over the exact one.
    slope: of the parameters' displacements, against the exact ones; noise of single elements leaves it at 1.
    displacement: their mean.
    path_error: of each value the path, the sum of the magnitudes of its updates from the start on, is off by some share
        of the exact one; this is the 95 % quantile of that.
    moments: of an unsigned one, mean and quantiles of the ratio to the exact one, where that is not 0; of a signed one,
        the slope.
    """
    moments = list(zip(rule.moments, walk.moments(rule), exact.moments(rule)))
    found = {}
    for part, its in case.parts().items():
        found[part] = {
            "length": (walk.length[its].sum() / exact.length[its].sum()).item(),
            "slope": slope(walk.displacement[its], exact.displacement[its]),
            "displacement": walk.displacement[its].mean().item(),
            "path_error": path_error(walk.path[its], exact.path[its]),
            "moments": {
                moment.name: {"slope": slope(x[its], y[its])} if moment.signed else spread(x[its], y[its])
                for moment, x, y in moments
            },
        }
    return found


def slope(x: Tensor, exact: Tensor) -> float:
    return ((x.double() * exact).sum() / (exact.double() ** 2).sum()).item()


def path_error(path: Tensor, exact: Tensor) -> float:
    moved = exact > 0
    errors = (path[moved] / exact[moved] - 1).abs()
    return errors.quantile(0.95).item() if len(errors) else math.nan


def spread(x: Tensor, exact: Tensor) -> dict[str, float]:
    ratios = (x / exact)[exact != 0]
    if not len(ratios):
        return dict.fromkeys(("mean", "lower", "upper"), math.nan)
    lower, upper = ratios.quantile(torch.tensor([0.05, 0.95])).tolist()
    return {"mean": ratios.mean().item(), "lower": lower, "upper": upper}
