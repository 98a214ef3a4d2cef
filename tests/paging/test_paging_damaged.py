"""A kept directory with a damaged file is refused and left alone; the error names the file and says what to do."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_paging_kept import ADAMW, keep, new_params, steps


def _patch(path: Path, at: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


def _layout(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    layout = json.loads((folder / "layout.json").read_text())
    change(layout)
    (folder / "layout.json").write_text(json.dumps(layout))


Damage = Callable[[Path], Any]
DAMAGED: dict[str, tuple[Damage, type[Exception], str]] = {
    "a file of another run": (
        lambda d: _patch(d / "state-0.bin", 13, b"0" * 32),
        ValueError,
        "state-0.bin is a file of another run. Restore the right one",
    ),
    "a short file": (
        lambda d: os.truncate(d / "state-0.bin", 4096),
        ValueError,
        r"must have \d+ bytes, got 4096. .* Restore it",
    ),
    "a file that is gone": (lambda d: (d / "state-0.bin").unlink(), ValueError, "must have .* bytes, got 0"),
    "a journal that is gone": (
        lambda d: (d / "journal").unlink(),
        RuntimeError,
        r"journal must be 4096 bytes .* got 0",
    ),
    "half a load": (lambda d: _patch(d / "journal", 8, b"\2"), RuntimeError, "while it was loading a state dict"),
    "a power cut": (
        lambda d: _patch(d / "journal", 9, b"\0" * 3 + b"\0" * 4) or _patch(d / "journal", 24, b"another boot"),
        RuntimeError,
        "restarted before the state .* was all on the disk .* none was taken",
    ),
    "no state": (lambda d: (d / "layout.json").unlink(), FileNotFoundError, "found none. Pass the directory of the"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_directory_is_refused_and_left_alone(what: str, tmp_path: Path) -> None:
    params = new_params()
    optimizer = ADAMW.make(params, paged=keep(tmp_path))
    steps(params, optimizer, 0, 2)
    optimizer.close()
    damage, kind, message = DAMAGED[what]
    damage(tmp_path / "kept")
    before = {p.name: p.read_bytes()[:4096] for p in (tmp_path / "kept").iterdir() if p.name != "journal"}
    for _ in range(2):  # refusing gives the directory back
        with pytest.raises(kind, match=message):
            ADAMW.make(params, paged=keep(tmp_path, resume=True))
    assert {p.name: p.read_bytes()[:4096] for p in (tmp_path / "kept").iterdir() if p.name != "journal"} == before


CONTENTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda old: b"",
    "cut": lambda old: old[: len(old) // 2],
    "zeros": lambda old: bytes(len(old)),
    "garbage": lambda old: b"\xff" * 8 + old[8:],
    "something else": lambda old: b"[1, 2]",
    "an object without entries": lambda old: b"{}",
    "a newer version": lambda old: json.dumps({**json.loads(old), "format": 2}).encode(),
}
READ = ("layout.json", "params.json", "checkpoint.json", "options.pt", "journal", "checkpoint-options.pt")


@pytest.mark.parametrize(
    ("name", "content"),
    [(name, content) for name in READ for content in CONTENTS if content != "a newer version" or "json" in name],
)
def test_the_error_for_a_damaged_file_names_it_and_says_what_to_do(name: str, content: str, tmp_path: Path) -> None:
    """And not what pickle, zip or JSON make of it alone."""
    params = new_params()
    optimizer = ADAMW.make(params, paged=keep(tmp_path))
    steps(params, optimizer, 0, 1)
    optimizer.note_checkpoint("last.pt")
    steps(params, optimizer, 1, 2)
    optimizer.close()
    path = tmp_path / "kept" / name
    path.write_bytes(CONTENTS[content](path.read_bytes()))
    resume = "checkpoint" if name.startswith("checkpoint-") else True
    for _ in range(2):
        with pytest.raises((ValueError, RuntimeError)) as error:
            ADAMW.make(params, paged=keep(tmp_path, resume=resume))
        text = str(error.value)
        assert text.startswith(f"AdamW8bit: {path} ")
        assert "Update optim8" in text if content == "a newer version" else "Restore it" in text
        assert "amage" in text or content == "a newer version"
        assert "another directory" in text or "changed_params=True" in text or "remove it to resume" in text


INSIDE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "files of state that are none": lambda layout: layout.update(segments=[1]),
    "files without a size": lambda layout: layout["segments"][0].pop("size"),
    "no position": lambda layout: layout["params"].update(x={}),
    "no tensors": lambda layout: layout["params"].update({"0": 7}),
    "an unknown dtype": lambda layout: layout["params"]["0"]["step"].update(dtype="int3"),
    "an unknown file": lambda layout: layout["params"]["0"]["step"].update(file="state-9.bin"),
    "a place outside of the file": lambda layout: layout["params"]["1"]["step"].update(begin=2**40),
    "too many values": lambda layout: layout["params"]["1"]["step"].update(shape=[9], stride=[2**30]),
    "no shape": lambda layout: layout["params"]["1"]["step"].pop("shape"),
}


@pytest.mark.parametrize("what", INSIDE)
def test_a_layout_with_damage_inside_is_refused(what: str, tmp_path: Path) -> None:
    params = new_params()
    optimizer = ADAMW.make(params, paged=keep(tmp_path))
    steps(params, optimizer, 0, 1)
    optimizer.close()
    _layout(tmp_path / "kept", INSIDE[what])
    with pytest.raises(
        ValueError, match=r"layout\.json must be as optim8 wrote it, and is damaged: .*Restore it\. Start"
    ):
        ADAMW.make(params, paged=keep(tmp_path, resume=True))


def test_damage_of_what_is_not_needed_stops_nobody(tmp_path: Path) -> None:
    """Fingerprints, where they are not asked for; and the copy, where the state is that of the last step."""
    params = [torch.nn.Parameter(torch.ones(5000))]
    optimizer = ADAMW.make(params, paged=keep(tmp_path))
    params[0].grad = torch.ones(5000)
    optimizer.step()
    optimizer.note_checkpoint("last.pt")
    optimizer.step()
    optimizer.close()
    for name in ("params.json", "checkpoint-0.bin", "checkpoint-options.pt"):
        (tmp_path / "kept" / name).write_bytes(b"")
    optimizer = ADAMW.make(params, paged=keep(tmp_path, resume=True, changed_params=True))
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 3
