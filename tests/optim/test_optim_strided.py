"""Parameters with gaps between their elements, as slices have: stepped as the same values without gaps would be."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from cases import EVERY, Case
from support.harness import ALL, DTYPES, bits, hostile, parameter, set_grad, state_bits, through_a_file
from support.pairs import pairwise

import optim8
from optim8.memory import plan
from optim8.paging import Pager


def _base(*shape: int) -> torch.Tensor:
    return hostile(torch.Size(shape).numel(), torch.float32, seed=5, small=-2, large=0).view(shape)


VIEWS: dict[str, Callable[[], torch.Tensor]] = {
    "every third of a row": lambda: _base(2100)[1::3],
    "columns": lambda: _base(20, 90)[:, 3:40],
    "every other row and column": lambda: _base(40, 80)[::2, 1::2],
    "transposed columns": lambda: _base(20, 90)[:, 3:40].T,
    "channels of channels-last images": lambda: _base(4, 16, 5, 6).contiguous(memory_format=torch.channels_last)[
        :, 2:11
    ],
    "one of a pair": lambda: _base(5, 70, 2)[..., 1],
    "one element a row": lambda: _base(300, 4)[:, 2:3],
}
EVERY_VIEW = pytest.mark.parametrize("kind", VIEWS)
BOTH = pytest.mark.parametrize("optim_bits", [8, 16, 32])


def _pair(
    kind: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[torch.nn.Parameter, torch.nn.Parameter, torch.Tensor]:
    """A parameter with gaps, one of the same values without, and the memory of the first as one row."""
    made = VIEWS[kind]()
    whole = torch.empty(made.untyped_storage().nbytes() // 4).set_(made.untyped_storage()).to(device, dtype)
    view = whole.as_strided(made.shape, made.stride(), made.storage_offset())
    return parameter(view), parameter(view.clone()), whole


def _step(optimizer: Any, params: list[torch.nn.Parameter], t: int) -> None:
    for i, p in enumerate(params):
        p.grad = hostile(p.numel(), torch.float32, seed=10 * t + i).to(p.device, p.dtype).view(p.shape)
    optimizer.step()


@pairwise(case=EVERY, kind=VIEWS, dtype=DTYPES, optim_bits=[8, 16, 32])
def test_steps_as_without_gaps(case: Case, kind: str, dtype: str, optim_bits: int, device: torch.device) -> None:
    p, q, whole = _pair(kind, device, DTYPES[dtype])
    others = [parameter(torch.ones(300, device=device)) for _ in range(2)]
    apart = torch.ones_like(whole, dtype=torch.bool)
    apart.as_strided(p.shape, p.stride(), p.storage_offset()).fill_(False)
    gaps = whole[apart].clone()
    assert gaps.numel()
    ours, dense = case.make([p, others[0]], optim_bits=optim_bits), case.make([q, others[1]], optim_bits=optim_bits)
    version, stride, address = p._version, p.stride(), p.data_ptr()
    for t in range(3):
        _step(ours, [p, others[0]], t)
        _step(dense, [q, others[1]], t)
    assert bits(p.detach().clone()) == bits(q)
    assert state_bits(ours, p) == state_bits(dense, q)
    strides = {t.stride() for t in ours.state[p].values() if t.shape == p.shape}
    assert torch.empty_like(p).stride() in strides
    assert bits(others[0]) == bits(others[1])
    assert bits(whole[apart]) == bits(gaps), "what lies in the gaps is not the optimizer's"
    assert (p.stride(), p.data_ptr()) == (stride, address)
    assert p._version >= version + 3, "a graph that saved the parameter notices each step"
    assert ours.precision(p) == dense.precision(q)
    assert [place.bytes for place in ours.placement()] == [place.bytes for place in dense.placement()]


@EVERY_VIEW
@ALL
def test_gradients_of_any_layout_and_dtype(case: Case, kind: str, device: torch.device) -> None:
    """As a gradient with the same gaps, a lazily negated one, or float32 for a bfloat16 parameter."""
    p, q, whole = _pair(kind, device)
    ours, dense = case.make([p]), case.make([q])
    of_same_layout = torch.randn_like(whole).as_strided(p.shape, p.stride(), p.storage_offset())
    for grad in (of_same_layout, torch._neg_view(torch.randn_like(q))):
        p.grad, q.grad = grad, grad.clone()
        ours.step()
        dense.step()
        assert bits(p.detach().clone()) == bits(q)
        assert p.grad is grad
    p, q, _ = _pair(kind, device, torch.bfloat16)
    ours, dense = case.make([p]), case.make([q])
    for param, optimizer in ((p, ours), (q, dense)):
        set_grad(param, torch.linspace(-1, 1, p.numel(), device=device).view(p.shape))
        optimizer.step()
    assert bits(p.detach().clone()) == bits(q)


@ALL
def test_gradients_that_autograd_made(case: Case, device: torch.device) -> None:
    """A model with a slice for a weight trains as one with a weight of its own."""
    p, q, _ = _pair("transposed columns", device)
    for param in (p, q):
        optimizer = case.make([param])
        for t in range(3):
            optimizer.zero_grad()
            data = torch.randn(8, param.shape[1], generator=torch.Generator().manual_seed(t)).to(device)
            torch.nn.functional.linear(data, param).square().mean().backward()
            optimizer.step()
    assert bits(p.detach().clone()) == bits(q)


@pytest.mark.parametrize("optim_bits", [8, 16, 32])
@ALL
def test_gaps_that_come_and_go(case: Case, optim_bits: int, device: torch.device) -> None:
    """State goes on where a parameter is swapped for a slice and back, as by code that offloads."""
    p, q, _ = _pair("columns", device)
    ours, dense = case.make([p], optim_bits=optim_bits), case.make([q], optim_bits=optim_bits)
    for t in range(4):
        _step(ours, [p], t)
        _step(dense, [q], t)
        p.data = p.data.clone() if t % 2 == 0 else torch.cat((p.data, p.data), dim=1)[:, : p.shape[1]]
    assert bits(p.detach().clone()) == bits(q)
    assert state_bits(ours, p) == state_bits(dense, q)


@pairwise(case=EVERY, kind=VIEWS, optim_bits=[8, 16, 32])
def test_checkpoints_go_between_both_kinds(case: Case, kind: str, optim_bits: int, device: torch.device) -> None:
    p, q, _ = _pair(kind, device)
    ours, dense = case.make([p], optim_bits=optim_bits), case.make([q], optim_bits=optim_bits)
    _step(ours, [p], 0)
    _step(dense, [q], 0)
    p2, q2, _ = _pair(kind, device)
    p2.data.copy_(p.data)
    q2.data.copy_(q.data)
    ours2, dense2 = case.make([p2]), case.make([q2])
    ours2.load_state_dict(through_a_file(dense.state_dict()))
    dense2.load_state_dict(through_a_file(ours.state_dict()))
    for param, optimizer in ((p2, ours2), (q2, dense2), (q, dense)):
        assert state_bits(optimizer, param) == state_bits(ours, p)
        _step(optimizer, [param], 1)
    assert bits(p2.detach().clone()) == bits(q2) == bits(q)
    if case.torch_class is None and case.name != "Lion8bit":
        return  # to_torch converts what torch.optim and lion-pytorch have
    theirs, same = optim8.convert.to_torch(ours2), optim8.convert.to_torch(dense2)
    for name in case.states:
        assert torch.equal(theirs["state"][0][name], same["state"][0][name])
    ours2.load_state_dict(theirs)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", ["transposed columns", "one of a pair"])
@ALL
def test_copies_go_on(case: Case, kind: str, how: str, paged: bool, device: torch.device) -> None:
    p, q, _ = _pair(kind, device)
    pager = Pager() if paged else None
    if paged and device.type != "cpu":
        pytest.skip("the disk is out of a GPU's reach")
    ours, dense = case.make([p], paged=pager), case.make([q])
    _step(ours, [p], 0)
    _step(dense, [q], 0)
    pair = p, ours
    p2, ours2 = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    for t in (1, 2):
        _step(ours2, [p2], t)
        _step(ours, [p], t)
        _step(dense, [q], t)
    assert bits(p.detach().clone()) == bits(p2.detach().clone()) == bits(q)
    assert state_bits(ours, p) == state_bits(ours2, p2) == state_bits(dense, q)


@ALL
def test_a_step_that_fails_or_is_skipped_leaves_them_alone(case: Case, device: torch.device) -> None:
    p, q, whole = _pair("columns", device)
    bad = parameter(torch.ones(300, device=device))
    optimizer = case.make([p, bad])
    p.grad, bad.grad = torch.ones_like(q), torch.ones(300, device=device)
    before = bits(whole)
    bad.data = torch.ones(1, device=device).expand(300)
    with pytest.raises(ValueError, match="parameter 1 of group 0"):
        optimizer.step()
    assert bits(whole) == before
    assert not optimizer.state


OVERLAPPING: dict[str, Callable[[], torch.Tensor]] = {
    "expanded": lambda: torch.ones(7, 1).expand(7, 30),
    "windows": lambda: torch.ones(40).as_strided((10, 8), (2, 1)),
    "expanded columns": lambda: torch.ones(7, 1, 9)[..., ::2].expand(7, 30, 5),
}


@pytest.mark.parametrize("kind", OVERLAPPING)
@ALL
def test_elements_that_share_memory_are_refused(case: Case, kind: str, device: torch.device) -> None:
    view = OVERLAPPING[kind]()
    made = torch.ones(view.untyped_storage().nbytes() // 4, device=device)
    p = parameter(made.as_strided(view.shape, view.stride()), torch.ones(view.shape, device=device))
    optimizer = case.make([p])
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 must have an address for each element, got float32"):
        optimizer.step()
    assert (made == 1).all()
    assert not optimizer.state


@ALL
def test_a_plan_counts_no_gaps(case: Case) -> None:
    p, q, _ = _pair("columns", torch.device("cpu"))
    model, dense = torch.nn.Module(), torch.nn.Module()
    model.weight, dense.weight = p, q
    ours, same = (plan(m, case.make(m.parameters())) for m in (model, dense))
    assert str(ours) == str(same)


@ALL
def test_what_a_monitor_measures(case: Case) -> None:
    p, q, _ = _pair("transposed columns", torch.device("cpu"))
    seen = []
    for param in (p, q):
        optimizer = case.make([param])
        with optim8.health.monitor(optimizer, mock.MagicMock(), every=1, limit=1.0) as monitor:
            for t in range(3):
                _step(optimizer, [param], t)
        seen.append(repr(monitor.latest))
    assert seen[0] == seen[1]


@BOTH
@ALL
def test_other_strides_between_steps(case: Case, optim_bits: int) -> None:
    """A tensor that gets gaps in another order of elements is still stepped, by its state in that order."""
    gapped = torch.nn.Parameter(_base(40, 80)[::2, 1::2].detach())
    dense = torch.nn.Parameter(gapped.detach().clone())
    made = [(p, case.make([p], optim_bits=optim_bits)) for p in (gapped, dense)]
    for t in range(3):
        if t == 1:
            other = _base(80, 40).T[::2, 1::2]
            gapped.data = other.copy_(gapped.detach())
            dense.data = dense.detach().T.contiguous().T
        before = gapped.detach().clone()
        for p, optimizer in made:
            p.grad = torch.empty_like(p).copy_(hostile(p.numel(), torch.float32, seed=t).view(p.shape))
            optimizer.step()
        assert not torch.equal(gapped, before)
        assert torch.equal(gapped, dense)
        assert state_bits(made[0][1], gapped) == state_bits(made[1][1], dense)


@pytest.fixture
def mesh() -> Iterator[Any]:
    """This process alone."""
    dist = pytest.importorskip("torch.distributed")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@BOTH
@pytest.mark.parametrize("kind", ["columns", "transposed columns", "every third of a row"])
@ALL
def test_shards_with_gaps(case: Case, kind: str, optim_bits: int, mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Shard

    def sharded(local: torch.Tensor) -> DTensor:
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False)

    made = []
    for local in _pair(kind, torch.device("cpu"))[:2]:
        p = torch.nn.Parameter(sharded(local.detach()))
        assert p.to_local().data_ptr() == local.data_ptr()
        made.append((p, case.make([p], optim_bits=optim_bits)))

    def step(t: int) -> None:
        for p, optimizer in made:
            p.grad = sharded(hostile(p.numel(), torch.float32, seed=t).view(p.shape))
            version = p._version
            optimizer.step()
            assert p._version > version

    (p, ours), (q, dense) = made
    step(0)
    of_p, of_q = ours.state_dict(), dense.state_dict()
    ours.load_state_dict(of_q)
    dense.load_state_dict(of_p)
    step(1)
    assert bits(p.to_local().clone()) == bits(q.to_local())
    assert state_bits(ours, p) == state_bits(dense, q)
