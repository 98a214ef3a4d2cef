"""THE table of cases: one row per optimizer. Every test that is about all optimizers runs over every row."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
RMSPROP_HYPERS: tuple[dict[str, Any], ...] = (
    {"lr": 3e-3, "alpha": 0.8, "eps": 1e-6, "weight_decay": 0.03, "momentum": 0.7, "centered": True},
    {"lr": 0.05, "alpha": 0.95, "eps": 1e-9, "weight_decay": 0.0, "momentum": 0.0, "centered": False, "maximize": True},
    {"lr": 2e-4, "alpha": 0.5, "eps": 0.0, "weight_decay": 0.1, "momentum": 0.9, "centered": False, "maximize": True},
)
ADAGRAD_HYPERS: tuple[dict[str, Any], ...] = (
    {"lr": 3e-2, "lr_decay": 0.1, "weight_decay": 0.03, "initial_accumulator_value": 0.2, "eps": 1e-6},
    {"lr": 0.07, "lr_decay": 0.2, "weight_decay": 0.0, "initial_accumulator_value": 0.0, "eps": 1e-9, "maximize": True},
    {"lr": 2e-4, "lr_decay": 2.0, "weight_decay": 0.2, "initial_accumulator_value": 1e-4, "eps": 0.0, "maximize": True},
)
ADADELTA_HYPERS: tuple[dict[str, Any], ...] = (
    {"lr": 0.5, "rho": 0.8, "eps": 1e-5, "weight_decay": 0.03},
    {"lr": 2.0, "rho": 0.95, "eps": 1e-9, "weight_decay": 0.0, "maximize": True},
    {"lr": 0.1, "rho": 0.5, "eps": 1e-3, "weight_decay": 0.2, "maximize": True},
)
NADAM_HYPERS: tuple[dict[str, Any], ...] = (
    {**ADAM_HYPERS[0], "momentum_decay": 0.05, "decoupled_weight_decay": True},
    {**ADAM_HYPERS[1], "momentum_decay": 1.0, "decoupled_weight_decay": True},
    {**ADAM_HYPERS[2], "momentum_decay": 0.0, "decoupled_weight_decay": False},
)
RADAM_HYPERS: tuple[dict[str, Any], ...] = (
    {**ADAM_HYPERS[0], "decoupled_weight_decay": True},
    {**ADAM_HYPERS[1], "decoupled_weight_decay": True},
    # Not up to 0.5: torch's lerp then makes NaN of an infinite gradient.
    {**ADAM_HYPERS[2], "betas": (0.6, 0.5), "decoupled_weight_decay": False},
)
ADEMAMIX_HYPERS: tuple[dict[str, Any], ...] = (
    {**ADAM_HYPERS[0], "betas": (0.8, 0.95, 0.99), "alpha": 3.0, "t_alpha": 40, "t_beta3": 60},
    {**ADAM_HYPERS[1], "betas": (0.95, 0.9995, 0.99995), "alpha": 8.0, "t_alpha": 1000, "t_beta3": 2},
    # Not 0: a slow moment over a v of 0, which no steps leave, would overflow.
    {**ADAM_HYPERS[2], "betas": (0.0, 0.5, 0.9), "alpha": 0.5, "t_alpha": None, "t_beta3": 3, "eps": 1e-30},
)
ADEMAMIX_DEFAULTS: dict[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999, 0.9999),
    "alpha": 5.0,
    "t_alpha": None,
    "t_beta3": None,
    "eps": 1e-8,
    "weight_decay": 1e-2,
    "maximize": False,
}
LARS_HYPERS: tuple[dict[str, Any], ...] = (
    {**SGD_HYPERS[0], "trust_coefficient": 0.02},
    {**SGD_HYPERS[1], "trust_coefficient": 0.5},
    {**SGD_HYPERS[2], "trust_coefficient": 1.0},
)
LAMB_DEFAULTS: dict[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "maximize": False,
}
LARS_DEFAULTS: dict[str, Any] = {
    "lr": 1e-3,
    "momentum": 0.9,
    "dampening": 0.0,
    "weight_decay": 0.0,
    "nesterov": False,
    "trust_coefficient": 1e-3,
    "maximize": False,
}
SLOW_BETAS: dict[str, Any] = {"betas": (0.999, 0.999)}


@dataclass(frozen=True)
class Case:
    """What the tests need to know of one optimizer. Everything else must hold for any optimizer."""

    name: str  # optim8.<name>
    rule: reference.Rule
    states: Mapping[str, bool]  # state -> whether its code is signed; all that row 0 of the hyper-parameters has
    hypers: Sequence[Mapping[str, Any]]  # row 0 holds no default
    defaults: Mapping[str, Any]  # of what torch.optim has no class for
    training: Mapping[str, Any]  # with which 300 steps learn something
    torch_class: type[torch.optim.Optimizer] | None = None  # the 32-bit optimizer with the same meaning
    decay_in_gradient: bool = False  # weight decay passes through the moments
    is_scale_free: bool = True  # the size of an update does not depend on that of the gradients
    roots: frozenset[str] = frozenset()  # the states of which codes stand for the square root
    only_with: Mapping[str, str] = field(default_factory=dict)  # state -> the option without which it is not kept
    wide: Mapping[str, str] = field(default_factory=dict)  # state -> the option that gives it 16 bits for 8; "": any
    initial: Mapping[str, str] = field(default_factory=dict)  # state -> the option that it starts as, for 0
    running: Mapping[str, float] = field(default_factory=dict)  # scalar of each parameter -> what it starts as
    least: Mapping[str, str] = field(default_factory=dict)  # state -> the option that it is at least after a step
    of_others: frozenset[str] = frozenset()  # the states that depend on what is kept of others
    moves_without_eps: bool = True  # eps = 0 is of use
    rate: float = 1.0  # a learning rate times this goes about as far as Adam's
    has_norms: bool = False  # an element's step depends on norms of its tensor
    slow: Mapping[str, Any] = field(default_factory=lambda: SLOW_BETAS)  # the first state changes by a thousandth
    always: Mapping[str, Any] = field(default_factory=dict)  # options without which it is not the rule of this row

    def __str__(self) -> str:
        return self.name

    @property
    def state(self) -> str:
        """The name of the first state."""
        return next(iter(self.states))

    @property
    def layout(self) -> tuple[Any, ...]:
        """What the state of a parameter is made of, whatever it is called."""
        states = ((signed, name in self.roots, name in self.wide) for name, signed in self.states.items())
        return *states, len(self.running)

    def codes(self, state: str) -> str:
        """The key of a state's codes."""
        return f"{state}_root_codes" if state in self.roots else f"{state}_codes"

    def low(self, state: str) -> str:
        """The key of a state's low bytes in 16 bits."""
        return self.codes(state).removesuffix("codes") + "low"

    def absmax(self, state: str) -> str:
        """The key of a state's scales."""
        return self.codes(state).removesuffix("codes") + "absmax"

    def states_of(self, hyper: Mapping[str, Any]) -> dict[str, bool]:
        """The states that a group with these options has, in order."""
        return {
            name: signed
            for name, signed in self.states.items()
            if name not in self.only_with or hyper.get(self.only_with[name])
        }

    def is_wide(self, state: str, hyper: Mapping[str, Any]) -> bool:
        """Whether a state has low bytes where the others have codes alone."""
        return state in self.wide and (not self.wide[state] or bool(hyper.get(self.wide[state])))

    def start(self, state: str, hyper: Mapping[str, Any]) -> float:
        """What a state is before the first step."""
        return float(hyper.get(self.initial[state], 0.0)) if state in self.initial else 0.0

    @property
    def cls(self) -> Any:
        """The class itself, for calls that `make` does not cover."""
        return getattr(optim8, self.name)

    def make(self, params: Any, hyper: Mapping[str, Any] | None = None, **more: Any) -> Any:
        """An optimizer with row 0 of the hyper-parameters unless told; 8-bit whatever the size unless told."""
        options = {**self.always, **(self.hypers[0] if hyper is None else hyper), "min_8bit_size": 0, **more}
        return self.cls(params, **options)

    def with_defaults(self, params: Any, **options: Any) -> Any:
        """An optimizer with its own defaults."""
        return self.cls(params, **{**self.always, **options})

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
        # Its groups without matrices; tests/optim/test_muon.py is about the others.
        Case(
            "Muon8bit",
            reference.adamw,
            {"exp_avg": True, "exp_avg_sq": False},
            ADAM_HYPERS,
            {},
            {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.05},
            roots=ROOTS,
            always={"use_muon": False},
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
            only_with={"momentum_buffer": "momentum"},
            slow={"momentum": 0.999, "dampening": 0.999, "nesterov": False},
        ),
        Case(
            "RMSprop8bit",
            reference.rmsprop,
            {"square_avg": False, "momentum_buffer": True, "grad_avg": True},
            RMSPROP_HYPERS,
            {},
            {"lr": 3e-3, "alpha": 0.98, "centered": True, "weight_decay": 1e-4},
            torch_class=torch.optim.RMSprop,
            decay_in_gradient=True,
            roots=frozenset({"square_avg"}),
            only_with={"momentum_buffer": "momentum", "grad_avg": "centered"},
            wide={"square_avg": "centered", "grad_avg": "centered"},
            of_others=frozenset({"momentum_buffer"}),
            slow={"alpha": 0.999, "momentum": 0.0, "centered": False},
        ),
        Case(
            "Adagrad8bit",
            reference.adagrad,
            {"sum": False},
            ADAGRAD_HYPERS,
            {},
            {"lr": 0.05, "lr_decay": 1e-3, "weight_decay": 1e-4, "initial_accumulator_value": 1e-4},
            torch_class=torch.optim.Adagrad,
            decay_in_gradient=True,
            roots=frozenset({"sum"}),
            initial={"sum": "initial_accumulator_value"},
            slow={},
        ),
        Case(
            "Adadelta8bit",
            reference.adadelta,
            {"square_avg": False, "acc_delta": False},
            ADADELTA_HYPERS,
            {},
            {"lr": 1.5, "rho": 0.95, "eps": 1e-5, "weight_decay": 1e-4},
            torch_class=torch.optim.Adadelta,
            decay_in_gradient=True,
            roots=frozenset({"square_avg", "acc_delta"}),
            of_others=frozenset({"acc_delta"}),
            moves_without_eps=False,
            rate=300.0,
            slow={"rho": 0.999},
        ),
        Case(
            "Adamax8bit",
            reference.adamax,
            {"exp_avg": True, "exp_inf": False},
            ADAM_HYPERS,
            {},
            {"lr": 0.02, "betas": (0.9, 0.99), "weight_decay": 1e-4},
            torch_class=torch.optim.Adamax,
            decay_in_gradient=True,
            least={"exp_inf": "eps"},
        ),
        Case(
            "NAdam8bit",
            reference.nadam,
            {"exp_avg": True, "exp_avg_sq": False},
            NADAM_HYPERS,
            {},
            {"lr": 5e-3, "betas": (0.9, 0.99), "weight_decay": 1e-4, "momentum_decay": 0.01},
            torch_class=torch.optim.NAdam,
            decay_in_gradient=True,
            roots=ROOTS,
            running={"mu_product": 1.0},
        ),
        Case(
            "RAdam8bit",
            reference.radam,
            {"exp_avg": True, "exp_avg_sq": False},
            RADAM_HYPERS,
            {},
            {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.05, "decoupled_weight_decay": True},
            torch_class=torch.optim.RAdam,
            decay_in_gradient=True,
            is_scale_free=False,  # the first five steps
            rate=20.0,
            roots=ROOTS,
        ),
        Case(
            "AdEMAMix8bit",
            reference.ademamix,
            {"exp_avg": True, "exp_avg_slow": True, "exp_avg_sq": False},
            ADEMAMIX_HYPERS,
            ADEMAMIX_DEFAULTS,
            {"lr": 3e-3, "betas": (0.9, 0.99, 0.999), "alpha": 2.0, "t_alpha": 99, "t_beta3": 99, "weight_decay": 0.05},
            roots=ROOTS,
            wide={"exp_avg_slow": ""},
            slow={"betas": (0.999, 0.999, 0.999)},
        ),
        Case(
            "LAMB8bit",
            reference.lamb,
            {"exp_avg": True, "exp_avg_sq": False},
            ADAM_HYPERS,
            LAMB_DEFAULTS,
            {"lr": 0.02, "betas": (0.9, 0.99), "weight_decay": 0.05},
            roots=ROOTS,
            has_norms=True,
        ),
        Case(
            "LARS8bit",
            reference.lars,
            {"momentum_buffer": True},
            LARS_HYPERS,
            LARS_DEFAULTS,
            {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": True, "trust_coefficient": 0.1},
            decay_in_gradient=True,
            only_with={"momentum_buffer": "momentum"},
            slow={"momentum": 0.999, "dampening": 0.999, "nesterov": False},
            has_norms=True,
            rate=200.0,
        ),
    )
}
# Of each form that the kernels of a rule have (one state, two, a root, three with low bytes beside 8 bits, a scalar of
# each parameter, norms) one: the others differ from these in arithmetic alone, so that a build with sanitizers, or
# another Python, would not find more with them.
FORMS = ("AdamW8bit", "SGD8bit", "RMSprop8bit", "NAdam8bit", "LAMB8bit")
EVERY = [case for case in CASES.values() if case.name in FORMS or not os.environ.get("OPTIM8_TEST_FORMS")]
# The first with each layout of state. What saves, splits, copies and loads state asks a rule for no more.
LAYOUTS = list({case.layout: case for case in reversed(EVERY)}.values())[::-1]


def exported_names() -> set[str]:
    """The optimizers that the library exports; those that are paged by name have tests/paging/test_paging_*.py."""
    public = {name: getattr(optim8, name) for name in dir(optim8) if not name.startswith("_")}
    return {
        name
        for name, thing in public.items()
        if isinstance(thing, type) and issubclass(thing, torch.optim.Optimizer) and not thing.always_paged
    }
