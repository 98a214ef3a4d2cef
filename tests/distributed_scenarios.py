"""What the processes of test_distributed.py do and check: one function for each scenario."""

from __future__ import annotations

from typing import Any

import numpy as np
import reference
import torch
from cases import CASES, EVERY, Case
from distributed_worker import Place, Scenario
from harness import bits, hostile, state_bits
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

BLOCK = reference.BLOCK
# All but the last have 8-bit state by their whole size; most shards are smaller than min_8bit_size.
SHAPES = {
    "rows_of_a_block": (64, 256),
    "two_rows_a_block": (48, 128),
    "off_the_grid": (50, 100),
    "odd_rows": (91, 47),
    "vector": (5001,),
    "kernel": (64, 8, 3, 3),
    "one_row": (1, 4500),
    "small": (50,),
}
# Sharded over 1, 2 or 3 ranks, every shard of these begins where a block of the whole begins.
ON_BLOCKS = ("rows_of_a_block", "two_rows_a_block")


def value(name: str, t: int) -> torch.Tensor:
    """The parameter `name` (t = 0) or its gradient at step t, the same on every rank."""
    shape = SHAPES[name]
    n = int(np.prod(shape))
    seed = 100 * t + list(SHAPES).index(name)
    return hostile(n, torch.float32, seed, small=-4, large=0).view(shape)


class Net(torch.nn.Module):
    """One parameter of each shape."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterDict({name: value(name, 0).to(device) for name in SHAPES})

    def forward(self) -> torch.Tensor:
        return sum(((p * p).sum() for p in self.weights.values()), torch.zeros(()))


def sharded(place: Place) -> Net:
    net = Net(place.device)
    fully_shard(net, mesh=place.mesh())
    return net


def set_grads(net: Net, t: int) -> None:
    for name, p in net.weights.items():
        grad = value(name, t).to(p.device)
        p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad


def take_steps(net: Net, optimizer: Any, first: int, last: int) -> None:
    for t in range(first, last + 1):
        set_grads(net, t)
        optimizer.step()


def default_size(case: Case, net: torch.nn.Module) -> Any:
    """The optimizer with the default min_8bit_size."""
    return case.make(net.parameters(), min_8bit_size=4096)


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


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


class Twins:
    """For every parameter its local shard with a plain optimizer of its own: what a step must do to the shard."""

    def __init__(self, case: Case, params: list[torch.nn.Parameter]) -> None:
        self.params = params
        self.twins = [torch.nn.Parameter(local(p).clone()) for p in params]
        # What is 8-bit depends on the whole parameter.
        self.own = [
            case.make([twin], min_8bit_size=0 if p.numel() >= 4096 else 10**9)
            for p, twin in zip(params, self.twins, strict=True)
        ]

    def step(self) -> None:
        for p, twin, own in zip(self.params, self.twins, self.own, strict=True):
            assert p.grad is not None
            assert p.grad.placements == p.placements
            twin.grad = local(p.grad).clone()
            own.step()

    def check(self, optimizer: Any) -> None:
        for p, twin, own in zip(self.params, self.twins, self.own, strict=True):
            assert optimizer.precision(p) == ("8bit" if p.numel() >= 4096 else "32bit")
            assert bits(local(p)) == bits(twin)
            assert state_bits(optimizer, p) == state_bits(own, twin)
            assert optimizer.state[p]["exp_avg"].shape == local(p).shape


def fsdp2(place: Place) -> None:
    """Uneven and empty shards: each is stepped as a plain tensor would be; what is on the grid, as the whole."""
    for case in EVERY:
        net = sharded(place)
        params = dict(net.weights.items())
        optimizer, twins = default_size(case, net), Twins(case, list(params.values()))
        whole = Net(place.device)
        own = default_size(case, whole)
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
        twins.check(optimizer)
        assert params["small"]._version > version, "autograd must see the change"
        assert all(local(p).grad is None for p in params.values())
        assert (local(params["one_row"]).numel() == 0) == (place.rank > 0)
        for name in (*ON_BLOCKS, "small"):
            assert bits(params[name].full_tensor()) == bits(whole.weights[name])


def cpu_offload(place: Place) -> None:
    """Parameters, gradients and so the step and its state are on the CPU."""
    case = CASES["AdamW8bit"]
    net = Net(place.device)
    policy = CPUOffloadPolicy(pin_memory=place.device.type == "cuda")
    fully_shard(net, mesh=place.mesh(), offload_policy=policy)
    optimizer, twins = default_size(case, net), Twins(case, list(net.parameters()))
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


def tensor_parallel(place: Place) -> None:
    """Rows and columns of matrices over the ranks, and a bias that all have."""
    for case in EVERY:
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Tanh(), torch.nn.Linear(96, 70))
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        model = parallelize_module(model.to(place.device), place.mesh(), plan)
        assert model[2].weight.placements == (Shard(1),)
        optimizer, twins = default_size(case, model), Twins(case, list(model.parameters()))
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


def fsdp2_and_tensor_parallel(place: Place) -> None:
    case = CASES["AdamW8bit"]
    for shape in ((place.world, 1), (1, place.world)):
        mesh = place.mesh(*shape, names=("data", "model"))
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Tanh(), torch.nn.Linear(96, 72)).to(place.device)
        model = parallelize_module(model, mesh["model"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(model, mesh=mesh["data"])
        optimizer, twins = default_size(case, model), Twins(case, list(model.parameters()))
        for _ in range(2):
            model(torch.ones(6, 64, device=place.device)).square().mean().backward()
            twins.step()
            optimizer.step()
            optimizer.zero_grad()
        twins.check(optimizer)
        before = snapshot_local(optimizer)
        optimizer.load_state_dict(optimizer.state_dict())
        assert snapshot_local(optimizer) == before


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
    net = sharded(place)
    optimizer = default_size(case, net)
    scaler = torch.amp.GradScaler(place.device.type, init_scale=64.0)
    twin = sharded(place)
    own = default_size(case, twin)
    scaler.scale(net()).backward()
    scaler.step(optimizer)
    scaler.update()
    twin().backward()
    own.step()
    assert snapshot_local(optimizer) == snapshot_local(own)
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
    optimizer = default_size(case, net)
    set_grads(net, 1)
    set_grads(whole, 1)
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
    expected = torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.5)
    torch.testing.assert_close(norm.full_tensor(), expected)  # type: ignore[attr-defined]
    twins = Twins(case, list(net.parameters()))
    twins.step()
    optimizer.step()
    twins.check(optimizer)


def snapshot_local(optimizer: Any) -> list[Any]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [(bits(local(p)), state_bits(optimizer, p)) for p in params if p in optimizer.state]


SCENARIOS: dict[str, Scenario] = {
    f.__name__: f
    for f in (
        ddp,
        fsdp2,
        cpu_offload,
        tensor_parallel,
        fsdp2_and_tensor_parallel,
        gradients,
        gradient_scaler,
        clipping,
    )
}
