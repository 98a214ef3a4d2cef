"""What the processes of test_distributed.py do and check while they train: one function for each scenario."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from cases import CASES, EVERY, Case
from distributed_common import (
    ON_BLOCKS,
    Net,
    Twins,
    default_size,
    local,
    set_grads,
    sharded,
    snapshot_local,
    value,
)
from distributed_worker import Place, Scenario
from support.harness import bits, state_bits
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


def ddp(place: Place) -> None:
    """Ranks stay bit-identical to each other, and to one process that is fed the averaged gradients."""
    for case in EVERY:
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(70, 64), torch.nn.Tanh(), torch.nn.Linear(64, 5)).to(place.device)
        alone = torch.nn.Sequential(torch.nn.Linear(70, 64), torch.nn.Tanh(), torch.nn.Linear(64, 5)).to(place.device)
        alone.load_state_dict(model.state_dict())
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        optimizer, own = default_size(case, parallel), default_size(case, alone)
        for t in range(4):
            x = torch.randn(6, 70, generator=torch.Generator().manual_seed(10 * t + place.rank)).to(place.device)
            optimizer.zero_grad()
            parallel(x).square().mean().backward()
            for p, q in zip(model.parameters(), alone.parameters(), strict=True):
                assert p.grad is not None
                q.grad = p.grad.clone()
            optimizer.step()
            own.step()
        ended = [(bits(p), state_bits(optimizer, p)) for p in model.parameters()]
        assert ended == [(bits(p), state_bits(own, p)) for p in alone.parameters()]
        assert place.same_everywhere([(end, sorted(state.items())) for end, state in ended])
        assert [optimizer.precision(p) for p in model.parameters()] == ["8bit", "32bit", "32bit", "32bit"]


def fsdp2(place: Place) -> None:
    """Uneven and empty shards: each is stepped as a plain tensor would be; what is on the grid, as the whole."""
    for case, rounding in itertools.product(EVERY, ("dithered", Twins.rounding)):
        net = sharded(place)
        params = dict(net.weights.items())
        optimizer, twins = default_size(case, net, rounding), Twins(case, list(params.values()))
        whole = Net(place.device)
        own = default_size(case, whole, rounding)
        version = params["small"]._version
        for t in range(3):
            loss = net() * (t + 1) * (place.rank + 1)
            loss.backward()
            for name, p in params.items():
                whole.weights[name].grad = p.grad.full_tensor()  # type: ignore[union-attr]
            twins.step()
            own.step()
            optimizer.step()
            optimizer.zero_grad()
        if rounding == Twins.rounding and not case.has_norms:
            twins.check(optimizer)
        assert params["small"]._version > version, "autograd must see the change"
        assert all(local(p).grad is None for p in params.values())
        assert (local(params["one_row"]).numel() == 0) == (place.rank > 0)
        # The squares of a block that is cut add up in another order.
        for name in ON_BLOCKS if case.has_norms else (*ON_BLOCKS, "small"):
            assert bits(params[name].full_tensor()) == bits(whole.weights[name])


def cpu_offload(place: Place) -> None:
    """Parameters, gradients and so the step and its state are on the CPU."""
    case = CASES["AdamW8bit"]
    net = Net(place.device)
    policy = CPUOffloadPolicy(pin_memory=place.device.type == "cuda")
    fully_shard(net, mesh=place.mesh(), offload_policy=policy)
    optimizer, twins = default_size(case, net, Twins.rounding), Twins(case, list(net.parameters()))
    for _ in range(2):
        net().backward()
        twins.step()
        optimizer.step()
        optimizer.zero_grad()
    twins.check(optimizer)
    saved = optimizer.state_dict()
    for entry in saved["state"].values():
        assert all(x.device.type == "cpu" for x in entry.values())
    optimizer.load_state_dict(saved)
    twins.check(optimizer)


def trains_as_its_shards_do(case: Case, model: torch.nn.Module, place: Place) -> None:
    """Each shard steps as if it were alone, and the state loads where it was saved."""
    optimizer, twins = default_size(case, model, Twins.rounding), Twins(case, list(model.parameters()))
    for t in range(3):
        x = torch.randn(6, 64, generator=torch.Generator().manual_seed(t)).to(place.device)
        model(x).square().mean().backward()
        twins.step()
        optimizer.step()
        optimizer.zero_grad()
    twins.check(optimizer)
    before = snapshot_local(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    assert snapshot_local(optimizer) == before


def tensor_parallel(place: Place) -> None:
    """Rows and columns of matrices over the ranks, and a bias that all have."""
    for case in EVERY:
        if case.has_norms:
            continue
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Tanh(), torch.nn.Linear(96, 70))
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        model = parallelize_module(model.to(place.device), place.mesh(), plan)
        assert model[2].weight.placements == (Shard(1),)
        trains_as_its_shards_do(case, model, place)


def fsdp2_and_tensor_parallel(place: Place) -> None:
    case = CASES["AdamW8bit"]
    for shape in ((place.world, 1), (1, place.world)):
        mesh = place.mesh(*shape, names=("data", "model"))
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Tanh(), torch.nn.Linear(96, 72)).to(place.device)
        model = parallelize_module(model, mesh["model"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(model, mesh=mesh["data"])
        trains_as_its_shards_do(case, model, place)


def norms_over_ranks(place: Place) -> None:
    """A step that depends on norms, however the tensors lie over the ranks: shards in rows or columns, over one or two
    dimensions of a mesh, replicas, shards without values.

    Sums of the same squares in another order: in a block of float32 each is off by 9 roundings at most, a norm by half
    as many. A ratio of two norms of two sides then differs by 18 roundings, and what it scales by 20.
    """
    line = place.mesh()
    plane = place.mesh(1, place.world, names=("replicas", "shards"))
    layouts = [(line, [Shard(0)]), (line, [Shard(1)]), (line, [Replicate()]), (plane, [Replicate(), Shard(0)])]
    layouts += [(place.mesh(place.world, 1, names=("a", "b")), [Shard(0), Shard(1)])]
    for case in (case for case in EVERY if case.has_norms):
        for t, name in itertools.product((1, 2), ("off_the_grid", "odd_rows", "one_row", "rows_of_a_block")):
            start, grad = value(name, 0).to(place.device), value(name, t).to(place.device)
            wholes = [torch.nn.Parameter(start.clone()) for _ in layouts]
            parts = [torch.nn.Parameter(distribute_tensor(start.clone(), *layout)) for layout in layouts]
            for whole, part, layout in zip(wholes, parts, layouts, strict=True):
                whole.grad, part.grad = grad.clone(), distribute_tensor(grad, *layout)
            options = {"min_8bit_size": 10**9}
            case.make(wholes, **options).step()
            case.make(parts, **options).step()
            for whole, part in zip(wholes, parts, strict=True):
                stepped = part.full_tensor().detach()  # type: ignore[attr-defined]
                moved = (whole.detach().double() - start.double()).abs()
                most = 2.0**-24 * (20 * moved + 2 * (whole.detach().abs() + start.abs()))
                assert ((stepped.double() - whole.detach().double()).abs() <= most).all(), (case, name, part.placements)
                assert place.same_everywhere(bits(stepped))
        # Without the other ranks' share the ratio would be another.
        alone = torch.nn.Parameter(local(distribute_tensor(start, line, [Shard(0)])).clone())
        alone.grad = local(distribute_tensor(grad, line, [Shard(0)])).clone()
        case.make([alone], **options).step()
        differs = bits(alone) != bits(local(parts[0]))  # not on a rank that has the one huge value
        same = place.same_everywhere(differs)
        assert differs or not same


def gradients(place: Place) -> None:
    """A gradient that is a sum still to be made, one in another layout, a late one, and a plain one."""
    case = CASES["AdamW8bit"]
    mesh = place.mesh()
    whole = value("off_the_grid", 0).to(place.device)
    g = value("off_the_grid", 1).to(place.device)
    params = [torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)])) for _ in range(4)]
    optimizer = case.make(params)
    share = g * (place.rank + 1)
    params[0].grad = DTensor.from_local(share, mesh, [Partial()])
    params[1].grad = distribute_tensor(g, mesh, [Replicate()])
    params[2].grad = distribute_tensor(g.t().contiguous(), mesh, [Shard(1)]).t()
    optimizer.step()
    twins = [torch.nn.Parameter(local(p).clone()) for p in (distribute_tensor(whole, mesh, [Shard(0)]),) * 3]
    own = case.make(twins)
    total = g * (place.world * (place.world + 1) // 2)
    for twin, grad in zip(twins, (total, g, g), strict=True):
        twin.grad = local(distribute_tensor(grad, mesh, [Shard(0)])).clone()
    own.step()
    assert [bits(local(p)) for p in params[1:3]] == [bits(twin) for twin in twins[1:]]
    torch.testing.assert_close(local(params[0]), twins[0].detach(), rtol=1e-5, atol=1e-6)
    assert bits(params[3].full_tensor()) == bits(whole)
    assert params[3] not in optimizer.state


def gradient_scaler(place: Place) -> None:
    """An infinite gradient on one rank: every rank leaves the step out."""
    case = CASES["AdamW8bit"]
    for fused in (None, True):
        net, twin = sharded(place), sharded(place)
        optimizer = case.make(net.parameters(), min_8bit_size=4096, fused=fused)
        own = case.make(twin.parameters(), min_8bit_size=4096, fused=fused)
        scaler = torch.amp.GradScaler(place.device.type, init_scale=64.0)
        scaler.scale(net()).backward()
        scaler.step(optimizer)
        scaler.update()
        twin().backward()
        own.step()
        assert snapshot_local(optimizer) == snapshot_local(own)
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            assert p.grad is None or bits(local(p.grad)) == bits(local(q.grad))
        optimizer.zero_grad()
        scaler.scale(net()).backward()
        if place.rank == place.world - 1:
            local(net.weights["rows_of_a_block"].grad).view(-1)[5] = float("inf")
        before = snapshot_local(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert snapshot_local(optimizer) == before
        assert scaler.get_scale() == 32


def clipping(place: Place) -> None:
    case = CASES["AdamW8bit"]
    net, whole = sharded(place), Net(place.device)
    optimizer = default_size(case, net, Twins.rounding)
    set_grads(net, 1)
    set_grads(whole, 1)
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
    expected = torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.5)
    torch.testing.assert_close(norm.full_tensor(), expected)  # type: ignore[attr-defined]
    twins = Twins(case, list(net.parameters()))
    twins.step()
    optimizer.step()
    twins.check(optimizer)


def zero_redundancy(place: Place) -> None:
    """Each rank steps its share; the whole is as without. Consolidated state loads into both."""
    for case in EVERY:
        torch.manual_seed(3)
        models = [torch.nn.Linear(70, 64).to(place.device) for _ in range(3)]
        models[1].load_state_dict(models[0].state_dict())
        parallel = torch.nn.parallel.DistributedDataParallel(models[0])
        together = [list(p) for p in zip(*(model.parameters() for model in models), strict=True)]
        optimizer = ZeroRedundancyOptimizer(parallel.parameters(), case.cls, **case.always, **case.hypers[0])
        own = case.with_defaults(models[1].parameters(), **case.hypers[0])
        for t in (1, 2, 3):
            optimizer.zero_grad()
            parallel(torch.full((3, 70), 0.1 * t, device=place.device)).square().mean().backward()
            for p, q, _ in together:
                q.grad = p.grad.clone()
            optimizer.step()
            own.step()
            assert all(bits(p) == bits(q) for p, q, _ in together)
            if t == 2:
                optimizer.consolidate_state_dict(0)
                message = [optimizer.state_dict() if place.rank == 0 else None]
                dist.broadcast_object_list(message)
                loaded = case.with_defaults(models[2].parameters(), **case.hypers[0])
                loaded.load_state_dict(message[0])
                assert all(state_bits(loaded, r) == state_bits(own, q) for _, q, r in together)
                optimizer = ZeroRedundancyOptimizer(parallel.parameters(), case.cls, **case.always, **case.hypers[0])
                optimizer.load_state_dict(message[0])


def fsdp1(place: Place) -> None:
    """FullyShardedDataParallel trains; its gathering of state is refused in 8 bits, on every rank, and works in 32."""
    case = CASES["AdamW8bit"]
    for optim_bits in (8, 16, 32):
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(70, 64), torch.nn.Linear(64, 70))
        model = FullyShardedDataParallel(model, use_orig_params=True, device_id=place.device)
        optimizer = case.make(model.parameters(), min_8bit_size=1000, optim_bits=optim_bits)
        params = [p for p in model.parameters() if p.numel()]
        twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
        own = case.make(twins, min_8bit_size=1000, optim_bits=optim_bits)
        for t in range(3):
            model(torch.full((3, 70), 0.1 * t, device=place.device)).square().mean().backward()
            for p, twin in zip(params, twins, strict=True):
                twin.grad = None if p.grad is None else p.grad.clone()
            optimizer.step()
            own.step()
            optimizer.zero_grad()
        assert [(bits(p), state_bits(optimizer, p)) for p in params] == [
            (bits(twin), state_bits(own, twin)) for twin in twins
        ]
        if optim_bits == 32:
            whole = get_optimizer_state_dict(model, optimizer)
            assert whole["state"]["0.weight"]["exp_avg"].shape[0] == 64
            set_optimizer_state_dict(model, optimizer, whole)
            assert [state_bits(optimizer, p) for p in params] == [state_bits(own, twin) for twin in twins]
            continue
        with pytest.raises(ValueError, match="fully_shard instead, or use optim_bits=32"):
            FullyShardedDataParallel.optim_state_dict(model, optimizer)


SCENARIOS: dict[str, Scenario] = {
    f.__name__: f
    for f in (
        ddp,
        fsdp2,
        cpu_offload,
        tensor_parallel,
        fsdp2_and_tensor_parallel,
        norms_over_ranks,
        gradients,
        gradient_scaler,
        clipping,
        zero_redundancy,
        fsdp1,
    )
}
