"""State that does not fit: a process whose data is limited (RLIMIT_DATA) cannot allocate it, and trains with it paged.

`python experiments/paged_proof.py JSON` is that process; `prove` starts it, and one without a limit to compare with.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import optim8
from optim8.paging import Pager

MIB = 2**20
STEPS = 3
SLACK = 8 * MIB  # of data, for stacks of threads and what Python allocates


def memory(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def train(parameter: torch.nn.Parameter, paged: Pager | None) -> Any:
    optimizer = optim8.AdamW8bit([parameter], paged=paged)
    for step in range(STEPS):
        assert parameter.grad is not None
        parameter.grad.uniform_(-1, 1, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    return optimizer


def new_parameter(count: int) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.ones(count))
    parameter.grad = torch.zeros_like(parameter)
    return parameter


def digest(parameter: torch.nn.Parameter, optimizer: Any) -> str:
    found = hashlib.sha256()
    found.update(parameter.detach().numpy().data)
    for name, value in sorted(optimizer.state[parameter].items()):
        found.update(name.encode())
        found.update(value.numpy())
    return found.hexdigest()


def work(count: int, budget: int | None, directory: str) -> dict[str, Any]:
    """Training in this process. `budget`: bytes, also of the limit on what may be allocated; None: without a limit."""
    warm = Pager(directory=directory, host_budget="64KiB", bucket="64KiB")
    train(new_parameter(300_000), warm)
    before = memory("VmRSS")
    parameter = new_parameter(count)
    if budget is None:
        return {"digest": digest(parameter, train(parameter, None))}
    room = memory("VmData") + budget + SLACK
    resource.setrlimit(resource.RLIMIT_DATA, (room, room))
    try:
        train(parameter, None)
        resident = "fits"
    except (RuntimeError, MemoryError):
        resident = "cannot be allocated"
    Path("/proc/self/clear_refs").write_text("5")
    optimizer = train(parameter, Pager(directory=directory, host_budget=budget, bucket=budget // 4))
    peak = memory("VmHWM") - before
    size = sum(tensor.nbytes for tensor in optimizer.state[parameter].values())
    return {"resident": resident, "peak": peak, "state": size, "digest": digest(parameter, optimizer)}


def prove(count: int, directory: Path) -> dict[str, Any]:
    """Train `count` float32 parameters whose state is four times the budget.

    Returns:
        `resident`: what became of resident state under the limit; `state`, `budget`, `data_limit`: bytes; `peak`: bytes
        of resident memory, file pages included, over what the process had before the parameters; `may_have`: bytes of
        parameters, gradients and budget; `same_bits`: whether parameters and state are those of a run without a limit.
    """
    budget = max(2**18, count // 2)
    found = []
    for limit in (None, budget):
        command = [sys.executable, __file__, json.dumps([count, limit, str(directory)])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        found.append(json.loads(done.stdout))
    expected, got = found
    same = got.pop("digest") == expected["digest"]
    sizes = {"budget": budget, "data_limit": budget + SLACK, "may_have": 8 * count + budget}
    return {"parameters": count, "steps": STEPS, **got, **sizes, "same_bits": same}


if __name__ == "__main__":
    print(json.dumps(work(*json.loads(sys.argv[1]))))
