"""bitsandbytes' Adam, AdamW and Lion: codes go over bit for bit in both directions, and steps go on there and here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import reference
import torch
from cases import CASES
from support.convert_harness import (
    CARRIERS,
    REQUANTIZED,
    SHAPES,
    Params,
    assert_holds,
    assert_same_step,
    make_params,
    ours,
    steps,
    twins,
)
from support.harness import bits, codes_of, moments, snapshot, state_bits

import optim8

bnb = pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU"),
]
WRAPPED = "__bnb_optimizer_quant_state__"
KINDS = {"Adam": "Adam8bit", "AdamW": "AdamW8bit", "Lion": "Lion8bit"}


def hyper(kind: str) -> dict[str, Any]:
    h: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.95), "weight_decay": 0.0 if kind == "Adam" else 0.03}
    return h if kind == "Lion" else {**h, "eps": 1e-6}


def theirs_of(name: str, params: Params) -> Any:
    return getattr(bnb.optim, name)(
        params, **hyper(name.removeprefix("Paged").removesuffix("8bit").removesuffix("32bit"))
    )


def dict_of(optimizer: Any, layout: str) -> dict[str, Any]:
    """ "wrapped" as since version 0.46, or flat as before."""
    return optimizer.state_dict() if layout == "wrapped" else torch.optim.Optimizer.state_dict(optimizer)


@pytest.mark.parametrize(
    "paged, dtype, layout",
    [
        ("", torch.float32, "wrapped"),
        ("", torch.float32, "flat"),
        ("", torch.bfloat16, "wrapped"),
        ("Paged", torch.float32, "wrapped"),
    ],
    ids=str,
)
@pytest.mark.parametrize("bits_of_state", ["8bit", "32bit", ""])
@pytest.mark.parametrize("kind", KINDS)
def test_their_dict_loads_here(kind: str, paged: str, bits_of_state: str, dtype: torch.dtype, layout: str) -> None:
    theirs_params = make_params(dtype, channels_last=False)
    theirs = theirs_of(f"{paged}{kind}{bits_of_state}", theirs_params)
    steps(theirs_params, theirs, 0, 3)
    params = twins(theirs_params)
    optimizer = ours(KINDS[kind], params, optim_bits=8 if bits_of_state == "8bit" else 32)
    optimizer.load_state_dict(CARRIERS["torch.save"](dict_of(theirs, layout)))
    case = CASES[KINDS[kind]]
    group = optimizer.param_groups[0]
    assert {key: group[key] for key in hyper(kind)} == hyper(kind)
    assert not {"alpha", "t_alpha", "t_beta3"} & group.keys()
    assert ("eps" in group) == (kind != "Lion")
    for p, q in zip(params, theirs_params, strict=True):
        state, was = optimizer.state[p], theirs.state[q]
        assert state["step"] == 3
        assert (optimizer.precision(p) == "8bit") == (was["state1"].dtype == torch.uint8)
        in_8_bits = optimizer.precision(p) == "8bit"
        for number, name in enumerate(case.states, 1):
            if in_8_bits and name in case.roots:
                continue
            assert bits(state[f"{name}_codes" if in_8_bits else name]) == bits(was[f"state{number}"])
            if in_8_bits:
                assert bits(state[f"{name}_absmax"]) == bits(was[f"absmax{number}"])
        if in_8_bits:
            roots = replace(case, states={name: case.states[name] for name in case.roots})
            meant = reference.decode(codes_of(was["state2"]), was["absmax2"].numpy(), False) if case.roots else None
            floats = {name: torch.from_numpy(meant.value).view_as(p) for name in case.roots} if meant else {}
            assert_holds(optimizer, roots, p, floats)
    if dtype == torch.float32:
        within = REQUANTIZED if case.roots and bits_of_state == "8bit" else 0.0
        assert_same_step(params, optimizer, theirs_params, theirs, 3, within=within)
    else:
        steps(params, optimizer, 3, 4)


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("optim_bits", [8, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_our_dict_loads_there_and_steps(kind: str, optim_bits: int, carrier: str) -> None:
    params = make_params(channels_last=False)
    optimizer = ours(KINDS[kind], params, **hyper(kind), optim_bits=optim_bits)
    steps(params, optimizer, 0, 3)
    with optim8.convert.report() as report:
        written = CARRIERS[carrier](optim8.convert.to_bitsandbytes(optimizer))
    case = CASES[KINDS[kind]]
    requantized = [row for row in report.rows if row.how != "copied"]
    assert all(row.max_error == 0 for row in report.rows if row not in requantized)
    assert bool(requantized) == bool(case.roots and optim_bits == 8)
    assert all(row.how == "requantized" and "exp_avg_sq" in row.name for row in requantized)
    assert all(row.relative_error < REQUANTIZED for row in requantized)
    others = twins(params)
    theirs = getattr(bnb.optim, f"{kind}{optim_bits}bit")(others, lr=0.5)
    theirs.load_state_dict(written)
    assert {key: theirs.param_groups[0][key] for key in hyper(kind)} == hyper(kind)
    for p, q in zip(params, others, strict=True):
        state, there = optimizer.state[p], theirs.state[q]
        assert there["step"] == 3
        assert type(there["step"]) is int
        for number, name in enumerate(CASES[KINDS[kind]].states, 1):
            in_8_bits = optimizer.precision(p) == "8bit"
            if in_8_bits and name in case.roots:
                v = moments(optimizer, case, p)[name]
                codes, scales = codes_of(there[f"state{number}"]), there[f"absmax{number}"].double().numpy()
                assert not reference.wrong_codes(codes, v, False, scales).size
                continue
            assert bits(state[f"{name}_codes" if in_8_bits else name]) == bits(there[f"state{number}"])
            if in_8_bits:
                assert bits(state[f"{name}_absmax"]) == bits(there[f"absmax{number}"])
    fresh = getattr(bnb.optim, f"{kind}{optim_bits}bit")(twins(params), lr=0.5)
    steps(fresh.param_groups[0]["params"], fresh, 0, 1)
    keys = [set(s) for s in fresh.state.values()]
    assert [set(s) for s in theirs.state.values()] == keys
    assert theirs.param_groups[0].keys() >= fresh.param_groups[0].keys()
    again = ours(KINDS[kind], twins(params), optim_bits=optim_bits)
    again.load_state_dict(theirs.state_dict())
    for p, q in zip(params, again.param_groups[0]["params"], strict=True):
        one, other = state_bits(again, q), state_bits(optimizer, p)
        assert one.keys() == other.keys()
        assert all(one[key] == other[key] for key in one if "_root" not in key)
    assert_same_step(params, optimizer, others, theirs, 3, within=REQUANTIZED if requantized else 0.0)


def test_state_in_16_bits_is_requantized_for_there() -> None:
    params = make_params(channels_last=False)
    optimizer = optim8.Lion8bit(params, **hyper("Lion"), optim_bits=16)
    steps(params, optimizer, 0, 3)
    with optim8.convert.report() as report:
        written = optim8.convert.to_bitsandbytes(optimizer)
    assert {row.how for row in report.rows} == {"copied", "requantized"}
    assert all(row.relative_error < REQUANTIZED for row in report.rows)
    for i, p in enumerate(params):
        if optimizer.precision(p) == "16bit":
            exact = moments(optimizer, CASES["Lion8bit"], p)["exp_avg"]
            codes, scales = codes_of(written["state"][i]["state1"]), written["state"][i]["absmax1"].double().numpy()
            assert not reference.wrong_codes(codes, exact, True, scales).size


@pytest.mark.parametrize("optim_bits", [8, 32])
def test_channels_last_is_laid_out_row_after_row_there(optim_bits: int) -> None:
    params = make_params()[-1:]
    assert not params[0].is_contiguous()
    optimizer = optim8.AdamW8bit(params, **hyper("AdamW"), optim_bits=optim_bits)
    steps(params, optimizer, 0, 3)
    with optim8.convert.report() as report:
        written = optim8.convert.to_bitsandbytes(optimizer)
    assert {row.how for row in report.rows} == {"requantized" if optim_bits == 8 else "copied"}
    assert all((row.max_error == 0) == (optim_bits == 32) and row.relative_error < REQUANTIZED for row in report.rows)
    assert written["state"][0]["state1"].is_contiguous()
    others = twins(params)
    theirs = getattr(bnb.optim, f"AdamW{optim_bits}bit")(others)
    theirs.load_state_dict(written)
    back = twins(params)
    again = optim8.AdamW8bit(back, optim_bits=optim_bits)
    with optim8.convert.report() as report:
        again.load_state_dict(theirs.state_dict())
    assert {row.how for row in report.rows} == {"requantized" if optim_bits == 8 else "copied"}
    assert again.state[back[0]]["exp_avg_codes" if optim_bits == 8 else "exp_avg"].stride() == back[0].stride()
    if optim_bits == 32:
        assert_same_step(back, again, others, theirs, 3)
    else:
        steps(others, theirs, 3, 4)


def old_dict(kind: str, blocksize: int, table: Callable[[bool], torch.Tensor]) -> tuple[dict[str, Any], Any]:
    """A dict with other blocks or another table, quantized by bitsandbytes itself; and what its codes mean."""
    generator = torch.Generator().manual_seed(3)
    state, means = {}, {}
    for i, p in enumerate(make_params(channels_last=False)):
        entry: dict[str, Any] = {"step": 7}
        means[i] = {}
        for number, (name, signed) in enumerate(CASES[KINDS[kind]].states.items(), 1):
            floats = torch.randn(p.shape, generator=generator) * 10 ** torch.empty(p.shape).uniform_(-4, 0)
            floats = floats if signed else floats.abs()
            if p.numel() < 4096:
                entry[f"state{number}"] = means[i][name] = floats
                continue
            codes, quantized = bnb.functional.quantize_blockwise(floats, code=table(signed), blocksize=blocksize)
            entry[f"state{number}"], entry[f"absmax{number}"] = codes, quantized.absmax
            entry[f"qmap{number}"] = quantized.code
            means[i][name] = bnb.functional.dequantize_blockwise(codes, quantized)
        state[i] = {"step": 7, WRAPPED: {k: v for k, v in entry.items() if k != "step"}}
    group = {**hyper(kind), "eps": 0.0 if kind == "Lion" else 1e-6, "params": list(state)}
    return {"state": state, "param_groups": [group]}, means


def linear(signed: bool) -> torch.Tensor:
    return torch.linspace(-1 if signed else 0, 1, 256)


@pytest.mark.parametrize("optim_bits", [8, 16, 32])
@pytest.mark.parametrize("blocksize", [64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("kind", ["AdamW", "Lion"])
def test_other_block_sizes_are_quantized_anew(kind: str, blocksize: int, optim_bits: int) -> None:
    state_dict, means = old_dict(kind, blocksize, lambda signed: bnb.functional.create_dynamic_map(signed=signed))
    params = make_params(channels_last=False)
    optimizer = ours(KINDS[kind], params, optim_bits=optim_bits)
    with optim8.convert.report() as report:
        optimizer.load_state_dict(state_dict)
    case = CASES[KINDS[kind]]
    how = {"copied", "widened" if optim_bits == 32 else "requantized"}
    if blocksize == 256 and optim_bits != 32:  # what is no root keeps its codes
        how = {"copied", *({"widened"} if optim_bits == 16 else {}), *({"requantized"} if case.roots else {})}
    assert {row.how for row in report.rows} == how
    for i, p in enumerate(params):
        assert optimizer.state[p]["step"] == 7
        if blocksize == 256 and p.numel() >= 4096 and optim_bits == 8:  # what is not a root was copied
            case = replace(case, states={name: case.states[name] for name in case.roots})
        assert_holds(optimizer, case, p, means[i])
    steps(params, optimizer, 7, 8)


@pytest.mark.parametrize("blocksize", [256, 2048])
def test_another_table_is_quantized_anew(blocksize: int) -> None:
    state_dict, means = old_dict("AdamW", blocksize, linear)
    params = make_params(channels_last=False)
    optimizer = optim8.AdamW8bit(params)
    optimizer.load_state_dict(state_dict)
    for i, p in enumerate(params):
        assert_holds(optimizer, CASES["AdamW8bit"], p, means[i])


def test_a_table_with_other_roundings_is_the_same_table() -> None:
    state_dict, _ = old_dict("AdamW", 256, lambda signed: bnb.functional.create_dynamic_map(signed=signed))
    entry = state_dict["state"][0][WRAPPED]
    entry["qmap1"] = entry["qmap1"] * (1 + 2.0**-23)  # one unit in the last place; 0 stays 0
    params = make_params(channels_last=False)
    optimizer = optim8.AdamW8bit(params)
    with optim8.convert.report() as report:
        optimizer.load_state_dict(state_dict)
    assert {row.how for row in report.rows if "exp_avg'" in row.name} == {"copied"}
    assert bits(optimizer.state[params[0]]["exp_avg_codes"]) == bits(entry["state1"])


Break = Callable[[dict[str, Any]], Any]


def _quant(d: dict[str, Any], i: int = 0) -> dict[str, Any]:
    return d["state"][i][WRAPPED]  # type: ignore[no-any-return]


BROKEN: dict[str, tuple[Break, str]] = {
    "AdEMAMix": (lambda d: d["param_groups"][0].update(alpha=5.0), r"param_groups\[0\]\['alpha'\].*ademamix"),
    "AdEMAMix's betas": (lambda d: d["param_groups"][0].update(betas=(0.9, 0.9, 0.9)), r"\['betas'\] must be two"),
    "no second state": (lambda d: _quant(d).pop("state2"), r"state\[0\]\['state2'\].*got nothing"),
    "codes of another shape": (lambda d: _quant(d).update(state1=_quant(d)["state1"][1:]), r"state\[0\]\['state1'\]"),
    "codes of int8": (lambda d: _quant(d).update(state1=_quant(d)["state1"].to(torch.int8)), "got int8"),
    "no scales": (lambda d: _quant(d).pop("absmax2"), r"state\[0\]\['absmax2'\].*NoneType"),
    "scales for no block size": (
        lambda d: _quant(d).update(absmax1=torch.ones(7)),
        r"state\[0\]\['absmax1'\] has 7 entries for 5003 values",
    ),
    "negative scales": (lambda d: _quant(d)["absmax1"].neg_(), r"\['absmax1'\] must be finite and not neg"),
    "NaN in scales": (lambda d: _quant(d)["absmax2"].fill_(float("nan")), r"\['absmax2'\] must be finite"),
    "no table": (lambda d: _quant(d).pop("qmap1"), r"state\[0\]\['qmap1'\].*float32 \(256,\), got nothing"),
    "a short table": (lambda d: _quant(d).update(qmap1=torch.ones(16)), r"state\[0\]\['qmap1'\]"),
    "a table of NaN": (lambda d: _quant(d).update(qmap1=torch.full((256,), float("nan"))), r"\['qmap1'\] must be fin"),
    "a signed table of squares": (lambda d: _quant(d).update(qmap2=_quant(d)["qmap1"]), r"\['exp_avg_sq'\].*negative"),
    "a clipping history": (lambda d: _quant(d).update(gnorm_vec=torch.ones(100)), r"'gnorm_vec'.*percentile_clipping"),
    "LAMB's norm": (lambda d: _quant(d, 2).update(unorm_vec=torch.ones(1)), r"state\[2\]\['unorm_vec'\].*max_unorm"),
    "tensor-wise scales": (lambda d: _quant(d).update(max1=torch.ones(1)), r"'max1'.*block_wise=False"),
    "another key": (lambda d: _quant(d).update(state3=torch.ones(1)), r"\['state3'\] is no state"),
    "a key twice": (lambda d: d["state"][0].update(state1=_quant(d)["state1"]), r"\['state1'\] stands twice"),
    "a wrapping that is a tensor": (lambda d: d["state"][0].update({WRAPPED: torch.ones(1)}), "must be a dict"),
    "other strides": (
        lambda d: _quant(d, 1).update(state1=_quant(d, 1)["state1"].t().contiguous().t()),
        r"state\[1\]\['state1'\] has strides \(1, 70\).*contiguous\(\) after training on a CPU",
    ),
    "torch's state beside theirs": (
        lambda d: d["state"].update({2: {"step": 1, "exp_avg": torch.ones(10), "exp_avg_sq": torch.ones(10)}}),
        r"state\[2\]\['state1'\].*got nothing",
    ),
    "a parameter too few": (lambda d: d["param_groups"][0]["params"].pop(), r"param_groups\[0\] must have 6"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_does_not_fit_is_refused_whole(what: str) -> None:
    broken, _ = old_dict("AdamW", 256, lambda signed: bnb.functional.create_dynamic_map(signed=signed))
    change, message = BROKEN[what]
    change(broken)
    params = make_params(channels_last=False)
    optimizer = optim8.AdamW8bit(params, lr=0.5)
    steps(params, optimizer, 5, 6)
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match=message) as error:
        optimizer.load_state_dict(broken)
    assert "AdamW8bit.load_state_dict: " in str(error.value)
    assert snapshot(optimizer, params) == before


@pytest.mark.parametrize("name", ["SGD8bit", "RMSprop8bit", "Adagrad8bit"])
def test_others_with_one_state_are_not_taken_for_lion(name: str) -> None:
    options = {"lr": 0.1, "momentum": 0.9} if name == "SGD8bit" else {"lr": 0.1}
    theirs = getattr(bnb.optim, name)(make_params(channels_last=False), **options)
    state = {0: {"step": 1, "state1": torch.zeros(SHAPES[0])}}
    optimizer = optim8.Lion8bit(make_params(channels_last=False))
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['(eps|betas)'\].* no Lion's"):
        optimizer.load_state_dict({**theirs.state_dict(), "state": state})


@pytest.mark.parametrize("there, here", [("Lion8bit", "AdamW8bit"), ("AdamW8bit", "Lion8bit")])
def test_another_rule_is_refused(there: str, here: str) -> None:
    theirs_params = make_params(channels_last=False)
    theirs = theirs_of(there, theirs_params)
    steps(theirs_params, theirs, 0, 1)
    with pytest.raises(ValueError, match="'eps'" if here == "Lion8bit" else "'state2'"):
        ours(here, twins(theirs_params)).load_state_dict(theirs.state_dict())


def test_a_decoupled_weight_decay_stays_decoupled() -> None:
    """bitsandbytes' Adam decays as AdamW: that continues as AdamW8bit, and is refused elsewhere."""
    theirs_params = make_params(channels_last=False)
    theirs = bnb.optim.Adam8bit(theirs_params, lr=3e-3, weight_decay=0.1)
    steps(theirs_params, theirs, 0, 2)
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['weight_decay'\] is decoupled in bits.*AdamW8bit"):
        optim8.Adam8bit(twins(theirs_params)).load_state_dict(theirs.state_dict())
    params = twins(theirs_params)
    optimizer = optim8.AdamW8bit(params)
    optimizer.load_state_dict(theirs.state_dict())
    assert_same_step(params, optimizer, theirs_params, theirs, 2, within=REQUANTIZED)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("Adam8bit", {"weight_decay": 0.1}, r"param_groups\[0\]\['weight_decay'\] is 0.1, an L2"),
        ("AdamW8bit", {"maximize": True}, r"param_groups\[0\]\['maximize'\]"),
        ("Lion8bit", {"maximize": True}, r"param_groups\[0\]\['maximize'\]"),
    ],
)
def test_to_bitsandbytes_refuses_what_cannot_be_said_there(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim8.convert.to_bitsandbytes(ours(name, make_params(), **options))


def test_a_dict_without_state_carries_the_options() -> None:
    theirs = bnb.optim.AdamW8bit(make_params(), lr=0.25, betas=(0.5, 0.6))
    optimizer = optim8.AdamW8bit(make_params())
    optimizer.load_state_dict(theirs.state_dict())
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]) == (0.25, (0.5, 0.6))
    back = bnb.optim.AdamW8bit(make_params())
    back.load_state_dict(optim8.convert.to_bitsandbytes(optimizer))
    assert back.param_groups[0]["lr"] == 0.25
