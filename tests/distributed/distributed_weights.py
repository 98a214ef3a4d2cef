"""What the processes of test_distributed.py check of 16-bit weights with the bits that they lack."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from distributed_common import Net, local, value
from distributed_worker import Place, Scenario
from support.harness import bits
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import optim8


def wide_weights(place: Place) -> None:
    """bfloat16 shards with the bits that they lack are those of one process, through every checkpoint and back."""
    for options in ({"master_bits": 24}, {"master_bits": 32}, {"param_rounding": "dithered"}):
        nets = [Net(place.device).bfloat16() for _ in range(4)]
        for net in nets[1:]:
            fully_shard(net, mesh=place.mesh())
        # Moments in float32 do not depend on where the blocks of a shard begin.
        own, trained, loaded, filled = (
            optim8.AdamW8bit(net.parameters(), lr=1e-3, optim_bits=32, **options) for net in nets
        )
        for optimizer, net in ((own, nets[0]), (trained, nets[1])):
            for t in range(1, 4):
                _set_bfloat16_grads(net, t)
                optimizer.step()
        check_weights(nets[0], own, nets[1], trained)
        at = place.folder / f"wide_weights-{'-'.join(map(str, options.values()))}"
        dcp.save(
            {"model": nets[1].state_dict(), "optimizer": get_optimizer_state_dict(nets[1], trained)}, checkpoint_id=at
        )
        state = {"model": nets[2].state_dict(), "optimizer": get_optimizer_state_dict(nets[2], loaded)}
        dcp.load(state, checkpoint_id=at)
        nets[2].load_state_dict(state["model"])
        set_optimizer_state_dict(nets[2], loaded, state["optimizer"])
        check_weights(nets[0], own, nets[2], loaded)
        whole = StateDictOptions(full_state_dict=True)
        alone = Net(place.device).bfloat16()
        one = optim8.AdamW8bit(alone.parameters(), lr=1e-3, optim_bits=32, **options)
        set_optimizer_state_dict(alone, one, get_optimizer_state_dict(nets[1], trained, options=whole), options=whole)
        alone.load_state_dict(nets[0].state_dict())
        check_weights(nets[0], own, alone, one)
        for optimizer, net in ((own, nets[0]), (loaded, nets[2])):
            _set_bfloat16_grads(net, 4)
            optimizer.step()
        check_weights(nets[0], own, nets[2], loaded)
        # Whole weights: from one process, and from the shards of others.
        for weights in (optim8.master_state_dict(nets[0], own), optim8.master_state_dict(nets[2], loaded)):
            for p in nets[3].parameters():
                local(p).zero_()
            optim8.load_master_state_dict(nets[3], filled, weights)
            check_weights(nets[0], own, nets[3], filled)
        in_float32 = Net(place.device)
        optim8.load_master_state_dict(in_float32, (), optim8.master_state_dict(nets[0], own))
        assert all(p.dtype == torch.float32 for p in in_float32.parameters())
        check_weights(nets[0], own, in_float32, ())


def _set_bfloat16_grads(net: Net, t: int) -> None:
    for name, p in net.weights.items():
        grad = value(name, t).to(p.device).bfloat16()
        p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad


def check_weights(net: Net, optimizer: Any, other: Net, of_other: Any) -> None:
    """The same parameters, and the same weights in float32."""
    weights, theirs = optim8.master_state_dict(net, optimizer), optim8.master_state_dict(other, of_other)
    assert weights.keys() == theirs.keys()
    for name, wide in weights.items():
        assert bits(_whole(wide)) == bits(_whole(theirs[name])), name
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        if q.dtype == p.dtype:
            assert bits(_whole(p)) == bits(_whole(q))


def _whole(tensor: Any) -> torch.Tensor:
    whole: torch.Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole


SCENARIOS: dict[str, Scenario] = {"wide_weights": wide_weights}
