"""A kept directory is a checkpoint; what cannot be trusted in it is refused, with a word on what to do."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, Case
from support.harness import ALL, bits, hostile, parameter, snapshot
from support.processes import child_environment

import optim8
from optim8.paging import Pager
from optim8.paging.directory import journal

HERE = Path(__file__).parent
ADAMW = CASES["AdamW8bit"]
SIZES = (3, 70_001, 0, 4096)


def new_params(sizes: tuple[int, ...] = SIZES, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return [parameter(hostile(n, dtype, seed=i, small=-2, large=0)) for i, n in enumerate(sizes)]


def steps(params: list[torch.nn.Parameter], optimizer: Any, first: int, last: int) -> None:
    for t in range(first, last):
        for i, p in enumerate(params):
            p.grad = hostile(p.numel(), p.dtype, seed=10 * t + i) if t != 1 or i != 3 else None
        optimizer.step()


def keep(folder: Path, resume: bool = False, **more: Any) -> Pager:
    return Pager(directory=folder / "kept", keep=True, resume=resume, **more)


@pytest.mark.parametrize("budget", [None, "64KiB"])
@ALL
def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(
    case: Case, budget: str | None, tmp_path: Path
) -> None:
    """Mixed state, late first gradients and a group added late, a schedule; twice resumed, without a copy of a file."""
    more = {"host_budget": budget, "bucket": "64KiB"}
    dtype, weights = (torch.bfloat16, {"master_bits": 32}) if budget else (torch.float32, {})
    params, twins = new_params(dtype=dtype), new_params(dtype=dtype)
    optimizers = [
        case.make(new[:2], min_8bit_size=100, paged=paged, **weights)
        for new, paged in ((twins, None), (params, keep(tmp_path, **more)))
    ]
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in optimizers]
    reference, kept = optimizers
    for new, optimizer, schedule in zip((twins, params), optimizers, schedules, strict=True):
        steps(new[:2], optimizer, 0, 1)
        schedule.step()
        optimizer.add_param_group({"params": new[2:], "lr": 0.5})
        schedule.base_lrs.append(0.5)
    files = {}
    for first in (1, 3):
        steps(params, kept, first, first + 2)
        kept.close()
        before = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in (tmp_path / "kept").glob("state*")}
        assert files.items() <= {name: inode for name, (inode, _) in before.items()}.items(), "files stay what they are"
        files = {name: inode for name, (inode, _) in before.items()}
        kept = case.make(params[:2], lr=123.0, paged=keep(tmp_path, resume=True, **more))
        kept.add_param_group({"params": params[2:], "lr": 123.0})
        steps(twins, reference, first, first + 2)
        assert snapshot(kept) == snapshot(reference)
        assert {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in (tmp_path / "kept").glob("state*")} == before
    steps(params, kept, 5, 6)
    steps(twins, reference, 5, 6)
    assert snapshot(kept) == snapshot(reference)
    kept.close()
    with pytest.raises(RuntimeError, match="the optimizer was closed"):
        kept.step()


def test_loading_into_a_kept_directory_and_resuming(tmp_path: Path) -> None:
    params = new_params()
    donor = ADAMW.make(params, optim_bits=32)
    steps(params, donor, 0, 2)
    for _ in range(2):  # into an empty directory, then over what is there
        kept = ADAMW.make(params, paged=keep(tmp_path, resume=(tmp_path / "kept").exists()))
        kept.load_state_dict(donor.state_dict())
        expected = snapshot(donor)
        assert snapshot(kept) == expected
        kept.close()
        again = ADAMW.make(params, paged=keep(tmp_path, resume=True))
        assert snapshot(again) == expected
        again.close()
        donor.step()
    assert len(list((tmp_path / "kept").glob("state-*"))) == 1


OTHERS: dict[str, tuple[Callable[[], Any], str]] = {
    "another shape": (lambda: new_params((3, 70_002, 0, 4096)), r"of shape \(70001,\) for parameter 1, which is"),
    "another order": (lambda: new_params((70_001, 3, 0, 4096)), r"of shape \(3,\) for parameter 0, which is"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_state_of_other_parameters_is_refused(what: str, tmp_path: Path) -> None:
    params = new_params()
    optimizer = ADAMW.make(params, paged=keep(tmp_path))
    steps(params, optimizer, 0, 1)
    optimizer.close()
    make, message = OTHERS[what]
    with pytest.raises(ValueError, match=message):
        ADAMW.make(make(), paged=keep(tmp_path, resume=True))
    with pytest.raises(ValueError, match=r"holds state of AdamW8bit\. Resume with that class"):
        CASES["Lion8bit"].make(params, paged=keep(tmp_path, resume=True))
    fewer = ADAMW.make(params[:2], paged=keep(tmp_path, resume=True))
    with pytest.raises(
        RuntimeError, match=r"holds state for parameter 2, which the optimizer lacks\. Add the groups|Add the par"
    ):
        fewer.step()
    fewer.close()
    ADAMW.make(params, paged=keep(tmp_path, resume=True))


def test_the_mark_of_a_flush_is_taken_back_on_the_disk_before_state_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut could leave state of half a step with the mark."""
    written = []

    class Map(mmap.mmap):
        def flush(self, *part: int) -> None:
            written.append(self[journal._SYNCED])
            super().flush(*part)

    monkeypatch.setattr(journal.mmap, "mmap", Map)
    params = new_params()
    optimizer = ADAMW.make(params, paged=keep(tmp_path))
    steps(params, optimizer, 0, 1)
    optimizer.flush()
    assert written == [1]
    steps(params, optimizer, 1, 3)
    assert written == [1, 0]


def test_two_optimizers_never_share_a_directory(tmp_path: Path) -> None:
    """Neither in one process nor in two; a fork may read but not step."""
    params = new_params()
    optimizer = ADAMW.make(params, paged=keep(tmp_path))
    steps(params, optimizer, 0, 1)
    for resume in (False, True):
        with pytest.raises(BlockingIOError, match=f"an optimizer of process {os.getpid()} has the state in"):
            ADAMW.make(params, paged=keep(tmp_path, resume=resume))
    before = snapshot(optimizer)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            optimizer.step()
        except RuntimeError as error:
            code = 0 if "belongs to process" in str(error) else 2
        finally:
            optimizer.close()
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert snapshot(optimizer) == before
    with pytest.raises(BlockingIOError):
        ADAMW.make(params, paged=keep(tmp_path, resume=True))


def test_state_outside_of_the_directory_is_refused(tmp_path: Path) -> None:
    params = new_params()
    optimizer = ADAMW.make(params, paged=keep(tmp_path))
    steps(params, optimizer, 0, 1)
    optimizer.state[params[1]]["exp_avg_codes"] = optimizer.state[params[1]]["exp_avg_codes"].clone()
    before = [bits(p) for p in params]
    with pytest.raises(RuntimeError, match=r"\['exp_avg_codes'\] of parameter 1 was replaced by a tensor outside of"):
        optimizer.step()
    assert [bits(p) for p in params] == before


NOWHERE = ("/proc/nowhere", "/dev/null/folder", "absent/folder")


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("folder", NOWHERE)
def test_a_directory_that_cannot_be_written_to(folder: str, kept: bool) -> None:
    with pytest.raises(OSError, match=r"directory that .*can be written to, got .*Pass a Pager with|or pass a Pager"):
        optim8.AdamW8bit(new_params(), paged=Pager(directory=folder, keep=kept))


FULL = """
import resource, sys, torch
from pathlib import Path
sys.path.insert(0, {here!r})
from test_paging_kept import ADAMW, new_params, steps
from support.harness import bits, snapshot
from optim8.paging import Pager
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
params = new_params()
optimizer = ADAMW.make(params, paged=Pager(directory={folder!r}, keep={kept}))
before = snapshot(optimizer, params)
try:
    steps(params, optimizer, 0, 1)
except OSError as error:
    assert "MiB in" in str(error) and "a Pager with another directory" in str(error), error
    assert snapshot(optimizer, params) == before
    assert not list(Path({folder!r}).glob("*.bin")) and not list(Path({folder!r}).glob("*.paged"))
    sys.exit(17)
"""


@pytest.mark.parametrize("kept", [False, True])
def test_a_full_disk_is_an_error_before_anything_is_mapped(kept: bool, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk's; nothing is left behind, and nothing has changed."""
    code = FULL.format(here=str(HERE), folder=str(tmp_path / "d"), kept=kept)
    (tmp_path / "d").mkdir()
    environment = child_environment()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 17, done.stderr


def test_the_disk_has_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(handle: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    params = new_params()
    optimizer = ADAMW.make(params, paged=Pager(directory=tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", no_space)
    with pytest.raises(OSError, match=r"needs 0\.\d MiB in .* MiB free: No space left on device. Make room, or pass"):
        steps(params, optimizer, 0, 1)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    steps(params, optimizer, 0, 1)
