"""What the processes of test_distributed.py check of torch's MemTracker: with FakeTensors or with memory, it counts the
state of the local shards that the plan counts."""

from __future__ import annotations

import time
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
            expected = planned.state_bytes + alignment
            found = counted_bytes(tracker, place.device.type, expected)
            assert found == expected, (case.name, found, planned.state_bytes, alignment)


def counted_bytes(tracker: MemTracker, kind: str, expected: int) -> int:
    """What it counts as state, once it is as expected or 30 seconds have gone by.

    It counts everything that is made within a step, so the norms too that the ranks have added up. A thread of gloo
    lets go of those a moment after the step.
    """
    limit = time.monotonic() + 30
    while True:
        found = sum(of["Optstate"] for device, of in tracker.get_tracker_snapshot().items() if device.type == kind)
        if found == expected or time.monotonic() > limit:
            return int(found)
        time.sleep(0.01)


SCENARIOS: dict[str, Scenario] = {"counted": counted}
