"""What happens around a step in a training loop: late, tied and moved parameters, gradient scaling, clipping, hooks."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import Case
from support.harness import (
    ALL,
    assert_step,
    before_step,
    bits,
    hostile,
    parameter,
    small_set,
    snapshot,
    state_bits,
)

BOTH = pytest.mark.parametrize("optim_bits", [8, 16, 32])


@BOTH
@ALL
def test_parameters_without_gradient_and_a_late_first_gradient(
    case: Case, optim_bits: int, device: torch.device
) -> None:
    early, late = (parameter(torch.linspace(-1, 1, 600, device=device)) for _ in range(2))
    never = parameter(torch.ones(600, device=device))
    frozen = torch.nn.Parameter(torch.ones(600, device=device), requires_grad=False)
    optimizer = case.make([never, early, late, frozen], optim_bits=optim_bits)
    optimizer.step()  # nothing has a gradient
    assert len(optimizer.state) == 0
    for t in range(4):
        early.grad = torch.full_like(early, 0.1 + t)
        late.grad = torch.full_like(late, 0.1 + t - 2) if t >= 2 else None
        optimizer.step()
    alone = parameter(torch.linspace(-1, 1, 600, device=device))
    reference = case.make([alone], optim_bits=optim_bits)
    for t in range(2):
        alone.grad = torch.full_like(alone, 0.1 + t)
        reference.step()
    assert bits(late) == bits(alone)
    assert state_bits(optimizer, late) == state_bits(reference, alone)
    assert (optimizer.state[early]["step"], optimizer.state[late]["step"]) == (4, 2)
    assert never not in optimizer.state or not optimizer.state[never]
    assert (never == 1).all()
    assert (frozen == 1).all()


@ALL
def test_a_gradient_that_is_missing_for_one_step(case: Case, device: torch.device) -> None:
    params, optimizer = small_set(case, device)
    optimizer.step()
    params[0].grad = None
    before = bits(params[0]), state_bits(optimizer, params[0])
    optimizer.step()
    assert (bits(params[0]), state_bits(optimizer, params[0])) == before
    assert optimizer.state[params[3]]["step"] == 2


@ALL
def test_tied_parameters_are_stepped_once(case: Case, device: torch.device) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(20, 20, bias=False), torch.nn.Linear(20, 20, bias=False)).to(device)
    model[1].weight = model[0].weight
    optimizer = case.make(model.parameters())
    assert len(optimizer.param_groups[0]["params"]) == 1
    x = torch.linspace(-1, 1, 60, device=device).view(3, 20)
    model(x).square().sum().backward()
    p = model[0].weight
    before = before_step(optimizer, case, p)
    optimizer.step()
    assert_step(optimizer, case, p, before, case.hypers[0], 1)


@BOTH
@ALL
def test_zero_dimensional_empty_and_tiny_parameters(case: Case, optim_bits: int, device: torch.device) -> None:
    shapes: list[tuple[int, ...]] = [(), (0,), (3,), (2, 0, 3), (1, 1, 1)]
    params = [parameter(torch.full(s, 0.5, device=device), torch.full(s, -0.25, device=device)) for s in shapes]
    optimizer = case.make(params, optim_bits=optim_bits)
    for t in (1, 2):
        before = [before_step(optimizer, case, p) for p in params]
        optimizer.step()
        for p, b, shape in zip(params, before, shapes, strict=True):
            assert p.shape == shape
            assert optimizer.moments[0].values(optimizer.state[p]).shape == shape
            assert_step(optimizer, case, p, b, case.hypers[0], t)


@pytest.mark.parametrize("fused", [None, True])  # torch's fused optimizers take the scale into the kernel
@BOTH
@ALL
def test_gradient_scaler(case: Case, optim_bits: int, fused: bool | None, device: torch.device) -> None:
    """A power of two as scale leaves the same bits; a step with an infinite gradient leaves everything."""
    scaled, optimizer = small_set(case, device, optim_bits=optim_bits, fused=fused)
    plain, reference = small_set(case, device, optim_bits=optim_bits)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    for t in range(3):
        for params in (scaled, plain):
            loss = sum(((t + 1) * p * p).sum() for p in params)
            optimizer.zero_grad() if params is scaled else reference.zero_grad()
            (scaler.scale(loss) if params is scaled else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        reference.step()
    assert [bits(p) for p in scaled] == [bits(p) for p in plain]
    assert [state_bits(optimizer, p) for p in scaled] == [state_bits(reference, p) for p in plain]
    scaler.scale(sum((p * p).sum() for p in scaled)).backward()
    scaled[0].grad[5] = float("inf")
    before = snapshot(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert snapshot(optimizer) == before, "a skipped step changes nothing"
    assert scaler.get_scale() == 512


@ALL
def test_clipping_and_accumulation(case: Case, device: torch.device) -> None:
    params, optimizer = small_set(case, device)
    for p in params:
        p.grad = None
    for _ in range(3):
        sum((p * p).sum() for p in params).backward()
    torch.nn.utils.clip_grad_norm_(params, 0.5)
    before = [before_step(optimizer, case, p) for p in params]
    optimizer.step()
    for p, b in zip(params, before, strict=True):
        assert_step(optimizer, case, p, b, case.hypers[0], 1)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


@ALL
def test_hooks(case: Case, device: torch.device) -> None:
    params, optimizer = small_set(case, device)
    events: list[str] = []
    handles = [
        optimizer.register_step_pre_hook(lambda o, args, kwargs: events.append(f"before {len(o.state)}")),
        optimizer.register_step_post_hook(lambda o, args, kwargs: events.append(f"after {len(o.state)}")),
        optimizer.register_state_dict_pre_hook(lambda o: events.append("saving")),
        optimizer.register_state_dict_post_hook(lambda o, d: events.append(f"saved {len(d['state'])}")),
        optimizer.register_load_state_dict_pre_hook(lambda o, d: events.append("loading")),
        optimizer.register_load_state_dict_post_hook(lambda o: events.append(f"loaded {len(o.state)}")),
    ]
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert events == [
        "before 0",
        f"after {len(params)}",
        "saving",
        f"saved {len(params)}",
        "loading",
        f"loaded {len(params)}",
    ]
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert len(events) == 6


@ALL
def test_implementation_choices(case: Case, device: torch.device) -> None:
    """foreach and fused choose an implementation in torch: here any truthful choice gives the same bits."""
    ends = set()
    for foreach, fused in itertools.product((None, False, True), repeat=2):
        if foreach and fused:  # torch refuses both
            with pytest.raises((ValueError, RuntimeError), match="fused"):
                small_set(case, device, foreach=True, fused=True)
            continue
        params, optimizer = small_set(case, device, foreach=foreach, fused=fused)
        optimizer.step()
        ends.add(b"".join(bits(p) for p in params))
    assert len(ends) == 1


@ALL
def test_autograd_sees_the_change_and_no_graph(case: Case, device: torch.device) -> None:
    params, optimizer = small_set(case, device)
    version = params[0]._version
    optimizer.step()
    assert all(p.requires_grad and p.is_leaf and p.grad_fn is None for p in params)
    assert params[0]._version > version, "autograd must see that a saved tensor was changed in place"


@BOTH
@ALL
def test_many_tensors_in_one_call_are_as_each_alone(case: Case, optim_bits: int, device: torch.device) -> None:
    """Tensors of all sizes in one step, so that the share of a thread begins and ends anywhere."""
    sizes = [(i * 37) % 700 for i in range(250)]
    together = [parameter(hostile(n, torch.float32, seed=i, small=-2, large=0).to(device)) for i, n in enumerate(sizes)]
    alone = [parameter(p.detach().clone()) for p in together]
    optimizer, own = case.make(together, optim_bits=optim_bits), [case.make([p], optim_bits=optim_bits) for p in alone]
    for t in range(2):
        for i, (p, q) in enumerate(zip(together, alone, strict=True)):
            p.grad = hostile(sizes[i], torch.float32, seed=1000 * t + i).to(device)
            q.grad = p.grad.clone()
            own[i].step()
        optimizer.step()
    for p, q, single in zip(together, alone, own, strict=True):
        assert bits(p) == bits(q)
        assert state_bits(optimizer, p) == state_bits(single, q)
