"""ZeroRedundancyOptimizer hands loaded state past load_state_dict: the next step converts it, or refuses it."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.convert_harness import make_params, ours, steps, twins
from support.harness import bits, snapshot, state_bits
from torch.distributed.optim import ZeroRedundancyOptimizer

import optim8


@pytest.fixture(autouse=True, scope="module")
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def both(name: str, params: list[torch.nn.Parameter], state_dict: Any, **options: Any) -> tuple[Any, Any]:
    """The same dict, loaded by ZeroRedundancyOptimizer and by the optimizer itself."""
    zero = ZeroRedundancyOptimizer(params, getattr(optim8, name), **options)
    zero.load_state_dict(copy.deepcopy(state_dict))
    alone = ours(name, twins(params), **options)
    alone.load_state_dict(copy.deepcopy(state_dict))
    return zero, alone


def assert_alike(zero: Any, alone: Any, params: list[torch.nn.Parameter]) -> None:
    for p, q in zip(params, alone.param_groups[0]["params"], strict=True):
        assert bits(p) == bits(q)
        assert state_bits(zero.optim, p) == state_bits(alone, q)
        assert zero.optim.precision(p) == alone.precision(q)


@pytest.mark.parametrize("options", [{}, {"optim_bits": 32}, {"paged": True}], ids=str)
@pytest.mark.parametrize(
    "name, other",
    [
        ("Adam8bit", torch.optim.Adam),
        ("AdamW8bit", torch.optim.AdamW),
        ("SGD8bit", partial(torch.optim.SGD, momentum=0.9, dampening=0.3)),
    ],
)
def test_torchs_dict_is_converted_by_the_next_step(name: str, other: Any, options: dict[str, Any]) -> None:
    theirs_params = make_params()
    theirs = other(theirs_params, lr=3e-3, weight_decay=0.03)
    steps(theirs_params, theirs, 0, 2)
    params = twins(theirs_params)
    zero, alone = both(name, params, theirs.state_dict(), **options)
    steps(params, zero, 2, 4)
    steps(alone.param_groups[0]["params"], alone, 2, 4)
    assert_alike(zero, alone, params)


@pytest.mark.peers
@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit"])
def test_bitsandbytes_dict_is_converted_too(name: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    theirs_params = make_params(channels_last=False)
    theirs = getattr(bnb.optim, name)(theirs_params, lr=3e-3)
    steps(theirs_params, theirs, 0, 2)
    params = twins(theirs_params)
    zero, alone = both(name, params, theirs.state_dict())
    steps(params, zero, 2, 4)
    steps(alone.param_groups[0]["params"], alone, 2, 4)
    assert_alike(zero, alone, params)


@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq"])
def test_a_saved_dict_is_in_our_form_before_any_step(moment: str) -> None:
    theirs_params = make_params()
    theirs = torch.optim.AdamW(theirs_params)
    steps(theirs_params, theirs, 0, 2)
    params = twins(theirs_params)
    zero, alone = both("AdamW8bit", params, theirs.state_dict())
    zero.consolidate_state_dict()
    written = zero.state_dict()["state"]
    assert [entry.keys() for entry in written.values()] == [e.keys() for e in alone.state_dict()["state"].values()]


def refused(other: Any, name: str, message: str, optim_bits: int = 8, **options: Any) -> None:
    theirs_params = make_params()
    theirs = other(theirs_params, **options)
    steps(theirs_params, theirs, 0, 2)
    params = twins(theirs_params)
    zero = ZeroRedundancyOptimizer(params, getattr(optim8, name), optim_bits=optim_bits)
    zero.load_state_dict(theirs.state_dict())
    before = [bits(p) for p in params]
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            steps(params, zero, 2, 3)
    assert [bits(p) for p in params] == before


def test_what_cannot_be_converted_is_refused_by_each_step() -> None:
    decay = r"Adam8bit: a parameter group: \['decoupled_weight_decay'\] is True and weight_decay is 0\.1"
    refused(torch.optim.AdamW, "Adam8bit", decay, weight_decay=0.1)
    refused(torch.optim.NAdam, "AdamW8bit", r"\['mu_product'\] is no state|NAdam", 32)
    same_rule = r"is no state of this optimizer .* by an optimizer with the same rule"
    refused(torch.optim.SGD, "AdamW8bit", rf"\['momentum_buffer'\] {same_rule}", momentum=0.9)
    refused(torch.optim.Adadelta, "AdamW8bit", rf"\['square_avg'\] {same_rule}")
    refused(torch.optim.Rprop, "AdamW8bit", "Load a state dict that this optimizer wrote")  # nobody's
    for optim_bits in (8, 32):
        refused(torch.optim.AdamW, "Lion8bit", r"\['exp_avg_sq'\] is no state", optim_bits)
        refused(torch.optim.SGD, "Lion8bit", rf"\['momentum_buffer'\] {same_rule}", optim_bits, momentum=0.9)
        refused(torch.optim.AdamW, "SGD8bit", rf"\['exp_avg'\] {same_rule}", optim_bits)


@pytest.mark.parametrize("optim_bits", [8, 16, 32])
@pytest.mark.parametrize("carrier", ["as it is", "contiguous"])
def test_our_dict_goes_on_as_without(carrier: str, optim_bits: int) -> None:
    params = make_params()
    optimizer = optim8.AdamW8bit(params, optim_bits=optim_bits)
    steps(params, optimizer, 0, 2)
    others = twins(params)
    saved = optimizer.state_dict()
    if carrier == "contiguous":  # as safetensors wants it
        saved["state"] = {i: {k: v.contiguous() for k, v in e.items()} for i, e in saved["state"].items()}
    zero, _ = both("AdamW8bit", others, saved)
    # What ZeroRedundancyOptimizer keeps beside it is of no use to anybody: docs/distributed.md says how to drop it.
    assert all(entry for entry in zero.state.values())
    zero.state.clear()
    steps(others, zero, 2, 4)
    steps(params, optimizer, 2, 4)
    assert [state_bits(zero.optim, q) for q in others] == [state_bits(optimizer, p) for p in params]
    zero.consolidate_state_dict()
    again = optim8.AdamW8bit(twins(params))
    again.load_state_dict(zero.state_dict())
    assert [state_bits(again, q) for q in again.param_groups[0]["params"]] == [state_bits(optimizer, p) for p in params]


@pytest.mark.parametrize("how", ["moved", "a new dict", "copied", "a dict of the user's"])
def test_own_state_that_a_program_moves_stays_as_it_is(how: str) -> None:
    params = make_params()[:3]
    optimizer: Any = optim8.AdamW8bit(params)
    steps(params, optimizer, 0, 2)
    before = snapshot(optimizer)
    if how == "moved":
        q = twins(params[:1])[0]
        optimizer.state[q] = optimizer.state.pop(params[0])
        optimizer.param_groups[0]["params"][0] = params[0] = q
    elif how == "a new dict":
        for p in params:
            optimizer.state[p] = {key: value.clone() for key, value in optimizer.state[p].items()}
    elif how == "copied":
        assert type(copy.deepcopy(optimizer.state)) is defaultdict
        model, optimizer = copy.deepcopy((torch.nn.ParameterList(params), optimizer))
        params = list(model)
    else:
        optimizer.state = defaultdict(dict, optimizer.state)
    assert snapshot(optimizer) == before
    steps(params, optimizer, 2, 3)
    expected: Any = optim8.AdamW8bit(others := make_params()[:3])
    steps(others, expected, 0, 3)
    assert snapshot(optimizer) == snapshot(expected)


def test_our_dict_of_version_0_1_0_goes_on_too() -> None:
    params = make_params()
    optimizer = optim8.AdamW8bit(params)
    steps(params, optimizer, 0, 2)
    saved = optimizer.state_dict()
    keys = {"state": "exp_avg{}", "absmax": "exp_avg{}_absmax"}
    old = {
        i: {"step": saved["state"][i]["step"]}
        | {
            key.format(end): e[f"{theirs}{number}"]
            for number, end in ((1, ""), (2, "_sq"))
            for theirs, key in keys.items()
            if f"{theirs}{number}" in e
        }
        for i, e in optim8.convert.to_bitsandbytes(optimizer)["state"].items()
    }
    assert any(entry["exp_avg_sq"].dtype == torch.uint8 for entry in old.values())
    zero = ZeroRedundancyOptimizer(others := twins(params), optim8.AdamW8bit)
    zero.load_state_dict(copy.deepcopy({**saved, "state": old}))
    steps(others, zero, 2, 3)
    again = optim8.AdamW8bit(same := twins(params))
    again.load_state_dict({**saved, "state": old})
    steps(same, again, 2, 3)
    assert [state_bits(zero.optim, q) for q in others] == [state_bits(again, p) for p in same]
