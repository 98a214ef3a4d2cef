"""The model and the comparisons of the distributed scenarios."""

from __future__ import annotations

from typing import Any

import numpy as np
import reference
import torch
from cases import Case
from distributed_worker import Place
from support.harness import bits, hostile, state_bits
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

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


def default_size(case: Case, net: torch.nn.Module, rounding: str = "dithered") -> Any:
    """The optimizer with the default min_8bit_size."""
    return case.make(net.parameters(), min_8bit_size=4096, rounding=rounding)


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def snapshot_local(optimizer: Any) -> list[Any]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [(bits(local(p)), state_bits(optimizer, p)) for p in params if p in optimizer.state]


class Twins:
    """For every parameter its local shard with a plain optimizer of its own: what a step must do to the shard, but for
    dithered rounding, which depends on where the shard begins."""

    rounding = "nearest"

    def __init__(self, case: Case, params: list[torch.nn.Parameter]) -> None:
        self.params = params
        self.twins = [torch.nn.Parameter(local(p).clone()) for p in params]
        # What is 8-bit depends on the whole parameter.
        self.own = [
            case.make([twin], min_8bit_size=0 if p.numel() >= 4096 else 10**9, rounding=self.rounding)
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
            assert optimizer.moments[0].values(optimizer.state[p]).shape == local(p).shape
