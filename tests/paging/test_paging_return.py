"""A run that notes its checkpoints can return to the last one, with the bits of one that was not interrupted, whatever
became of it; and parameters and state of different steps are never stepped together."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from support.harness import bits, hostile, snapshot
from test_paging_kept import ADAMW, keep, new_params

import optim8
import optim8.paging
from optim8.paging.directory import checkpoint

SIZES = (3, 5000)  # the first in 32 bits
Values = list[torch.Tensor]


class Run:
    """A run with a schedule; `seen`: its parameters and all its bits after each step."""

    def __init__(self, folder: Path | None, values: Values | None = None, **more: Any) -> None:
        self.params = new_params(SIZES)
        if values is not None:
            self.put(values)
        if folder is not None:
            folder.mkdir(exist_ok=True)
        paged = None if folder is None else keep(folder, **more)
        self.optimizer = ADAMW.make(self.params, paged=paged)
        self.seen: list[tuple[Values, dict[str, Any]]] = []
        self.see()

    def put(self, values: Values) -> None:
        with torch.no_grad():
            for p, value in zip(self.params, values, strict=True):
                p.copy_(value)

    def see(self) -> None:
        self.seen.append(([p.detach().clone() for p in self.params], snapshot(self.optimizer)))

    def steps(self, first: int, last: int) -> None:
        for t in range(first, last):
            for i, p in enumerate(self.params):
                p.grad = hostile(p.numel(), torch.float32, seed=10 * t + i)
            self.optimizer.step()
            self.optimizer.param_groups[0]["lr"] *= 0.5
            self.see()


@pytest.fixture(scope="module")
def reference() -> list[tuple[Values, dict[str, Any]]]:
    """What a run that is not interrupted leaves after each of 6 steps."""
    run = Run(None)
    run.steps(0, 6)
    return run.seen


def left(folder: Path, noted: int | None, last: int, **more: Any) -> Run:
    run = Run(folder, **more)
    run.steps(0, last if noted is None else noted)
    if noted is not None:
        run.optimizer.note_checkpoint("last.pt")
        run.steps(noted, last)
    return run


def killed(folder: Path, noted: int | None, last: int, **more: Any) -> Path:
    """What a process leaves that is killed."""
    run = left(folder / "alive", noted, last, **more)
    shutil.copytree(folder / "alive", folder / "killed")
    run.optimizer.close()
    return folder / "killed"


def _patch(path: Path, at: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


def _half_stepped(folder: Path) -> None:
    _patch(folder / "journal", 8, b"\1")
    for path in folder.glob("state-*.bin"):
        _patch(path, 4096, os.urandom(2048))


def _without_power(folder: Path) -> None:
    _patch(folder / "journal", 24, b"another boot")
    for path in folder.glob("state-*.bin"):
        _patch(path, 4096, os.urandom(2048))


ENDS: dict[str, Callable[[Path], Any]] = {
    "a kill between steps": lambda folder: None,
    "a kill in a step": _half_stepped,
    "a power cut": _without_power,
}


@pytest.mark.parametrize("noted", [0, 2])
@pytest.mark.parametrize("end", [*ENDS, "an exception"])
def test_a_run_returns_to_its_checkpoint(
    end: str, noted: int, reference: list[tuple[Values, dict[str, Any]]], tmp_path: Path
) -> None:
    """Twice: after the first return it is interrupted again."""
    run = left(tmp_path / "0", noted, 4)
    for again in (1, 2):
        if end == "an exception":
            run.optimizer.close()  # as the end of the process does
        shutil.copytree(tmp_path / str(again - 1), tmp_path / str(again))
        if end != "an exception":
            ENDS[end](tmp_path / str(again) / "kept")
        run = Run(tmp_path / str(again), reference[noted][0], resume=True)
        assert run.seen[0][1] == reference[noted][1]
        run.steps(noted, 6 if again == 2 else 5)
    assert run.seen[-1][1] == reference[6][1]
    kept = tmp_path / "2" / "kept"
    assert len(list(kept.glob("state-*"))) == 1
    assert len(list(kept.glob("checkpoint-*.bin"))) == bool(noted)


@pytest.mark.parametrize("noted", [None, 2])
def test_after_a_kill_the_parameters_of_the_last_step_are_the_right_ones(
    noted: int | None, reference: list[tuple[Values, dict[str, Any]]], tmp_path: Path
) -> None:
    """However they were saved."""
    folder = killed(tmp_path, noted, 4)
    run = Run(folder, reference[4][0], resume=True)
    run.optimizer.param_groups[0]["lr"] *= 0.5  # the change after the last step is nowhere
    run.steps(4, 6)
    assert run.seen[-1][1] == reference[6][1]


@pytest.mark.parametrize("copy", [True, False])
def test_parameters_of_neither_step_are_refused(
    copy: bool, reference: list[tuple[Values, dict[str, Any]]], tmp_path: Path
) -> None:
    """The error names both steps."""
    folder = killed(tmp_path, 2, 4, checkpoint_copy=copy)
    for values in (3,) if copy else (2, 3):
        run = Run(folder, reference[values][0], resume=True)
        with pytest.raises(ValueError, match=r"stepped last \(step 4\).*'last.pt' of step 2"):
            run.steps(4, 5)
        run.optimizer.close()
    run = Run(folder, reference[3][0], resume=True, changed_params=True)
    run.steps(4, 5)


def test_parameters_that_are_loaded_after_the_optimizer_was_made(
    reference: list[tuple[Values, dict[str, Any]]], tmp_path: Path
) -> None:
    """Then the state cannot be chosen by them; the error says how to."""
    folder = killed(tmp_path, 2, 4)
    run = Run(folder, resume=True)
    run.put(reference[2][0])
    with pytest.raises(ValueError, match=r"They are those of .*last.pt' of step 2: .*load them before .*'checkpoint'"):
        run.steps(2, 3)
    run.optimizer.close()
    for values, message in ((4, "to which the state .* has returned"), (2, None)):
        run = Run(folder, resume="checkpoint")
        run.put(reference[values][0])
        if message is None:
            run.steps(2, 6)
            assert run.seen[-1][1] == reference[6][1]
        else:
            with pytest.raises(ValueError, match=message):
                run.steps(2, 3)
            run.optimizer.close()


def test_the_state_of_the_last_step_is_there_until_the_run_is_stepped_from_its_checkpoint(
    reference: list[tuple[Values, dict[str, Any]]], tmp_path: Path
) -> None:
    left(tmp_path, 2, 4).optimizer.close()
    before = {p.name: p.read_bytes() for p in (tmp_path / "kept").iterdir() if p.name != "journal"}
    run = Run(tmp_path, reference[2][0], resume=True)
    for use in (run.optimizer.state_dict, run.optimizer.flush, run.optimizer.placement, run.optimizer.close):
        use()
    assert {p.name: p.read_bytes() for p in (tmp_path / "kept").iterdir() if p.name != "journal"} == before
    run = Run(tmp_path, reference[4][0], resume=True)
    run.steps(4, 6)
    assert run.seen[-1][1] == reference[6][1]


def _snapshots(folder: Path, call: Callable[[], Any]) -> list[dict[str, bytes]]:
    """What a kill before each line of optim8.paging leaves of a directory while `call` runs."""
    seen: list[dict[str, bytes]] = []
    package = str(Path(optim8.paging.__file__).parent)

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename.startswith(package):
            now = {path.name: path.read_bytes() for path in folder.iterdir()}
            if not seen or now != seen[-1]:
                seen.append(now)
            return trace
        return None

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)
    return seen


def _resumed(files: dict[str, bytes], folder: Path, values: Values) -> Run:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "kept").mkdir(parents=True)
    for name, content in files.items():
        (folder / "kept" / name).write_bytes(content)
    return Run(folder, values, resume=True)


def test_a_kill_while_a_checkpoint_is_noted_leaves_one_of_both(
    reference: list[tuple[Values, dict[str, Any]]], tmp_path: Path
) -> None:
    """The new one, which has been saved by then; and the one before as long as it is there."""
    run = left(tmp_path, 2, 4)
    instants = _snapshots(tmp_path / "kept", lambda: run.optimizer.note_checkpoint("last.pt"))
    assert len(instants) > 8
    returned = []
    for files in instants:
        new = _resumed(files, tmp_path / "new", reference[4][0])
        assert {k: v for k, v in new.seen[0][1].items() if "lr" not in k} == {
            k: v for k, v in reference[4][1].items() if "lr" not in k
        }
        new.steps(4, 5)
        old = _resumed(files, tmp_path / "old", reference[2][0])
        returned.append(old.seen[0][1] == reference[2][1])
        if returned[-1]:
            old.steps(2, 3)
            assert old.seen[-1][1] == reference[3][1]
        else:
            with pytest.raises(ValueError, match=r"is not what it was when the state in .* step 4"):
                old.steps(2, 3)
    assert returned == sorted(returned, reverse=True)
    assert returned[0]
    assert not returned[-1]


def _in_32_bits(run: Run) -> None:
    """The state is laid out anew, in a larger file."""
    optim8.override(run.params[1], optim_bits=32)


def _with_more_parameters(run: Run) -> None:
    """Their state is in another file."""
    run.params += new_params((4000,))
    run.optimizer.add_param_group({"params": run.params[2:], "lr": 0.01})


@pytest.mark.parametrize("change", [_in_32_bits, _with_more_parameters])
def test_state_that_has_grown_since_the_last_checkpoint(change: Callable[[Run], None], tmp_path: Path) -> None:
    """While the next one is noted and after it, one of both is whole."""
    run = Run(tmp_path / "a")
    run.steps(0, 1)
    run.optimizer.note_checkpoint("last.pt")
    before = run.seen[-1]
    change(run)
    run.steps(1, 2)
    after = run.seen[-1]
    instants = _snapshots(tmp_path / "a" / "kept", lambda: run.optimizer.note_checkpoint("last.pt"))
    assert len(instants) > 8
    returned = []
    for files in instants:
        old = _resumed(files, tmp_path / "old", before[0])
        returned.append(old.seen[0][1] == before[1])
        old.optimizer.close()
    assert returned[0]
    assert returned == sorted(returned, reverse=True)
    run.steps(2, 4)
    new = _resumed(
        {path.name: path.read_bytes() for path in (tmp_path / "a" / "kept").iterdir()},
        tmp_path / "new",
        after[0][:2],
    )
    if len(after[0]) > 2:
        _with_more_parameters(new)
        new.put(after[0])
    else:
        _in_32_bits(new)
    assert {k: v for k, v in snapshot(new.optimizer).items() if "lr" not in k} == {
        k: v for k, v in after[1].items() if "lr" not in k
    }
    new.steps(2, 4)
    assert [bits(p) for p in new.params] == [bits(p) for p in run.params]


@pytest.mark.parametrize("end", ENDS)
def test_a_kill_on_the_way_back_leaves_the_checkpoint(
    end: str, reference: list[tuple[Values, dict[str, Any]]], tmp_path: Path
) -> None:
    folder = killed(tmp_path, 2, 4)
    ENDS[end](folder / "kept")
    runs: list[Run] = []
    instants = _snapshots(
        folder / "kept",
        lambda: runs.append(Run(folder, reference[2][0], resume=True)) or runs[0].steps(2, 3),  # type: ignore[func-returns-value]
    )
    assert len(instants) > 8
    for files in instants:
        run = _resumed(files, tmp_path / "c", reference[2][0])
        assert run.seen[0][1] == reference[2][1]
        run.steps(2, 6)
        assert run.seen[-1][1] == reference[6][1]


def test_a_layout_that_cannot_be_read_does_not_lose_the_checkpoint(
    reference: list[tuple[Values, dict[str, Any]]], tmp_path: Path
) -> None:
    left(tmp_path, 2, 4).optimizer.close()
    (tmp_path / "kept" / "layout.json").write_bytes(b"")
    with pytest.raises(ValueError, match=r"layout.json .* it is empty.* resume='checkpoint'"):
        Run(tmp_path, reference[2][0], resume=True)
    run = Run(tmp_path, reference[2][0], resume="checkpoint")
    run.steps(2, 6)
    assert run.seen[-1][1] == reference[6][1]


def test_loading_a_state_dict_instead_of_stepping_from_the_checkpoint(
    reference: list[tuple[Values, dict[str, Any]]], tmp_path: Path
) -> None:
    donor = Run(None)
    donor.steps(0, 3)
    left(tmp_path, 2, 4).optimizer.close()
    run = Run(tmp_path, reference[2][0], resume="checkpoint")
    run.optimizer.load_state_dict(donor.optimizer.state_dict())
    run.put(reference[3][0])
    run.optimizer.close()
    run = Run(tmp_path, reference[3][0], resume=True)
    run.steps(3, 6)
    assert run.seen[-1][1] == reference[6][1]


def test_a_directory_without_a_word_of_its_parameters_that_is_ahead_of_its_checkpoint_is_refused(
    reference: list[tuple[Values, dict[str, Any]]], tmp_path: Path
) -> None:
    """As earlier versions leave it when they are killed."""
    folder = killed(tmp_path, 2, 4, checkpoint_copy=False)
    _patch(folder / "kept" / "journal", 64, b"\0" * 8)
    with pytest.raises(
        RuntimeError, match=r"is of step 4, the last checkpoint of step 2 \(.*last.pt'\).*changed_params"
    ):
        Run(folder, reference[2][0], resume=True)
    Run(folder, reference[4][0], resume=True, changed_params=True).steps(4, 5)


def test_a_state_dict_that_is_taken_leaves_the_noted_checkpoint_alone(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for t, expected in ((0, checkpoint.STATE_DICT), (1, checkpoint.STATE_DICT), (2, "'last.pt'"), (3, "'last.pt'")):
        run.steps(t, t + 1)
        if t == 2:
            run.optimizer.note_checkpoint("last.pt")
        run.optimizer.state_dict()
        noted = run.optimizer.memory.kept.checkpoint
        assert (noted.what, noted.step) == (expected, min(t + 1, 3))


def test_no_room_for_the_copy(
    reference: list[tuple[Values, dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state is unharmed, and an earlier checkpoint is still there."""

    def no_space(handle: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    run = Run(tmp_path / "a")
    run.steps(0, 2)
    before = sorted(path.name for path in (tmp_path / "a" / "kept").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", no_space)
        with pytest.raises(OSError, match=r"for a copy of it at the checkpoint .*unharmed.*checkpoint_copy=False"):
            run.optimizer.note_checkpoint("last.pt")
        after = sorted(path.name for path in (tmp_path / "a" / "kept").iterdir())
        assert after == sorted([*before, "params.json"])
        run.steps(2, 3)
    run.optimizer.note_checkpoint("last.pt")
    run.steps(3, 4)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", no_space)
        with pytest.raises(OSError, match="to return to the checkpoint beside the state of the last step"):
            Run(tmp_path / "b", reference[3][0], resume=True)
    run = Run(tmp_path / "b", reference[3][0], resume=True)
    run.steps(3, 6)
    assert run.seen[-1][1] == reference[6][1]


def test_the_placement_tells_of_the_copy(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.steps(0, 1)
    assert (run.optimizer.placement().checkpoint, run.optimizer.placement().checkpoint_bytes) == ("", 0)
    for step in (1, 2):  # the second takes the place of the first
        run.optimizer.note_checkpoint("last.pt")
        placement = run.optimizer.placement()
        size = sum(path.stat().st_size for path in (tmp_path / "kept").glob("checkpoint-*.bin"))
        assert (placement.checkpoint, placement.checkpoint_bytes) == (f"'last.pt' of step {step}", size)
        assert size == sum(path.stat().st_size for path in (tmp_path / "kept").glob("state-*.bin"))
        assert f"copy at {placement.checkpoint}: " in repr(placement)
        assert str(placement).splitlines()[-1].startswith("copy at ")
        assert bits(run.params[0])
        run.steps(1, 2)


def test_a_checkpoint_of_state_that_cannot_be_used_is_not_noted(tmp_path: Path) -> None:
    run = left(tmp_path, 1, 2)
    run.optimizer.memory.kept.journal.begin(1)  # a step that has not ended
    with pytest.raises(RuntimeError, match="stepping was interrupted"):
        run.optimizer.note_checkpoint("last.pt")
    run.optimizer.close()
    with pytest.raises(RuntimeError, match="was closed"):
        run.optimizer.note_checkpoint("last.pt")
    left(tmp_path / "b", None, 2).optimizer.close()
    with pytest.raises(RuntimeError, match="resume='checkpoint' needs a copy"):
        Run(tmp_path / "b", resume="checkpoint")
