"""THE table of cases: one row per optimizer. Every test that is about all optimizers runs over every row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import reference
import torch

import optim8

ROOTS = frozenset({"exp_avg_sq"})
ADAM_HYPERS: tuple[dict[str, Any], ...] = (
    {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.03},
    {"lr": 0.07, "betas": (0.95, 0.9995), "eps": 1e-12, "weight_decay": 0.0, "maximize": True},
    {"lr": 2e-4, "betas": (0.0, 0.5), "eps": 0.0, "weight_decay": 0.2, "maximize": True},
)
LION_HYPERS: tuple[dict[str, Any], ...] = (
    {"lr": 3e-3, "betas": (0.8, 0.95), "weight_decay": 0.3},
    {"lr": 0.05, "betas": (0.95, 0.9995), "weight_decay": 0.0, "maximize": True},
    {"lr": 2e-4, "betas": (0.0, 0.5), "weight_decay": 0.1, "maximize": True},
)
SGD_HYPERS: tuple[dict[str, Any], ...] = (
    {"lr": 3e-3, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.03, "nesterov": False},
    {"lr": 0.05, "momentum": 0.95, "dampening": 0.0, "weight_decay": 0.0, "nesterov": True, "maximize": True},
    {"lr": 2e-4, "momentum": 0.5, "dampening": 0.9, "weight_decay": 0.1, "nesterov": False, "maximize": True},
)


@dataclass(frozen=True)
class Case:
    """What the tests need to know of one optimizer. Everything else must hold for any optimizer."""

    name: str  # optim8.<name>
    rule: reference.Rule
    states: Mapping[str, bool]  # state -> whether its code is signed
    hypers: Sequence[Mapping[str, Any]]  # no row holds a default
    defaults: Mapping[str, Any]  # of what torch.optim has no class for
    training: Mapping[str, Any]  # with which 200 steps learn something
    torch_class: type[torch.optim.Optimizer] | None = None  # the 32-bit optimizer with the same meaning
    decay_in_gradient: bool = False  # weight decay passes through the moments
    is_scale_free: bool = True  # the size of an update does not depend on that of the gradients
    roots: frozenset[str] = frozenset()  # the states of which codes stand for the square root

    def __str__(self) -> str:
        return self.name

    @property
    def state(self) -> str:
        """The name of the first state."""
        return next(iter(self.states))

    def codes(self, state: str) -> str:
        """The key of a state's codes."""
        return f"{state}_root_codes" if state in self.roots else f"{state}_codes"

    def low(self, state: str) -> str:
        """The key of a state's low bytes in 16 bits."""
        return self.codes(state).removesuffix("codes") + "low"

    def absmax(self, state: str) -> str:
        """The key of a state's scales."""
        return self.codes(state).removesuffix("codes") + "absmax"

    @property
    def cls(self) -> Any:
        """The class itself, for calls that `make` does not cover."""
        return getattr(optim8, self.name)

    def make(self, params: Any, hyper: Mapping[str, Any] | None = None, **more: Any) -> Any:
        """An optimizer with row 0 of the hyper-parameters unless told; 8-bit whatever the size unless told."""
        options = {**(self.hypers[0] if hyper is None else hyper), "min_8bit_size": 0, **more}
        return self.cls(params, **options)

    def without_decay(self, row: int = 0, **more: Any) -> dict[str, Any]:
        return {**self.hypers[row], "weight_decay": 0.0, **more}


CASES = {
    case.name: case
    for case in (
        Case(
            "Adam8bit",
            reference.adam,
            {"exp_avg": True, "exp_avg_sq": False},
            ADAM_HYPERS,
            {},
            {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-7, "weight_decay": 1e-4},
            torch_class=torch.optim.Adam,
            roots=ROOTS,
            decay_in_gradient=True,
        ),
        Case(
            "AdamW8bit",
            reference.adamw,
            {"exp_avg": True, "exp_avg_sq": False},
            ADAM_HYPERS,
            {},
            {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-7, "weight_decay": 0.05},
            torch_class=torch.optim.AdamW,
            roots=ROOTS,
        ),
        Case(
            "Lion8bit",
            reference.lion,
            {"exp_avg": True},
            LION_HYPERS,
            {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0, "maximize": False},
            {"lr": 2e-3, "betas": (0.92, 0.98), "weight_decay": 0.1},
        ),
        Case(
            "SGD8bit",
            reference.sgd,
            {"momentum_buffer": True},
            SGD_HYPERS,
            {},
            {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": True},
            torch_class=torch.optim.SGD,
            decay_in_gradient=True,
            is_scale_free=False,
        ),
    )
}
EVERY = list(CASES.values())


def exported_names() -> set[str]:
    """The optimizers that the library exports; those that are paged by name have tests/paging/test_paging_*.py."""
    public = {name: getattr(optim8, name) for name in dir(optim8) if not name.startswith("_")}
    return {
        name
        for name, thing in public.items()
        if isinstance(thing, type) and issubclass(thing, torch.optim.Optimizer) and not thing.always_paged
    }
