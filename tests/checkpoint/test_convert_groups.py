"""Groups of saved dicts: what changes the update and cannot be honoured is refused by name, notes come along."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from support.convert_harness import make_params, ours, steps, through_a_file, twins
from support.harness import snapshot

import optim8


def saved(make: Any, **options: Any) -> dict[str, Any]:
    params = make_params()[:2]
    optimizer = make(params, **options)
    steps(params, optimizer, 0, 2)
    return copy.deepcopy(optimizer.state_dict())  # type: ignore[no-any-return]


def lion() -> dict[str, Any]:
    """As lion-pytorch writes it."""
    params = make_params()[:2]
    state = {i: {"exp_avg": torch.ones_like(p)} for i, p in enumerate(params)}
    return {"state": state, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.1, "params": [0, 1]}]}


def check(name: str, state_dict: dict[str, Any], message: str | None) -> Any:
    params = make_params()[:2]
    optimizer = ours(name, params, lr=0.5)
    steps(params, optimizer, 0, 1)
    before = snapshot(optimizer, params)
    if message is None:
        optimizer.load_state_dict(state_dict)
        steps(params, optimizer, 1, 2)
        return optimizer
    with pytest.raises(ValueError, match=rf"{name}.load_state_dict: .*{message}"):
        optimizer.load_state_dict(state_dict)
    assert snapshot(optimizer, params) == before
    return optimizer


@pytest.mark.parametrize("name", ["Adam8bit", "AdamW8bit"])
@pytest.mark.parametrize("other", [torch.optim.RAdam, torch.optim.NAdam])
def test_a_relative_of_adam_with_the_same_states_is_refused(other: Any, name: str) -> None:
    check(name, saved(other), r"param_groups\[0\]\['amsgrad'\] is missing, .* another optimizer")


@pytest.mark.parametrize("option", ["weight_decouple", "decoupled_weight_decay"])
def test_a_decoupled_decay_is_not_taken_for_that_of_sgd(option: str) -> None:
    """SGD's is an L2 penalty."""
    state_dict = saved(torch.optim.SGD, momentum=0.9, weight_decay=0.1)
    state_dict["param_groups"][0].update({option: True})
    check("SGD8bit", state_dict, rf"\['{option}'\] is True and weight_decay is 0\.1, which is an L2 penalty here")
    state_dict["param_groups"][0].update({option: False})
    check("SGD8bit", state_dict, None)


# Of timm 1.0.31, pytorch_optimizer 4.1.0 and torch_optimizer 0.3.0: the state of one here, and another step.
PLAIN: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
SGD: dict[str, Any] = {**PLAIN, "dampening": 0, "nesterov": False}
WITH_A_MOMENTUM: dict[str, tuple[str, dict[str, Any], str]] = {
    "timm's Lars": (
        "SGD8bit",
        {**SGD, "trust_coeff": 1e-3, "eps": 1e-8, "trust_clip": False, "always_adapt": False, "foreach": None},
        r"\['trust_coeff'\] is 0\.001",
    ),
    "pytorch_optimizer's LARS": (
        "SGD8bit",
        {**SGD, "trust_coefficient": 1e-3, "foreach": None, "step": 3},
        r"\['trust_coefficient'\] is 0\.001, an option of lars",
    ),
    "timm's SGDW": (
        "SGD8bit",
        {**SGD, "caution": False, "corrected_weight_decay": False, "max_lr_snapshot": 0.01, "maximize": False},
        r"\['corrected_weight_decay'\] is of timm's decoupled decay and weight_decay is 0\.1, which is an L2 penalty",
    ),
    "SignSGD": (
        "Muon8bit",
        {**PLAIN, "weight_decouple": True, "foreach": None, "step": 3},
        r"\['weight_decouple'\] is no option of this optimizer",
    ),
    "SpectralSphere": (
        "Muon8bit",
        {**PLAIN, "nesterov": True, "weight_decouple": True, "foreach": None, "step": 3},
        r"\['nesterov'\] is no option of this optimizer",
    ),
    "AccSGD": (
        "Muon8bit",
        {"lr": 0.1, "weight_decay": 0.1, "kappa": 1000.0, "xi": 10.0, "small_const": 0.7},
        r"\['momentum'\] is missing",
    ),
    "QHM": ("Muon8bit", {**PLAIN, "nu": 0.7, "weight_decay_type": "grad"}, r"\['nu'\] is no option of this optimizer"),
}


@pytest.mark.parametrize("what", WITH_A_MOMENTUM)
def test_a_relative_of_sgd_with_the_same_state_is_refused(what: str) -> None:
    name, group, message = WITH_A_MOMENTUM[what]
    params = [torch.nn.Parameter(torch.ones(70, 70))]
    state_dict = {"state": {0: {"momentum_buffer": torch.ones(70, 70)}}, "param_groups": [{**group, "params": [0]}]}
    optimizer = getattr(optim8, name)(params)
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match=rf"{name}\.load_state_dict: param_groups\[0\]{message}"):
        optimizer.load_state_dict(state_dict)
    assert snapshot(optimizer, params) == before


def test_timms_adamw_is_no_adam() -> None:
    state_dict = saved(torch.optim.AdamW)
    group = state_dict["param_groups"][0]
    group.pop("decoupled_weight_decay", None)
    group.update(caution=False, corrected_weight_decay=False, weight_decay=0.1)
    check("Adam8bit", state_dict, r"\['corrected_weight_decay'\] is of timm's decoupled decay .* AdamW8bit")
    check("AdamW8bit", state_dict, None)


# What pytorch_optimizer 4.1, timm 1.0 and others write beside the options that are honoured.
ADAM: dict[str, tuple[dict[str, Any], str | None]] = {
    "a cautious one": ({"caution": True}, r"\['caution'\] is True, which changes the update"),
    "a decay by lr over its maximum": ({"corrected_weight_decay": True}, r"\['corrected_weight_decay'\] is True"),
    "a clipped one": ({"clipping_threshold": 1.0}, r"\['clipping_threshold'\] is 1\.0"),
    "no bias correction": ({"bias_correction": False}, r"\['bias_correction'\] is False"),
    "no correction, of transformers": ({"correct_bias": False}, r"\['correct_bias'\] is False"),
    "AMSBound": ({"ams_bound": True}, r"\['ams_bound'\] is True"),
    "NAdam": ({"momentum_decay": 0.004}, r"\['momentum_decay'\] is no option of AdamW: .* NAdam"),
    "AdEMAMix": ({"alpha": 5.0}, r"\['alpha'\] is 5\.0, an option of RMSprop, ademamix"),
    "an option of the same library": ({"caution": False, "trust_ratio": True}, r"\['trust_ratio'\] is no option"),
    "timm's AdamW": (
        {"caution": False, "corrected_weight_decay": False, "max_lr_snapshot": 1e-3, "clipping_threshold": None},
        None,
    ),
    "DeepSpeed's": ({"bias_correction": True}, None),
}


@pytest.mark.parametrize("what", ADAM)
def test_options_of_other_adams(what: str) -> None:
    more, message = ADAM[what]
    state_dict = saved(torch.optim.AdamW)
    state_dict["param_groups"][0].update(more)
    optimizer = check("AdamW8bit", state_dict, message)
    assert not more.keys() & optimizer.param_groups[0].keys() - {"max_lr_snapshot"}


LION: dict[str, tuple[dict[str, Any], str | None]] = {
    "a fixed decay": ({"weight_decouple": True, "fixed_decay": True}, r"\['fixed_decay'\] is True"),
    "a decay in the gradient": (
        {"weight_decouple": False, "fixed_decay": False},
        r"\['weight_decouple'\] is False and weight_decay is 0\.1, which is decoupled here",
    ),
    "no decay in the gradient": ({"weight_decouple": False, "fixed_decay": False, "weight_decay": 0.0}, None),
    "pytorch_optimizer's": ({"weight_decouple": True, "fixed_decay": False, "foreach": None, "step": 3}, None),
    "its relative": ({"weight_decouple": True, "fixed_decay": False, "use_shadow": False}, r"\['use_shadow'\] is no"),
    "timm's": ({"caution": False, "corrected_weight_decay": False, "maximize": False, "foreach": None}, None),
    "a cautious one": ({"caution": True}, r"\['caution'\] is True"),
}


@pytest.mark.parametrize("what", LION)
def test_options_of_other_lions(what: str) -> None:
    more, message = LION[what]
    state_dict = lion()
    state_dict["param_groups"][0].update(more)
    optimizer = check("Lion8bit", state_dict, message)
    assert "step" not in optimizer.param_groups[0]


def test_tiger_is_no_lion() -> None:
    state_dict = lion()
    group = state_dict["param_groups"][0]
    group.update(beta=group.pop("betas")[0], weight_decouple=True, fixed_decay=False)
    check("Lion8bit", state_dict, r"param_groups\[0\]\['betas'\] is missing, .* lion-pytorch")


NOTES: dict[str, Any] = {"name": "decay", "layer_id": 3, "tag": ("of", "the user"), "is_muon": False} | dict.fromkeys(
    ("initial_lr", "lr_scale", "swa_lr", "max_lr", "min_lr", "max_momentum", "base_momentum"), 0.5
)


@pytest.mark.parametrize("name, make", [("AdamW8bit", torch.optim.AdamW), ("Adam8bit", torch.optim.Adam)])
def test_notes_of_users_and_schedulers_come_along(name: str, make: Any) -> None:
    state_dict = saved(make)
    state_dict["param_groups"][0].update(NOTES)
    group = check(name, state_dict, None).param_groups[0]
    assert {key: group[key] for key in NOTES} == NOTES
    with_lion = lion()
    with_lion["param_groups"][0].update(NOTES)
    group = check("Lion8bit", with_lion, None).param_groups[0]
    assert {key: group[key] for key in NOTES} == NOTES


def test_what_a_group_says_later_is_refused_by_the_step() -> None:
    """Wrappers that bring options to an optimizer's groups do not ask load_state_dict."""
    params = make_params()[:2]
    optimizer = optim8.Adam8bit(params, weight_decay=0.1)
    steps(params, optimizer, 0, 1)
    before = snapshot(optimizer, params)
    for more, message in (
        ({"decoupled_weight_decay": True}, r"\['decoupled_weight_decay'\] is True and weight_decay is 0\.1"),
        ({"t_alpha": None}, r"\['weight_decay'\] is decoupled in bitsandbytes"),
        ({"alpha": 5.0}, r"\['alpha'\] is 5\.0, an option of RMSprop, ademamix"),
    ):
        optimizer.param_groups[0].update(more)
        with pytest.raises(ValueError, match=rf"Adam8bit: a parameter group: {message}"):
            steps(params, optimizer, 1, 2)
        for name in more:
            del optimizer.param_groups[0][name]
    assert snapshot(optimizer, params) == before


def test_numbers_of_numpy_become_pythons() -> None:
    """torch.load with weights_only refuses them in what is saved next."""
    state_dict = saved(torch.optim.AdamW)
    state_dict["param_groups"][0].update(lr=np.float32(0.25), betas=(np.float64(0.5), 0.75), initial_lr=np.float64(0.5))
    optimizer = check("AdamW8bit", state_dict, None)
    group = through_a_file(optimizer.state_dict())["param_groups"][0]
    assert (group["lr"], group["betas"], group["initial_lr"]) == (0.25, (0.5, 0.75), 0.5)
    assert type(group["lr"]) is type(group["betas"][0]) is type(group["initial_lr"]) is float


def named(names: str, **options: Any) -> tuple[list[torch.nn.Parameter], Any]:
    params = [torch.nn.Parameter(torch.full((5000,), float(i))) for i, _ in enumerate(names)]
    return params, optim8.AdamW8bit(list(zip(names, params, strict=True)), **options)


@pytest.mark.parametrize("there", ["ours", "torch"])
def test_an_optimizer_keeps_its_own_names(there: str) -> None:
    """A checkpoint of a compiled model, whose names have a prefix: overrides by pattern go on."""
    params, optimizer = named("ab")
    saved_names = [(f"_orig_mod.{name}", p) for name, p in zip("ab", twins(params), strict=True)]
    other: Any = (optim8.AdamW8bit if there == "ours" else torch.optim.AdamW)(saved_names)
    with optim8.override("b", lr=0.0):
        optimizer.load_state_dict(other.state_dict())
        assert optimizer.param_groups[0]["param_names"] == ["a", "b"]
        steps(params, optimizer, 0, 1)
    assert [bool((p == i).all()) for i, p in enumerate(params)] == [False, True]
    nameless = optim8.AdamW8bit(twins(params))
    nameless.load_state_dict(other.state_dict())
    assert nameless.param_groups[0]["param_names"] == ["_orig_mod.a", "_orig_mod.b"], "as torch.optim"


def test_a_name_that_is_elsewhere_here_is_refused() -> None:
    """State goes by position: layers of equal shapes in another order would get each other's."""
    params, optimizer = named("abc")
    steps(params, optimizer, 0, 1)
    _, other = named("acb")
    before = snapshot(other)
    message = r"param_groups\[0\]\['param_names'\]\[1\] is 'b', which is parameter 2 of group 0 here, .* by position"
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(optimizer.state_dict())
    assert snapshot(other) == before
    state_dict = optimizer.state_dict()
    del state_dict["param_groups"][0]["param_names"]  # as the message says
    other.load_state_dict(state_dict)
    assert other.param_groups[0]["param_names"] == ["a", "c", "b"]


def test_state_that_was_matched_by_name_may_have_its_names_in_any_order() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def make(order: str) -> tuple[torch.nn.ParameterDict, Any]:
        model = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.full((5000,), 1.0)) for name in "abc"})
        return model, optim8.AdamW8bit([(name, model[name]) for name in order])

    model, optimizer = make("abc")
    steps([model[name] for name in "abc"], optimizer, 0, 1)
    twin, other = make("cab")
    set_optimizer_state_dict(twin, other, get_optimizer_state_dict(model, optimizer))
    for name in "abc":
        was, now = optimizer.state[model[name]], other.state[twin[name]]
        assert all(torch.equal(was[key], now[key]) for key in was)
    assert other.param_groups[0]["param_names"] == ["c", "a", "b"]
