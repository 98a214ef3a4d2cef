"""What a user may say about paging, what is refused, and which tier state goes to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.harness import parameter

import optim8
from optim8.paging import Pager, as_bytes, plan

KIB = 2**10
SIZES = {0: 0, 17: 17, "2GiB": 2**31, "1.5 MiB": 3 * 2**19, " 3kB ": 3000, "5b": 5, "1TB": 10**12}


def test_sizes() -> None:
    assert {given: as_bytes("x", given) for given in SIZES} == SIZES


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a unit that is none": ({"host_budget": "2 giga"}, r"host_budget must be a number and a unit .* got '2 giga'"),
    "no unit": ({"host_budget": "24"}, "host_budget must be a number and a unit .* got '24'"),
    "no number": ({"bucket": "GiB"}, "bucket must be a number and a unit"),
    "below 0": ({"device_budget": -1}, "device_budget must be 0 bytes or more, got -1"),
    "below 0 in words": ({"device_budget": "-1GiB"}, "device_budget must be a number and a unit"),
    "a float": ({"host_budget": 2e9}, "host_budget must be bytes or a text such as '2GiB', got 2000000000.0"),
    "a bool": ({"host_budget": True}, "host_budget must be bytes or a text"),
    "no room for a bucket": ({"host_budget": "1MiB"}, "room for one bucket of 16777216 bytes, got 1048576. Raise"),
    "a tiny bucket": ({"bucket": 4096}, "bucket must be 65536 bytes or more, got 4096"),
    "keep nowhere": ({"keep": True}, "keep=True needs a directory"),
    "resume what is not kept": ({"resume": True, "directory": "x"}, "Pass keep=True too"),
    "parameters of no earlier run": (
        {"changed_params": True, "keep": True, "directory": "x"},
        "Pass resume=True too",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_options_that_cannot_be_honoured_are_refused(what: str) -> None:
    options, message = REFUSED[what]
    with pytest.raises((ValueError, TypeError), match=message):
        Pager(**options)


def test_paged_must_be_a_bool_or_a_pager() -> None:
    with pytest.raises(
        TypeError, match=r"AdamW8bit: paged must be True, False or an optim8\.paging\.Pager, got '2GiB'"
    ):
        optim8.AdamW8bit([parameter(torch.ones(3))], paged="2GiB")


def test_the_repr_of_a_pager_is_what_differs_from_the_defaults_in_words(tmp_path: Path) -> None:
    """And makes the same Pager, within the digits shown."""
    assert repr(Pager()) == "Pager()"
    pager = Pager(device_budget=0, host_budget=3 * 2**29, directory=tmp_path, keep=True, bucket="64KiB")
    shown = f"Pager(device_budget=0, host_budget='1.5GiB', directory={str(tmp_path)!r}, keep=True, bucket='64KiB')"
    assert repr(pager) == shown
    assert eval(shown) == pager


def test_the_repr_of_a_placement_is_bytes_by_tier(tmp_path: Path) -> None:
    params = [parameter(torch.ones(8192)), parameter(torch.ones(3))]
    optimizer = optim8.AdamW8bit(params, paged=Pager(directory=tmp_path))
    assert repr(optimizer.placement()) == "Placement(2 parameters, state: none yet)"
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert repr(optimizer.placement()) == "Placement(2 parameters, state: 16.28KiB on disk)"


@pytest.mark.parametrize("directory", ["run", Path("run")])
def test_a_relative_directory_is_that_of_the_working_directory_when_the_pager_is_made(
    directory: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is used later, after the program has gone elsewhere, there may be one of the same name."""
    (tmp_path / "elsewhere" / "run").mkdir(parents=True)
    for keep in (False, True):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "run").mkdir(exist_ok=True)
        pager = Pager(directory=directory, keep=keep)
        assert pager.directory == tmp_path / "run"
        monkeypatch.chdir("elsewhere")
        params = [parameter(torch.ones(8192), torch.ones(8192))]
        optimizer = optim8.AdamW8bit(params, paged=pager)
        optimizer.step()
        Path("model.pt").touch()
        if keep:
            optimizer.note_checkpoint("model.pt")
            for what in ("model.pt", "s3://bucket/model.pt"):
                optimizer.note_checkpoint(what)
                noted = json.loads((tmp_path / "run" / "checkpoint.json").read_text())["what"]
                assert noted == repr(what if ":" in what else str(tmp_path / "elsewhere" / what))
        optimizer.flush()
        optimizer.close()
        assert [place.where for place in optimizer.placement()] == [str(tmp_path / "run")]
        assert list(Path("run").iterdir()) == []
        assert ((tmp_path / "run" / "params.json").exists()) == keep


PLANS: tuple[tuple[dict[str, Any], str, dict[str, int], list[str]], ...] = (
    ({}, "cpu", {}, ["disk"] * 4),
    ({"host_budget": 400 * KIB}, "cpu", {}, ["host", "host", "disk", "host"]),
    ({"host_budget": 400 * KIB}, "cpu", {"host_taken": 300 * KIB}, ["disk", "disk", "disk", "host"]),
    ({"host_budget": 400 * KIB, "keep": True, "directory": "x"}, "cpu", {}, ["disk"] * 4),
    ({"host_budget": 64 * KIB}, "cpu", {}, ["disk"] * 4),
    ({}, "cuda", {"device_free": 2**30 + 199 * KIB}, ["device", "host", "host", "device"]),
    ({"device_budget": 0}, "cuda", {"device_free": 2**40}, ["host"] * 4),
    ({"device_budget": 200 * KIB}, "cuda", {"device_taken": 150 * KIB}, ["host", "host", "host", "device"]),
    ({"device_budget": 100 * KIB, "host_budget": 374 * KIB}, "cuda", {}, ["device", "host", "host", "host"]),
)
SIZED = [100 * KIB, 100 * KIB, 200 * KIB, 10 * KIB]


@pytest.mark.parametrize("options, device, given, expected", PLANS)
def test_plan(options: dict[str, Any], device: str, given: dict[str, int], expected: list[str]) -> None:
    """The fastest tier that has room, in order; one bucket of a host budget is for streaming."""
    made = plan(Pager(**options, bucket="64KiB"), SIZED, device, **given)
    assert list(made.tiers) == expected
    assert sum(made.bytes_by_tier().values()) == 410 * KIB
    # What the budget leaves, in whole pages, and at most four buckets; without a limit nobody counts it.
    in_host = given.get("host_taken", 0) + made.bytes_by_tier().get("host", 0)
    left = min(256 * KIB, options.get("host_budget", 0) - in_host) // 4096 * 4096
    assert made.streaming_bytes == (left if "host_budget" in options and "disk" in expected else 0)
    assert "host_budget" not in options or in_host + made.streaming_bytes <= options["host_budget"]


@pytest.mark.parametrize(
    "options, given, message",
    [
        ({"device_budget": 100 * KIB, "host_budget": 164 * KIB}, {}, r"but 0\.2 MiB find no room.*host_budget to 1MiB"),
        (
            {"device_budget": 0, "host_budget": "64KiB"},
            {"host_taken": 3 * 2**20},
            r"host_budget to 4MiB \(None: no limit",
        ),
        (
            {"keep": True, "directory": "x"},
            {"device_free": 2**40},
            "kept directory holds state of parameters on the CPU",
        ),
    ],
)
def test_state_that_a_gpu_could_not_reach_is_not_planned(
    options: dict[str, Any], given: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=f"Training: .*{message}"):
        plan(Pager(**options, bucket="64KiB"), SIZED, "cuda", **given, owner="Training")


def test_the_advised_budget_makes_it_fit() -> None:
    sizes = [5 * 2**20 + 1] * 9
    with pytest.raises(ValueError, match=r"^optim8\.paging\.plan: .*host_budget to (\d+MiB)") as refused:
        plan(Pager(device_budget="11MiB", host_budget="17MiB"), sizes, "cuda")
    advised = str(refused.value).partition("host_budget to ")[2].partition(" ")[0]
    made = plan(Pager(device_budget="11MiB", host_budget=advised), sizes, "cuda")
    assert made.tiers == ("device",) * 2 + ("host",) * 7
    with pytest.raises(ValueError, match="no room"):
        plan(Pager(device_budget="11MiB", host_budget=f"{int(advised[:-3]) - 1}MiB"), sizes, "cuda")
