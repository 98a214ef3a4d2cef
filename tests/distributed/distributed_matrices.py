"""What the processes of test_distributed.py check of Muon8bit: each matrix is orthogonalized as a whole, with the bits
of one process."""

from __future__ import annotations

from typing import Any

import torch
from distributed_common import local
from distributed_worker import Place, Scenario
from support.harness import bits, state_bits
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import optim8
from optim8.state.layout import PARAM_LOW
from optim8.step import matrices, orthogonal
from optim8.step.ranks import cut

# Shards of ON_BLOCKS begin where a block of the whole begins, for 1, 2 and 3 ranks. Two matrices have fewer rows than
# there may be ranks, and most buckets have fewer matrices.
SHAPES: dict[str, tuple[int, ...]] = {
    "wide": (48, 256),
    "wide_too": (48, 256),
    "square": (256, 256),
    "tall": (96, 32),
    "odd": (31, 17),
    "one_row": (1, 300),
    "two_rows": (2, 512),
    "experts": (5, 24, 32),
    "empty": (0, 8),
}
ON_BLOCKS = ("wide", "wide_too", "square", "two_rows")


def value(name: str, t: int) -> torch.Tensor:
    """The parameter `name` (t = 0) or its gradient at step t, the same on every rank."""
    generator = torch.Generator().manual_seed(100 * t + list(SHAPES).index(name))
    return torch.randn(SHAPES[name], generator=generator)


class Net(torch.nn.Module):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterDict({name: value(name, 0).to(device) for name in SHAPES})


def make(params: Any, bits: int, **options: Any) -> Any:
    return optim8.Muon8bit(params, lr=0.1, weight_decay=0.1, optim_bits=bits, min_8bit_size=1000, **options)


def steps_as_one_process(place: Place, params: dict[str, torch.Tensor], optim_bits: int, **options: Any) -> None:
    """Parameters that are DTensors, against the whole ones."""
    dtype = next(iter(params.values())).dtype
    whole = Net(place.device).to(dtype)
    optimizer = make(list(params.values()), optim_bits, **options)
    own = make(whole.parameters(), optim_bits, **options)
    for t in (1, 2, 3):
        for name, p in params.items():
            grad = value(name, t).to(place.device, dtype)
            whole.weights[name].grad = grad
            p.grad = distribute_tensor(grad.to(local(p).device), p.device_mesh, p.placements)  # type: ignore[attr-defined]
        optimizer.step()
        own.step()
    for name, p in params.items():
        if optim_bits == 32 or name in ON_BLOCKS or p.numel() < 1000:
            expected = distribute_tensor(whole.weights[name].detach(), p.device_mesh, p.placements)  # type: ignore[attr-defined]
            assert bits(local(p).contiguous()) == bits(local(expected).contiguous()), name
            if "master_bits" in options:
                low, low_of_whole = (each[PARAM_LOW] for each in (optimizer.state[p], own.state[whole.weights[name]]))
                assert bits(local(low).contiguous()) == bits(cut(low_of_whole, p).contiguous()), name
        assert optimizer.precision(p) == own.precision(whole.weights[name])
        assert optimizer.state[p]["step"] == 3
    assert place.same_everywhere([bits(q) for q in whole.parameters()])


def muon_fsdp2(place: Place) -> None:
    """Uneven and empty shards; the ranks share the matrices of a bucket."""
    for optim_bits in (8, 32):
        net = Net(place.device)
        fully_shard(net, mesh=place.mesh())
        steps_as_one_process(place, dict(net.weights.items()), optim_bits)


def muon_bfloat16(place: Place) -> None:
    """Weights of 16 bits, rounded, dithered and with low bits beside them."""
    for options in ({}, {"param_rounding": "dithered"}, {"master_bits": 24}, {"master_bits": 32}):
        for optim_bits in (8, 16):
            net = Net(place.device).bfloat16()
            fully_shard(net, mesh=place.mesh())
            steps_as_one_process(place, dict(net.weights.items()), optim_bits, **options)


def muon_share(place: Place) -> None:
    """Each rank orthogonalizes its share of a bucket and no more."""
    counts = []
    original = orthogonal.orthogonalize

    def counting(stack: torch.Tensor, *args: Any) -> torch.Tensor:
        counts.append(stack.size(0))
        return original(stack, *args)

    net = Net(place.device)
    fully_shard(net, mesh=place.mesh())
    params = dict(net.weights.items())
    optimizer = make(list(params.values()), 32)
    for name, p in params.items():
        p.grad = distribute_tensor(value(name, 1).to(place.device), p.device_mesh, p.placements)  # type: ignore[attr-defined]
    orthogonal.orthogonalize = counting
    try:
        optimizer.step()
    finally:
        orthogonal.orthogonalize = original
    everywhere: list[Any] = [None] * place.world
    torch.distributed.all_gather_object(everywhere, sum(counts))
    matrices_of_buckets = (2, 1, 1, 1, 1, 1, 5)
    assert sum(everywhere) == sum(matrices_of_buckets)
    assert max(everywhere) <= sum(-(-count // place.world) for count in matrices_of_buckets)


def muon_layouts(place: Place) -> None:
    """Rows or columns over the ranks, all on each, and both with buckets of one matrix."""
    most = matrices.BUCKET_BYTES
    for placement in (Shard(1), Replicate()):
        params = {
            name: torch.nn.Parameter(distribute_tensor(value(name, 0).to(place.device), place.mesh(), [placement]))
            for name in SHAPES
        }
        matrices.BUCKET_BYTES = 1
        try:
            steps_as_one_process(place, params, 32)
        finally:
            matrices.BUCKET_BYTES = most


def muon_two_dimensions(place: Place) -> None:
    """A mesh of two dimensions, whose ranks share the work along one of them."""
    for shape in ((place.world, 1), (1, place.world)):
        mesh = place.mesh(*shape, names=("data", "model"))
        params = {
            name: torch.nn.Parameter(distribute_tensor(value(name, 0).to(place.device), mesh, [Shard(0), Shard(1)]))
            for name in SHAPES
        }
        steps_as_one_process(place, params, 32)


def muon_cpu_offload(place: Place) -> None:
    net = Net(place.device)
    fully_shard(net, mesh=place.mesh(), offload_policy=CPUOffloadPolicy(pin_memory=place.device.type == "cuda"))
    steps_as_one_process(place, dict(net.weights.items()), 32)


def muon_state_dict(place: Place) -> None:
    """Saved and loaded sharded, the run goes on with the same bits."""
    runs = []
    for stops in (False, True):
        net = Net(place.device)
        fully_shard(net, mesh=place.mesh())
        params = dict(net.weights.items())
        optimizer = make(list(params.values()), 8)
        for t in (1, 2, 3):
            if stops and t == 2:
                saved = optimizer.state_dict()
                optimizer = make(list(params.values()), 8)
                optimizer.load_state_dict(saved)
            for name, p in params.items():
                p.grad = distribute_tensor(value(name, t).to(place.device), p.device_mesh, p.placements)  # type: ignore[attr-defined]
            optimizer.step()
        runs.append([(bits(local(p)), state_bits(optimizer, p)) for p in params.values()])
    assert runs[0] == runs[1]


SCENARIOS: dict[str, Scenario] = {
    f.__name__: f
    for f in (
        muon_fsdp2,
        muon_bfloat16,
        muon_share,
        muon_layouts,
        muon_two_dimensions,
        muon_cpu_offload,
        muon_state_dict,
    )
}
