"""Whatever moves between two steps, the next step finds it: nothing about a tensor is remembered wrongly."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from cases import Case
from support.harness import (
    ALL,
    DTYPES,
    assert_step,
    before_step,
    bits,
    hostile,
    moments,
    parameter,
    small_set,
    snapshot,
    state_bits,
    values,
)
from support.rounding import Rounded

BOTH = pytest.mark.parametrize("optim_bits", [8, 16, 32])


@ALL
def test_parameters_that_are_moved_between_steps(case: Case, device: torch.device) -> None:
    """`p.data = ...` gives a parameter another address: the next step goes there and nowhere else."""
    params, optimizer = small_set(case, device)
    stay, reference = small_set(case, device)
    for _ in range(3):
        old = params[0].data
        kept = old.clone()
        params[0].data = old.clone()
        params[0].grad = params[0].grad.clone()
        optimizer.step()
        reference.step()
        assert torch.equal(old, kept)
    assert [bits(p) for p in params] == [bits(p) for p in stay]


@BOTH
@ALL
def test_gradients_at_new_addresses(case: Case, optim_bits: int, device: torch.device) -> None:
    """zero_grad gives gradients back to the allocator; the old address holds something else by the next step."""
    params, optimizer = small_set(case, device, optim_bits=optim_bits)
    stay, reference = small_set(case, device, optim_bits=optim_bits)
    for t in range(4):
        keep = []
        for i, (p, q) in enumerate(zip(params, stay, strict=True)):
            g = hostile(p.numel(), torch.float32, seed=10 * t + i).to(device)
            q.grad.copy_(g)
            old, p.grad = p.grad, g.clone()
            old.fill_(1e9)
            keep.append(old)
        optimizer.step()
        reference.step()
    assert snapshot(optimizer) == snapshot(reference)


@BOTH
@ALL
def test_state_tensors_that_are_replaced(case: Case, optim_bits: int, device: torch.device) -> None:
    """As offloading does: the state leaves and comes back elsewhere."""
    params, optimizer = small_set(case, device, optim_bits=optim_bits)
    _, reference = small_set(case, device, optim_bits=optim_bits)
    for _ in range(3):
        optimizer.step()
        reference.step()
        for p in params:
            entry = optimizer.state[p]
            old = dict(entry)
            entry.update({key: t.clone() for key, t in old.items()})
            for t in old.values():
                t.fill_(1)
    assert snapshot(optimizer) == snapshot(reference)
    optimizer.state.clear()  # start again, as torch.optim does
    optimizer.step()
    assert all(optimizer.state[p]["step"] == 1 for p in params)


@BOTH
@ALL
def test_a_parameter_whose_dtype_changes(case: Case, optim_bits: int, device: torch.device) -> None:
    """model.bfloat16() after some steps: the state stays, the steps go on in the new dtype."""
    p = parameter(hostile(700, torch.float32, seed=1, small=-2, large=0).to(device))
    optimizer = case.make([p], optim_bits=optim_bits)
    for t, dtype in enumerate(("float32", "bfloat16", "float16", "float32"), 1):
        p.grad = None
        p.data = p.data.to(DTYPES[dtype])
        p.grad = hostile(700, DTYPES[dtype], seed=t).to(device)
        before = before_step(optimizer, case, p)
        optimizer.step()
        assert_step(optimizer, case, p, before, case.hypers[0], t)


@BOTH
@ALL
def test_a_parameter_whose_strides_change(case: Case, optim_bits: int, device: torch.device) -> None:
    """model.to(memory_format=channels_last) after some steps: the state is brought into the new order."""
    shape, hyper = (4, 6, 10, 10), case.hypers[0]
    data, first, second = (hostile(2400, torch.float32, seed=i, small=-2, large=0).to(device) for i in range(3))
    p = parameter(data.clone().view(shape), first.view(shape))
    optimizer = case.make([p], optim_bits=optim_bits)
    optimizer.step()
    old_p, _, old = before_step(optimizer, case, p)
    p.grad = None
    p.data = p.data.contiguous(memory_format=torch.channels_last)
    p.grad = second.view(shape).contiguous(memory_format=torch.channels_last)
    optimizer.step()
    _, expected = case.rule(Rounded.exact(old_p), Rounded.exact(values(second)), old, t=2, **hyper)
    for name, after in moments(optimizer, case, p).items():
        actual = after.value.reshape(4, 10, 10, 6).transpose(0, 3, 1, 2).ravel()
        # Quantized twice, into the new order and by the step, each time within 0.00704 of a block's largest; in 16 bits
        # within half of a 256th of that, and all of it by dithering.
        largest = abs(old[name].value).max() + abs(expected[name].value).max()
        tolerance = expected[name].error + {8: 0.00704, 16: 2 * 0.00704 / 256, 32: 0.0}[optim_bits] * largest
        if optim_bits == 32 or name not in case.of_others:
            assert (abs(actual - expected[name].value) <= tolerance).all(), name
        assert optimizer.state[p][name if optim_bits == 32 else case.codes(name)].stride() == p.stride()
    if optim_bits == 32:
        q = parameter(data.view(shape).contiguous(memory_format=torch.channels_last))
        always = case.make([q], optim_bits=32)
        for g in (first, second):
            q.grad = g.view(shape).contiguous(memory_format=torch.channels_last)
            always.step()
        assert bits(p) == bits(q)
        assert state_bits(optimizer, p) == state_bits(always, q)


@ALL
def test_the_list_of_parameters_may_change(case: Case, device: torch.device) -> None:
    params, optimizer = small_set(case, device)
    optimizer.step()
    group = optimizer.param_groups[0]
    new = parameter(torch.linspace(-1, 1, 300, device=device), torch.ones(300, device=device))
    gone = group["params"].pop(0)
    group["params"].append(new)
    group["params"].reverse()
    before, others = bits(gone), [bits(p) for p in params[1:]]
    optimizer.step()
    assert bits(gone) == before
    assert optimizer.state[new]["step"] == 1
    assert optimizer.state[params[3]]["step"] == 2
    assert [bits(p) for p in params[1:]] != others


@BOTH
@ALL
def test_loading_and_copying_between_steps(case: Case, optim_bits: int, device: torch.device) -> None:
    """After a step has been taken, so that whatever is remembered of it would show."""
    params, optimizer = small_set(case, device, optim_bits=optim_bits)
    _, reference = small_set(case, device, optim_bits=optim_bits)
    for _ in range(2):
        optimizer.step()
        reference.step()
    start = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
    ends = []
    for _ in range(2):
        optimizer.step()
        ends.append((snapshot(optimizer), optimizer.load_state_dict(start[0]))[0])
        for p, old in zip(params, start[1], strict=True):
            p.data.copy_(old)
    assert ends[0] == ends[1]
    reference.step()
    assert snapshot(reference) == ends[0]
    pair: Any = copy.deepcopy((params, optimizer))
    for p, q in zip(params, pair[0], strict=True):
        q.grad = p.grad.clone()
    kept = snapshot(optimizer)
    pair[1].step()
    assert snapshot(pair[1]) == ends[0]
    assert snapshot(optimizer) == kept
    optimizer.step()
    assert snapshot(optimizer) == ends[0]


@ALL
def test_an_optimizer_goes_when_it_is_dropped(case: Case, device: torch.device) -> None:
    """No reference is kept to parameters, gradients or state by anything but the optimizer."""
    params, optimizer = small_set(case, device)
    optimizer.step()
    moment = optimizer.moments[0].values(optimizer.state[params[0]])
    watched = [weakref.ref(params[0]), weakref.ref(params[0].grad), weakref.ref(moment)]
    del moment
    params[0].grad = None
    gc.collect()
    assert watched[1]() is None, "the gradient of a step is kept after zero_grad"
    del params, optimizer
    gc.collect()
    assert [w() for w in watched] == [None] * 3


@ALL
def test_loaded_state_may_be_views_with_gaps(case: Case, device: torch.device) -> None:
    """Every second value of a larger tensor holds the same state as the tensor by itself, bit for bit."""
    p = parameter(torch.linspace(-1, 1, 1200, device=device).view(30, 40), torch.ones(30, 40, device=device))
    optimizer = case.make([p])
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for name, value in saved["state"][0].items():
        if name != "step":
            saved["state"][0][name] = torch.stack([value, value.flip(0)], -1)[..., 0]
    loaded = case.make([torch.nn.Parameter(p.detach().clone())])
    loaded.load_state_dict(saved)
    (entry,) = loaded.state.values()
    for name, value in optimizer.state[p].items():
        assert torch.equal(entry[name], value)
