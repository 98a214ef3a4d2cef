"""bitsandbytes' SGD, RMSprop, Adagrad, AdEMAMix, LAMB and LARS: what their dicts become here, and ours there."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import reference
import torch
from cases import CASES
from support.convert_harness import (
    CARRIERS,
    REQUANTIZED,
    assert_holds,
    assert_same_step,
    make_params,
    ours,
    steps,
    twins,
)
from support.harness import bits, moments, snapshot

import optim8

bnb = pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU"),
]
HYPERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.03},
    "RMSprop": {"lr": 3e-3, "alpha": 0.8, "eps": 1e-6, "weight_decay": 0.03},
    "Adagrad": {"lr": 0.03, "eps": 1e-6, "weight_decay": 0.03},
    "AdEMAMix": {
        "lr": 3e-3,
        "betas": (0.8, 0.95, 0.99),
        "eps": 1e-6,
        "weight_decay": 0.03,
        "alpha": 3.0,
        "t_alpha": 40,
        "t_beta3": 60,
    },
}
# Where each state is, by the key and the row in it.
PLACES: dict[str, dict[str, tuple[int, int | None]]] = {
    "SGD": {"momentum_buffer": (1, None)},
    "RMSprop": {"square_avg": (1, None)},
    "Adagrad": {"sum": (1, None)},
    "AdEMAMix": {"exp_avg": (1, 0), "exp_avg_slow": (1, 1), "exp_avg_sq": (2, None)},
}


def theirs_of(name: str, params: Any, **more: Any) -> Any:
    kind = name.removeprefix("Paged").removesuffix("8bit").removesuffix("32bit")
    return getattr(bnb.optim, name)(params, **{**HYPERS[kind], **more})


def dict_of(optimizer: Any, layout: str) -> dict[str, Any]:
    """ "wrapped" as since version 0.46, or flat as before."""
    return optimizer.state_dict() if layout == "wrapped" else torch.optim.Optimizer.state_dict(optimizer)


def there(kind: str, name: str, entry: dict[str, Any], what: str) -> torch.Tensor:
    """`state`, `absmax` or `qmap` of one of our states in an entry of theirs."""
    number, row = PLACES[kind][name]
    tensor: torch.Tensor = entry[f"{what}{number}"]
    return tensor if row is None or what == "qmap" else tensor[row]


def meant(kind: str, name: str, entry: dict[str, Any]) -> torch.Tensor:
    """The values of a state in float32."""
    state = there(kind, name, entry, "state")
    if state.dtype != torch.uint8:
        return state
    values = there(kind, name, entry, "qmap")[state.long()].flatten()
    scales = there(kind, name, entry, "absmax").repeat_interleave(256)[: values.numel()]
    return (values * scales).view(state.shape)


# Its AdEMAMix32bit makes a state for one of the two first moments, and cannot step.
BROKEN_THERE = "AdEMAMix32bit"


@pytest.mark.parametrize("layout", ["wrapped", "flat"])
@pytest.mark.parametrize("bits_of_state", ["8bit", "32bit", ""])
@pytest.mark.parametrize("kind", [*HYPERS, "PagedAdEMAMix"])
def test_their_dict_loads_here(kind: str, bits_of_state: str, layout: str) -> None:
    if f"{kind}{bits_of_state}".endswith(BROKEN_THERE):
        bits_of_state = ""
    theirs_params = make_params(channels_last=False)
    theirs = theirs_of(f"{kind}{bits_of_state}", theirs_params)
    kind = kind.removeprefix("Paged")
    steps(theirs_params, theirs, 0, 3)
    params = twins(theirs_params)
    optimizer = ours(f"{kind}8bit", params, optim_bits=8 if bits_of_state == "8bit" else 32)
    optimizer.load_state_dict(CARRIERS["torch.save"](dict_of(theirs, layout)))
    case, group = CASES[f"{kind}8bit"], optimizer.param_groups[0]
    assert {name: group[name] for name in HYPERS[kind]} == HYPERS[kind]
    assert group.keys() == ours(f"{kind}8bit", twins(params)).param_groups[0].keys()
    for p, q in zip(params, theirs_params, strict=True):
        state, was = optimizer.state[p], theirs.state[q]
        assert state["step"] == 3
        assert (optimizer.precision(p) == "8bit") == (was["state1"].dtype == torch.uint8)
        for name in PLACES[kind]:
            values = there(kind, name, was, "state")
            if optimizer.precision(p) == "32bit":
                assert bits(state[name]) == bits(values)
            elif name in case.roots:
                of_root = replace(case, states={name: case.states[name]})
                assert_holds(optimizer, of_root, p, {name: meant(kind, name, was)})
            else:
                assert bits(state[case.codes(name)]) == bits(values)
                assert bits(state[case.absmax(name)]) == bits(there(kind, name, was, "absmax"))
                if case.is_wide(name, group):
                    assert (state[case.low(name)] == 128).all()
    within = REQUANTIZED if case.roots and bits_of_state == "8bit" else 0.0
    assert_same_step(params, optimizer, theirs_params, theirs, 3, within=within)


@pytest.mark.parametrize("optim_bits", [8, 32])
@pytest.mark.parametrize("kind", HYPERS)
def test_our_dict_loads_there_and_steps(kind: str, optim_bits: int) -> None:
    params = make_params(channels_last=False)
    optimizer = ours(f"{kind}8bit", params, **HYPERS[kind], optim_bits=optim_bits)
    steps(params, optimizer, 0, 3)
    before = snapshot(optimizer, params)
    with optim8.convert.report() as report:
        written = CARRIERS["torch.save"](optim8.convert.to_bitsandbytes(optimizer))
    assert snapshot(optimizer, params) == before
    case = CASES[f"{kind}8bit"]
    changed = {name for name in PLACES[kind] if optim_bits == 8 and (name in case.roots or name in case.wide)}
    for row in report.rows:
        is_changed = row.how == "requantized"
        assert is_changed <= any(f"'{name}'" in row.name for name in changed)
        # A signed code has half the values for squares; of an exact code nothing is lost.
        assert row.relative_error <= (2 * REQUANTIZED if is_changed else 0.0)
    assert any(row.how == "requantized" for row in report.rows) == bool(changed)
    others = twins(params)
    name = f"{kind}{optim_bits}bit" if f"{kind}{optim_bits}bit" != BROKEN_THERE else kind
    theirs = theirs_of(name, others, lr=0.5)
    theirs.load_state_dict(written)
    fresh = theirs_of(name, twins(params))
    steps(fresh.param_groups[0]["params"], fresh, 0, 1)
    assert {name: theirs.param_groups[0][name] for name in fresh.param_groups[0] if name != "params"} == {
        name: value for name, value in fresh.param_groups[0].items() if name != "params"
    }
    for p, q, new in zip(params, others, fresh.param_groups[0]["params"], strict=True):
        state, entry = optimizer.state[p], theirs.state[q]
        assert entry.keys() == fresh.state[new].keys()
        assert entry["step"] == 3
        for key, value in fresh.state[new].items():
            if isinstance(value, torch.Tensor):
                assert (entry[key].shape, entry[key].dtype) == (value.shape, value.dtype), key
                assert "qmap" not in key or torch.allclose(entry[key], value, rtol=1e-6, atol=0)
        for name in PLACES[kind]:
            codes = there(kind, name, entry, "state")
            if optimizer.precision(p) == "32bit":
                assert bits(codes) == bits(state[name])
            elif name not in changed:
                assert bits(codes) == bits(state[case.codes(name)])
            else:
                scales = there(kind, name, entry, "absmax").double().numpy()
                is_signed = case.states[name] or len(PLACES[kind]) == 1
                exact = moments(optimizer, case, p)[name]
                assert not reference.wrong_codes(codes.flatten().numpy(), exact, is_signed, scales).size
    within = 2 * REQUANTIZED if changed else 0.0
    assert_same_step(params, optimizer, others, theirs, 3, within=within)


@pytest.mark.parametrize("kind", ["RMSprop", "Adagrad"])
def test_squares_below_0_are_refused(kind: str) -> None:
    """The signed table has codes for them."""
    params = make_params(channels_last=False)
    theirs = theirs_of(f"{kind}8bit", params)
    steps(params, theirs, 0, 1)
    saved = torch.optim.Optimizer.state_dict(theirs)
    saved["state"][0]["state1"][7] = 100
    optimizer = ours(f"{kind}8bit", twins(params))
    with pytest.raises(ValueError, match=r"state\[0\]\['state1'\] must not be negative"):
        optimizer.load_state_dict(saved)


def test_a_code_for_0_that_a_cpu_wrote_stays_in_sums_of_squares() -> None:
    """There, as in CUDA's, code 131 is the code of a small value."""
    params = make_params(channels_last=False)
    theirs = theirs_of("Adagrad8bit", params)
    steps(params, theirs, 0, 1)
    saved = theirs.state_dict()
    assert optim8.convert.with_exact_zeros(saved)["state"][0] is saved["state"][0]


@pytest.mark.parametrize("written", ["None", "missing"])
def test_ademamix_keeps_its_schedule_where_the_dict_has_none(written: str) -> None:
    params = make_params(channels_last=False)
    theirs = theirs_of("AdEMAMix8bit", params, t_alpha=None, t_beta3=None)
    steps(params, theirs, 0, 1)
    saved = theirs.state_dict()
    if written == "missing":
        for key in ("t_alpha", "t_beta3"):
            del saved["param_groups"][0][key]
    optimizer = optim8.AdEMAMix8bit(make_params(channels_last=False), t_alpha=100, t_beta3=200)
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert (group["t_alpha"], group["t_beta3"], group["alpha"], group["lr"]) == (100, 200, 3.0, 3e-3)
    scheduled = theirs_of("AdEMAMix8bit", make_params(channels_last=False)).state_dict()
    optimizer.load_state_dict(scheduled)
    assert (optimizer.param_groups[0]["t_alpha"], optimizer.param_groups[0]["t_beta3"]) == (40, 60)


OTHERS = ["AdamW8bit", "Lion8bit", *(f"{kind}8bit" for kind in HYPERS)]


@pytest.mark.parametrize("here", ["Adam8bit", *OTHERS])
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("has_state", [True, False])
def test_only_the_namesake_loads(name: str, here: str, has_state: bool) -> None:
    """Their dicts do not say who wrote them; `betas` and `eps` do. Only Adam's are AdamW's there."""
    params = make_params(channels_last=False)
    options = HYPERS.get(name.removesuffix("8bit"), {})
    theirs = getattr(bnb.optim, name)(params, **{**options, "weight_decay": 0.0})
    steps(params, theirs, 0, 1)
    saved = theirs.state_dict()
    optimizer = ours(here, twins(params), lr=0.5)
    before = snapshot(optimizer)
    if not has_state:
        saved = {**saved, "state": {key: {} for key in saved["state"]}}
        if "t_alpha" not in saved["param_groups"][0]:
            return  # nothing tells that it is of bitsandbytes
    if name == here or (name, here) == ("AdamW8bit", "Adam8bit"):
        optimizer.load_state_dict(saved)
        return
    if not has_state and name == "AdamW8bit":
        return  # options alone
    with pytest.raises(ValueError, match=rf"{here}\.load_state_dict: .*\['\w+'\] (is|must)"):
        optimizer.load_state_dict(saved)
    assert snapshot(optimizer) == before


def test_a_dampening_that_has_no_effect_there_is_asked_about() -> None:
    params = make_params(channels_last=False)
    theirs = theirs_of("SGD8bit", params, dampening=0.5)
    steps(params, theirs, 0, 1)
    saved = theirs.state_dict()
    optimizer = optim8.SGD8bit(twins(params))
    with pytest.raises(ValueError, match=r"\['betas'\] is .*, which is no SGD's\. .*dampening .* set it to 0"):
        optimizer.load_state_dict(saved)
    saved["param_groups"][0]["betas"] = (0.8, 0.0)
    optimizer.load_state_dict(saved)
    assert (optimizer.param_groups[0]["momentum"], optimizer.param_groups[0]["dampening"]) == (0.8, 0.0)


def test_a_momentum_of_rmsprop_has_no_effect_there_or_here() -> None:
    theirs_params = make_params(channels_last=False)
    theirs = theirs_of("RMSprop32bit", theirs_params, momentum=0.9)
    steps(theirs_params, theirs, 0, 2)
    params = twins(theirs_params)
    optimizer = optim8.RMSprop8bit(params, optim_bits=32)
    optimizer.load_state_dict(theirs.state_dict())
    assert optimizer.param_groups[0]["momentum"] == 0
    assert_same_step(params, optimizer, theirs_params, theirs, 2)


CAPPED = {"LAMB": ("AdamW8bit", {"lr": 3e-3, "weight_decay": 0.03}), "LARS": ("SGD8bit", {"lr": 0.05, "momentum": 0.9})}


@pytest.mark.parametrize("kind", CAPPED)
def test_its_lamb_and_lars_are_adam_and_sgd(kind: str) -> None:
    """In 8 bits without a cap, so that they go on as these, to the step; in 32 bits with one, which is refused."""
    here, options = CAPPED[kind]
    theirs_params = make_params(channels_last=False)
    large, small = theirs_params[:2], theirs_params[2:3]
    theirs = getattr(bnb.optim, f"{kind}8bit")(large, **options)
    steps(large, theirs, 0, 3)
    params = twins(large)
    optimizer = ours(here, params)
    optimizer.load_state_dict(theirs.state_dict())
    assert all(optimizer.precision(p) == "8bit" for p in params)
    assert_same_step(params, optimizer, large, theirs, 3, within=REQUANTIZED if kind == "LAMB" else 0.0)

    theirs = getattr(bnb.optim, f"{kind}8bit")(small, **options)
    steps(small, theirs, 0, 1)
    saved = theirs.state_dict()
    with pytest.raises(ValueError, match=r"\['unorm_vec'\] is of max_unorm, .* LAMB is Adam .* LARS is SGD"):
        ours(here, twins(small)).load_state_dict(saved)
    without = torch.optim.Optimizer.state_dict(theirs)
    for entry in without["state"].values():
        del entry["unorm_vec"]
    ours(here, twins(small)).load_state_dict(without)


@pytest.mark.parametrize("name, really", [("LAMB8bit", "Adam with"), ("LARS8bit", "SGD with")])
def test_ours_of_these_names_are_others(name: str, really: str) -> None:
    if not hasattr(optim8, name):
        pytest.skip("not here yet")
    params = make_params(channels_last=False)
    theirs = getattr(bnb.optim, name)(params, **CAPPED[name.removesuffix("8bit")][1])
    steps(params, theirs, 0, 1)
    optimizer = ours(name, twins(params))
    with pytest.raises(ValueError, match=f"cannot be converted for bitsandbytes; .* can. bitsandbytes' .* is {really}"):
        optimizer.load_state_dict(theirs.state_dict())
    with pytest.raises(ValueError, match=f"is {really}"):
        optim8.convert.to_bitsandbytes(optimizer)


P = torch.nn.Parameter(torch.ones(3))


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("AdamW8bit", {"amsgrad": True}, r"\['amsgrad'\] must be False, got True"),
        ("SGD8bit", {"momentum": 0.9, "nesterov": True}, r"\['nesterov'\] must be False, got True"),
        ("SGD8bit", {"momentum": 0.9, "dampening": 0.5}, r"\['dampening'\] must be 0\.0, got 0\.5"),
        ("SGD8bit", {"momentum": 0.0}, r"\['momentum'\] must be above 0"),
        ("SGD8bit", {"momentum": 0.9, "maximize": True}, r"\['maximize'\] must be False"),
        ("RMSprop8bit", {"momentum": 0.9}, r"\['momentum'\] must be 0\.0, got 0\.9"),
        ("RMSprop8bit", {"centered": True}, r"\['centered'\] must be False"),
        ("RMSprop8bit", {"alpha": 0.0}, r"\['alpha'\] must be above 0"),
        ("Adagrad8bit", {"lr_decay": 0.1}, r"\['lr_decay'\] must be 0\.0"),
        ("Adagrad8bit", {"initial_accumulator_value": 0.1}, r"\['initial_accumulator_value'\] must be 0\.0"),
        ("AdEMAMix8bit", {"maximize": True}, r"\['maximize'\] must be False"),
        ("NAdam8bit", {}, r"nadam cannot be converted for bitsandbytes; .*sgd.* can"),
        ("Adamax8bit", {}, r"adamax cannot be converted for bitsandbytes"),
    ],
)
def test_what_cannot_be_said_there_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim8.convert.to_bitsandbytes(ours(name, [copy.deepcopy(P)], **options))
