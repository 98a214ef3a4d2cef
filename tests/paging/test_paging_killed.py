"""Processes that are killed: the state of the last step is whole or known not to be, and the checkpoint that was noted
can be returned to."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.harness import bits, parameter, snapshot
from support.processes import child_environment
from test_paging_kept import ADAMW, keep

from optim8.paging.streaming import CACHED, DIRECT, MAPPED

HERE = Path(__file__).parent
WORKER = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {here!r})
from test_paging_kept import ADAMW, keep
from test_paging_killed import parameter_and_gradient
from optim8.paging.streaming import DIRECT, MAPPED, Stream
torch.set_num_threads(1)
Stream._goes_past_cache = lambda self, share: {way!r} == DIRECT
p = parameter_and_gradient()
budget = None if {way!r} == MAPPED else "256KiB"
optimizer = ADAMW.make([p], paged=keep(Path({folder!r}), host_budget=budget, bucket="64KiB"))
optimizer.step()
assert optimizer.memory._stream.way == {way!r}
optimizer.note_checkpoint("runs/last.pt")
if {between}:
    optimizer.step()
    optimizer.step()
print("go", flush=True)
if {between}:
    sys.stdin.read()
while True:
    optimizer.step()
"""


def parameter_and_gradient() -> torch.nn.Parameter:
    p = parameter(torch.ones(2**24, dtype=torch.bfloat16))
    p.grad = torch.full_like(p, 0.25)
    return p


def killed(folder: Path, between: bool, way: str) -> None:
    """Leave a directory as a process leaves it that noted a checkpoint after its first step, and is killed in the
    middle of a later one or after the third."""
    code = WORKER.format(here=str(HERE), folder=str(folder), between=between, way=way)
    environment = child_environment()
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"go\n"
        with (folder / "kept" / "journal").open("rb", buffering=0) as journal:
            while not between and os.pread(journal.fileno(), 1, 8) != b"\1":
                time.sleep(0)
        process.send_signal(signal.SIGKILL)
        process.wait()


def continued(folder: Path, steps_before: int, way: str) -> None:
    """Resume with the parameters of a step, and compare with a run that was not interrupted."""
    resumed, reference = parameter_and_gradient(), parameter_and_gradient()
    plain = ADAMW.make([reference])
    for _ in range(steps_before):
        plain.step()
    with torch.no_grad():
        resumed.copy_(reference)
    more = {} if way == MAPPED else {"host_budget": "256KiB", "bucket": "64KiB"}
    optimizer = ADAMW.make([resumed], paged=keep(folder, resume=True, **more))
    assert snapshot(optimizer) == snapshot(plain)
    optimizer.step()
    plain.step()
    assert bits(resumed) == bits(reference)
    optimizer.close()


@pytest.mark.parametrize("way", [MAPPED, CACHED, DIRECT])
def test_after_sigkill_in_the_middle_of_a_step_the_run_returns_to_its_checkpoint(way: str, tmp_path: Path) -> None:
    """With the bits of a run that was not interrupted; without a copy of the state, what is half stepped is refused."""
    killed(tmp_path, False, way)
    record = tmp_path / "kept" / "checkpoint.json"
    noted = record.read_text()
    record.write_text(json.dumps({**json.loads(noted), "layout": {}}))
    p = parameter_and_gradient()
    with pytest.raises(RuntimeError) as error:
        ADAMW.make([p], paged=keep(tmp_path, resume=True))
    text = str(error.value)
    for part in ("ended while it was stepping, after step", "cannot be used", "'runs/last.pt' of step 1, 20"):
        assert part in text
    with pytest.raises(FileExistsError):
        ADAMW.make([p], paged=keep(tmp_path))
    record.write_text(noted)
    continued(tmp_path, 1, way)


@pytest.mark.parametrize("way", [MAPPED, CACHED, DIRECT])
def test_after_sigkill_between_steps_the_run_goes_on_from_the_step_of_its_parameters(way: str, tmp_path: Path) -> None:
    """Those of the checkpoint, or those of the last step, which may have been saved without a word to optim8."""
    killed(tmp_path, True, way)
    shutil.copytree(tmp_path / "kept", tmp_path / "other" / "kept")
    continued(tmp_path / "other", 3, way)
    continued(tmp_path, 1, way)
