"""What the processes of test_distributed.py check of torch's MemTracker: with FakeTensors or with memory, it counts the
state of the local shards that the plan counts."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from cases import EVERY
from distributed_worker import Place, Scenario
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.fsdp import fully_shard

import optim8


def network(place: Place) -> torch.nn.Sequential:
    first, second = torch.nn.Linear(64, 80, device=place.device), torch.nn.Linear(80, 36, device=place.device)
    return torch.nn.Sequential(first, torch.nn.GELU(), second)


def counted(place: Place) -> None:
    mesh = place.mesh()
    for case in EVERY:
        whole = network(place)
        planned = optim8.memory.plan(
            whole, case.make(whole.parameters()), sharding="fsdp", world_size=place.world, device=place.device.type
        )
        alignment = sum(row.nbytes for row in planned.rows if row.kind == "alignment")
        for mode in (nullcontext(), FakeTensorMode()):
            with mode:
                model = network(place)
                fully_shard(model, mesh=mesh)
                optimizer = case.make(model.parameters())
                tracker = MemTracker()
                tracker.track_external(model, optimizer)
                with tracker:
                    for _ in range(2):
                        optimizer.zero_grad()
                        model(torch.randn(8, 64, device=place.device)).square().mean().backward()
                        optimizer.step()
                        tracker.reset_mod_stats()
            kind = place.device.type
            found = sum(of["Optstate"] for device, of in tracker.get_tracker_snapshot().items() if device.type == kind)
            assert found == planned.state_bytes + alignment, (case.name, found, planned.state_bytes, alignment)


SCENARIOS: dict[str, Scenario] = {"counted": counted}
