"""FlashOptim's dicts, which need a GPU to be made: here they are built as version 0.1.4 writes them, in float64.

Triton's interpreter gave the same codes and scales with its kernels on a CPU, and the same weights from error bits.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.convert_harness import CARRIERS, Params, assert_same_step, make_params, ours, steps, twins
from support.harness import bits, snapshot

import optim8
from optim8.state.weights import join

STEPS = 5
GROUP = 32
ADAM: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-9, "weight_decay": 0.03}


@dataclasses.dataclass(frozen=True)
class Kind:
    """An optimizer there: its moments in order, our class, its options, and what it is made of in torch."""

    moments: tuple[str, ...]
    ours: str
    hyper: dict[str, Any]
    torch: str
    counted: bool = True


KINDS = {
    "FlashAdamW": Kind(("exp_avg", "exp_avg_sq"), "AdamW8bit", ADAM, "AdamW"),
    "FlashAdam": Kind(("exp_avg", "exp_avg_sq"), "Adam8bit", ADAM, "Adam"),
    "FlashSGD": Kind(
        ("momentum_buffer",),
        "SGD8bit",
        {"lr": 3e-3, "momentum": 0.7, "dampening": 0.2, "weight_decay": 0.0},
        "SGD",
        counted=False,
    ),
}
LION = Kind(("exp_avg",), "Lion8bit", {"lr": 3e-3, "betas": (0.8, 0.95), "weight_decay": 0.03}, "Lion", counted=False)


def encode(values: torch.Tensor, *, is_square: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a moment: a signed one bent by 2x / (1 + |x|), the root of a square evenly."""
    flat = values.detach().double().flatten()
    flat = flat.sqrt() if is_square else flat
    count = -(-flat.numel() // GROUP)
    groups = torch.cat([flat, flat.new_zeros(count * GROUP - flat.numel())]).view(count, GROUP)
    largest = groups.abs().amax(1).clamp(min=1e-12) if count else flat.new_zeros(0)
    x = groups / largest[:, None]
    y = x * 255 if is_square else 2 * x / (1 + x.abs()) * 127
    codes = (y + 0.5).floor().flatten()[: flat.numel()].view(values.shape)
    return codes.to(torch.uint8 if is_square else torch.int8), largest.to(torch.float16)


def decode(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    scale = scales.double().repeat_interleave(GROUP)[: codes.numel()].view(codes.shape)
    if codes.dtype == torch.uint8:
        return (codes.double() / 255 * scale) ** 2
    y = codes.double() / 127
    return y / (2 - y.abs()) * scale


def saved_by(kind: Kind, state: dict[int, dict[str, Any]], params: Params, *, width: int = 0, **options: Any) -> Any:
    """The dict of these float moments; `width`: the bytes of whole weights."""
    group = {**kind.hyper, "initial_lr": kind.hyper["lr"], "master_bytewidth": width, "quantize": True}
    entries = {}
    for key, entry in state.items():
        entries[key] = {"step": torch.tensor(STEPS)} if kind.counted else {}
        for name in kind.moments:
            codes, scales = encode(entry[name], is_square=name == "exp_avg_sq")
            is_bfloat16 = params[key].dtype == torch.bfloat16
            entries[key][f"{name}::quantized"] = codes
            entries[key][f"{name}::scales"] = scales.view(torch.bfloat16) if is_bfloat16 else scales
    return {"state": entries, "param_groups": [{**group, **options, "params": list(state)}]}


def trained(kind: Kind, dtype: torch.dtype = torch.float32) -> tuple[Params, dict[int, dict[str, Any]]]:
    """Parameters and float moments after some steps."""
    params = make_params(dtype, channels_last=False)
    if kind is LION:
        generator = torch.Generator().manual_seed(7)
        return params, {i: {"exp_avg": torch.randn(p.shape, generator=generator)} for i, p in enumerate(params)}
    optimizer = getattr(torch.optim, kind.torch)(params, **kind.hyper)
    steps(params, optimizer, 0, STEPS)
    return params, optimizer.state_dict()["state"]


def decoded(kind: Kind, saved: dict[str, Any]) -> dict[int, dict[str, torch.Tensor]]:
    found: dict[int, dict[str, torch.Tensor]] = {}
    for key, entry in saved["state"].items():
        scales = {name: entry[f"{name}::scales"].view(torch.float16) for name in kind.moments}
        found[key] = {name: decode(entry[f"{name}::quantized"], scales[name]) for name in kind.moments}
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*KINDS, "FlashLion"])
def test_moments_are_those_that_the_codes_stand_for(name: str, dtype: torch.dtype) -> None:
    kind = KINDS.get(name, LION)
    theirs_params, state = trained(kind, dtype)
    saved = saved_by(kind, state, theirs_params)
    there = decoded(kind, saved)
    params = twins(theirs_params)
    optimizer = ours(
        kind.ours, params, optim_bits=32, **({"momentum": 0.1, "nesterov": False} if name == "FlashSGD" else {})
    )
    optimizer.load_state_dict(CARRIERS["torch.save"](saved))
    group = optimizer.param_groups[0]
    assert {key: group[key] for key in kind.hyper} == kind.hyper
    assert group["initial_lr"] == kind.hyper["lr"]  # of a scheduler
    assert not {"master_bytewidth", "quantize"} & group.keys()
    for index, p in enumerate(params):
        for moment in kind.moments:  # a table, a product and a square in float32
            torch.testing.assert_close(optimizer.state[p][moment], there[index][moment].float(), rtol=2**-21, atol=0)
        assert float(optimizer.state[p]["step"]) == (STEPS if kind.counted else float(name == "FlashSGD"))
    # In fewer bits it is what these floats become that another library saved.
    floats = {key: {m: optimizer.state[params[key]][m].clone() for m in kind.moments} for key in there}
    plain = {
        **saved,
        "state": {
            key: {**{k: v for k, v in saved["state"][key].items() if k == "step"}, **entry}
            for key, entry in floats.items()
        },
    }
    for optim_bits in (8, 16):
        both = []
        for each in (saved, plain):
            others = twins(params)
            other = ours(kind.ours, others, optim_bits=optim_bits)
            other.load_state_dict(copy.deepcopy(each))
            assert other.precision(others[0]) == f"{optim_bits}bit"
            both.append(snapshot(other, others))
        assert both[0] == both[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["FlashAdamW", "FlashLion"])
def test_planned_bytes_are_those_of_its_dicts(name: str, dtype: torch.dtype) -> None:
    """By default a byte completes 16-bit weights."""
    kind = KINDS.get(name, LION)
    params, state = trained(kind, dtype)
    saved = saved_by(kind, state, params, width=3)["state"]
    if dtype != torch.float32:
        for key, entry in saved.items():
            entry["error_bits"] = shares(params[key].detach().float(), params[key].detach(), 3)
    model = torch.nn.ParameterList(params)
    planned = optim8.memory.plan(model, {"FlashAdamW": "flashoptim-adamw", "FlashLion": "flashoptim-lion"}[name])
    assert planned.state_bytes == sum(value.nbytes for entry in saved.values() for value in entry.values())
    low = sum(p.numel() for p in params) if dtype != torch.float32 else 0
    assert planned.bytes.get("master", 0) == low
    assert planned.bytes["codes"] == len(kind.moments) * sum(p.numel() for p in params)
    assert planned.needed >= planned.total


@pytest.mark.parametrize("name", KINDS)
def test_training_goes_on_as_in_torch(name: str) -> None:
    kind = KINDS[name]
    theirs_params, state = trained(kind)
    saved = saved_by(kind, state, theirs_params)
    theirs = getattr(torch.optim, kind.torch)(theirs_params, **kind.hyper)
    filled = theirs.state_dict()
    for key, entry in decoded(kind, saved).items():
        step = {"step": torch.tensor(float(STEPS))} if kind.counted else {}
        filled["state"][key] = {**step, **{moment: value.float() for moment, value in entry.items()}}
    theirs.load_state_dict(filled)
    params = twins(theirs_params)
    optimizer = ours(kind.ours, params, optim_bits=32, **({"momentum": 0.1} if name == "FlashSGD" else {}))
    optimizer.load_state_dict(saved)
    assert_same_step(params, optimizer, theirs_params, theirs, STEPS)


def test_moments_that_are_not_compressed() -> None:
    """With compress_state_dict=False, and without quantization in the parameter's dtype."""
    kind = KINDS["FlashAdamW"]
    theirs_params, state = trained(kind, torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        saved = saved_by(kind, state, theirs_params)
        floats = {key: {m: (entry[m] * 1e-4).to(dtype) for m in kind.moments} for key, entry in state.items()}
        saved["state"] = {key: {"step": torch.tensor(STEPS), **entry} for key, entry in floats.items()}
        params = twins(theirs_params)
        optimizer = ours(kind.ours, params, optim_bits=32)
        with optim8.convert.report() as report:
            optimizer.load_state_dict(saved)
        zeros = sum(int(((entry["exp_avg_sq"] == 0) & (entry["exp_avg"] != 0)).sum()) for entry in floats.values())
        assert sum(note.count for note in report.notes) == zeros
        assert (zeros > 0) == (dtype == torch.float16)
        for key, entry in floats.items():
            for moment, value in entry.items():
                assert torch.equal(optimizer.state[params[key]][moment], value.float())


def test_roots_that_even_steps_made_zero_are_noted() -> None:
    kind = KINDS["FlashAdamW"]
    params = make_params(channels_last=False)
    small = torch.full((5003,), 1e-6)
    small[::GROUP] = 1.0
    state = {0: {"exp_avg": small.sign() * 0.5, "exp_avg_sq": small**2}}
    saved = saved_by(kind, state, params)
    saved["param_groups"][0]["params"] = list(range(len(params)))
    with optim8.convert.report() as report:
        ours("AdamW8bit", params).load_state_dict(saved)
    (note,) = report.notes
    assert (note.name, note.count) == ("AdamW8bit.load_state_dict: state[0]['exp_avg_sq::quantized']", 5003 - 157)
    assert "255 even steps" in note.text


# Weights.


def half_last_bit(narrow: torch.Tensor) -> torch.Tensor:
    """float64, of each value's own binade; all subnormal values have that of the least normal one."""
    kind = torch.finfo(narrow.dtype)
    power = torch.frexp(narrow.double().abs().clamp(min=kind.tiny))[1].double().sub(1).exp2()
    return power * kind.eps / 2


def shares(wide: torch.Tensor, narrow: torch.Tensor, width: int) -> torch.Tensor:
    """The error bits, as whole numbers: half away from 0."""
    most = 127 if width == 3 else 32767
    share = ((wide.double() - narrow.double()) / half_last_bit(narrow)).clamp(-1, 1) * most
    return ((share.abs() + 0.5).floor() * share.sign()).to(torch.int8 if width == 3 else torch.int16)


def weights() -> torch.Tensor:
    """float32: of many sizes and both signs, beside powers of two, subnormal in float16, and 0."""
    generator = torch.Generator().manual_seed(3)
    some = torch.randn(4000, generator=generator) * 10 ** torch.empty(4000).uniform_(-6, 1, generator=generator)
    powers = torch.arange(-20, 8).float().exp2()
    beside = torch.cat([powers * (1 + shift) for shift in (-(2.0**-11), -(2.0**-13), 0.0, 2.0**-11)])
    return torch.cat([some, beside, -beside, torch.zeros(8)])


@pytest.mark.parametrize("as_saved", [True, False], ids=["in the dtype of the parameter", "whole numbers"])
@pytest.mark.parametrize("width", [3, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("master_bits", [16, 24, 32])
def test_error_bits_become_low_bits(master_bits: int, dtype: torch.dtype, width: int, as_saved: bool) -> None:
    wide = weights()
    params = [torch.nn.Parameter(wide.to(dtype))]
    p = params[0].detach()
    error_bits = shares(wide, p, width)
    assert len(error_bits.unique()) > 200
    there = p.double() + error_bits.double() / (127 if width == 3 else 32767) * half_last_bit(p)
    saved = saved_by(
        KINDS["FlashAdamW"], {0: dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.ones(wide.shape))}, params, width=width
    )
    kept = error_bits.view(dtype) if width == 4 else error_bits.to(dtype)
    saved["state"][0]["error_bits"] = kept if as_saved else error_bits
    optimizer = ours("AdamW8bit", params, master_bits=master_bits)
    with optim8.convert.report() as report:
        optimizer.load_state_dict(CARRIERS["torch.save"](saved))
    lost = [note.count for note in report.notes if "beside the parameter" in note.text]
    assert bits(params[0]) == bits(p)
    if master_bits == 16:
        assert lost == [int((error_bits != 0).sum())]
        return
    assert lost == []
    error = (join(p, optimizer.state[params[0]]["param_low"]).double() - there).abs() / (2 * half_last_bit(p))
    # All of the half, and beside a power of two more than its quarter: the weight that they say rounds to a neighbour.
    far = (error_bits.abs().double() / error_bits.abs().max() > 0.98) | (
        p.abs() == p.abs().double().log2().round().exp2()
    )
    # The rest and its sum with the parameter in float32, whose last bit bfloat16 weights keep; float16's keep multiples
    # of 2^-13 of the parameter's; and a byte is rounded after that.
    nearest = 2.0**-24 + (2.0**-17 if dtype == torch.bfloat16 else 2.0**-15 + 2.0**-14)
    assert float(error[~far].max()) <= nearest + (2.0**-9 if master_bits == 24 else 0.0)
    assert float(error.max()) <= 2.0**-7


def test_error_bits_of_another_dtype_are_counted_as_lost() -> None:
    wide = weights()
    params = [torch.nn.Parameter(wide.half())]
    error_bits = shares(wide, wide.bfloat16(), 3)
    saved = saved_by(
        KINDS["FlashAdamW"], {0: dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.ones(wide.shape))}, params, width=3
    )
    saved["state"][0]["error_bits"] = error_bits.bfloat16()
    optimizer = ours("AdamW8bit", params, master_bits=24)
    with optim8.convert.report() as report:
        optimizer.load_state_dict(saved)
    assert [note.count for note in report.notes if "in the dtype that it was saved in" in note.text] == [
        int((error_bits != 0).sum())
    ]
    assert not optimizer.state[params[0]]["param_low"].any()


def test_sgd_without_a_momentum_has_weights_alone() -> None:
    kind, wide = KINDS["FlashSGD"], weights()
    params = [torch.nn.Parameter(wide.bfloat16())]
    saved = saved_by(kind, {0: {"momentum_buffer": torch.zeros(wide.shape)}}, params, width=4, momentum=0.0)
    saved["state"][0]["error_bits"] = shares(wide, params[0].detach(), 4).view(torch.bfloat16)
    optimizer = ours("SGD8bit", params, lr=0.1, master_bits=32)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["momentum"] == 0
    torch.testing.assert_close(
        join(params[0].detach(), optimizer.state[params[0]]["param_low"]), wide, rtol=2.0**-15, atol=1e-9
    )


# What is refused.


class Wrapped(torch.Tensor):
    """As a DTensor: a tensor of a class of its own."""


Change = Callable[[dict[str, Any], dict[str, Any]], object]  # of the first state and of the group
REFUSED: dict[str, tuple[str, str, Change, str]] = {
    "another rule": (
        "FlashAdamW",
        "RMSprop8bit",
        lambda s, g: None,
        "rmsprop cannot be converted for FlashOptim; .*adamw",
    ),
    "Adam for Lion": ("FlashAdamW", "Lion8bit", lambda s, g: None, r"\['eps'\] is no option of lion"),
    "Lion for Adam": ("FlashLion", "AdamW8bit", lambda s, g: None, r"\['eps'\] is missing"),
    "a decay of SGD": (
        "FlashSGD",
        "SGD8bit",
        lambda s, g: g.update(weight_decay=0.1),
        r"\['weight_decay'\] is 0.1, and nothing says whether FlashSGD or FlashSGDW .*'decoupled_weight_decay': False",
    ),
    "FlashSGDW": (
        "FlashSGD",
        "SGD8bit",
        lambda s, g: g.update(weight_decay=0.1, decoupled_weight_decay=True),
        r"\['decoupled_weight_decay'\] is True and weight_decay is 0.1",
    ),
    "an unknown state": ("FlashAdamW", "AdamW8bit", lambda s, g: s.update(max=1), r"state\[0\]\['max'\] is no state"),
    "no scales": (
        "FlashAdamW",
        "AdamW8bit",
        lambda s, g: s.pop("exp_avg::scales"),
        r"\['exp_avg::scales'\] must be bfloat16 or float16 \(157,\), got nothing",
    ),
    "scales of other groups": (
        "FlashAdamW",
        "AdamW8bit",
        lambda s, g: s.update({"exp_avg::scales": s["exp_avg::scales"][1:]}),
        r"\['exp_avg::scales'\] must be .* \(157,\), got float16 \(156,\)",
    ),
    "infinite scales": (
        "FlashAdamW",
        "AdamW8bit",
        lambda s, g: s["exp_avg_sq::scales"][:1].fill_(torch.inf),
        r"\['exp_avg_sq::scales'\] is infinite: FlashOptim's scales end at 65504",
    ),
    "damaged scales": (
        "FlashAdamW",
        "AdamW8bit",
        lambda s, g: s["exp_avg_sq::scales"][:1].fill_(torch.nan),
        r"\['exp_avg_sq::scales'\] must be finite and not negative",
    ),
    "signed codes": (
        "FlashAdamW",
        "AdamW8bit",
        lambda s, g: s.update({"exp_avg_sq::quantized": s["exp_avg::quantized"]}),
        r"\['exp_avg_sq::quantized'\] must be uint8 \(5003,\), got int8",
    ),
    "strided codes": (
        "FlashAdamW",
        "AdamW8bit",
        lambda s, g: s.update({"exp_avg::quantized": torch.zeros(10006, dtype=torch.int8)[::2]}),
        r"\['exp_avg::quantized'\] must be a plain contiguous tensor, got Tensor with strides \(2,\)",
    ),
    "shards": (
        "FlashAdamW",
        "AdamW8bit",
        lambda s, g: s.update({"exp_avg::quantized": s["exp_avg::quantized"].as_subclass(Wrapped)}),
        r"\['exp_avg::quantized'\] must be a plain .*, got Wrapped .*compress_state_dict=False",
    ),
    "error bits of no width": (
        "FlashAdamW",
        "AdamW8bit",
        lambda s, g: s.update(error_bits=torch.zeros(5003).bfloat16()),
        r"\['error_bits'\] is there, and 'master_bytewidth' of its group is 0: it must be 3 or 4",
    ),
    "error bits that are not whole": (
        "FlashAdamW",
        "AdamW8bit",
        lambda s, g: (g.update(master_bytewidth=3), s.update(error_bits=torch.full((5003,), 0.5).bfloat16())),
        r"\['error_bits'\] must be whole numbers from -127 to 127",
    ),
    "error bits that were cast": (
        "FlashAdamW",
        "AdamW8bit",
        lambda s, g: (g.update(master_bytewidth=4), s.update(error_bits=torch.zeros(5003))),
        r"\['error_bits'\] must be int16 or bfloat16 or float16 \(5003,\), got float32",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_read_is_refused(what: str) -> None:
    name, mine, change, message = REFUSED[what]
    kind = KINDS.get(name, LION)
    theirs_params, state = trained(kind)
    saved = saved_by(kind, state, theirs_params)
    change(saved["state"][0], saved["param_groups"][0])
    params = make_params(channels_last=False)
    optimizer = ours(mine, params, **({"momentum": 0.5} if mine == "SGD8bit" else {}))
    steps(params, optimizer, 0, 1)
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert snapshot(optimizer, params) == before


def test_the_decay_of_flashsgd_loads_where_the_dict_says_whose_it_is() -> None:
    kind = KINDS["FlashSGD"]
    theirs_params, state = trained(kind)
    saved = saved_by(kind, state, theirs_params, weight_decay=0.1, decoupled_weight_decay=False)
    optimizer = ours("SGD8bit", make_params(channels_last=False), momentum=0.5, nesterov=False)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    assert "decoupled_weight_decay" not in optimizer.param_groups[0]
