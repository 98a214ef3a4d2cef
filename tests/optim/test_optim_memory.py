"""After the first step a step allocates nothing that grows with the model: under 1 MiB per thread."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cases import EVERY
from support.processes import child_environment

HERE = Path(__file__).parent
THREADS = 2
# Number of tensors, elements of each, dtype, bits of the state. One tensor of 64 MiB; many of 8 KiB.
ROWS = ((1, 16 * 2**20, "float32", 8), (1, 16 * 2**20, "float32", 32), (2000, 4096, "bfloat16", 8))

# Linux keeps the largest resident size (VmHWM); writing 5 to clear_refs sets it back to the present one. So what three
# steps needed at their worst moment, freed or not, is the new VmHWM less the resident size before.
WORKER = """
import json, pathlib, sys
import torch
from cases import EVERY
from support.harness import parameter

def resident(key):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

threads, rows = json.loads(sys.argv[1])
torch.set_num_threads(threads)
needed = {}
for count, size, dtype, state_bits in rows:
    params = [parameter(torch.ones(size, dtype=getattr(torch, dtype))) for _ in range(count)]
    for p in params:
        p.grad = torch.full_like(p, 0.5)
    for case in EVERY:
        optimizer = case.make(params, optim_bits=state_bits)
        optimizer.step()
        optimizer.step()
        try:
            pathlib.Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            sys.exit(77)
        before = resident("VmRSS")
        for _ in range(3):
            optimizer.step()
        needed[f"{case}: {count} x {size} {dtype}, {state_bits}-bit state"] = resident("VmHWM") - before
print(json.dumps(needed))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_a_step_allocates_under_1_mib_per_thread() -> None:
    command = [sys.executable, "-c", WORKER, json.dumps([THREADS, ROWS])]
    environment = child_environment()
    if "ASAN_OPTIONS" in environment:  # AddressSanitizer would keep what each step frees
        environment["ASAN_OPTIONS"] += ":quarantine_size_mb=0:thread_local_quarantine_size_kb=0"
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE, env=environment)
    if done.returncode == 77:
        pytest.skip("this system does not let a process reset its peak memory")
    assert done.returncode == 0, done.stderr
    needed = json.loads(done.stdout)
    assert len(needed) == len(ROWS) * len(EVERY)
    assert {row: n for row, n in needed.items() if n >= THREADS * 2**20} == {}
