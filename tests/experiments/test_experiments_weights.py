"""The experiment on bfloat16 weights runs, in small, and says what it measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from experiments_harness import EXPERIMENTS, read, run

WAYS = "float32 copy|float32 model|master_bits=32|master_bits=24|dithered|nearest|torch AdamW, float32 copy"


def test_every_way_of_keeping_weights_is_compared_with_a_copy(tmp_path: Path) -> None:
    json, png = tmp_path / "result.json", tmp_path / "result.png"
    done = run("bf16.py", "--quick", "--seeds", 2, "--ways", WAYS, "--json", json, "--png", png)
    assert done.returncode == 0, done.stderr
    result = read(json)
    assert list(result["rates"]) == ["1e-3", "1e-5"]
    for rate, found in result["rates"].items():
        assert list(found) == WAYS.split("|")
        for way, of in found.items():
            seeds = result["runs"][rate][way]
            losses = [seeds[seed]["training_loss"] for seed in seeds]
            assert of["training_loss"] == pytest.approx(sum(losses) / 2)
            copies = [result["runs"][rate]["float32 copy"][seed]["training_loss"] for seed in seeds]
            apart = [loss / copy - 1 for loss, copy in zip(losses, copies, strict=True)]
            assert of["difference"] == pytest.approx(sum(apart) / 2)
            assert f"| {way} " in done.stdout
    # At the small rate four steps move few bfloat16 weights, and all float32 ones.
    small = result["rates"]["1e-5"]
    assert small["nearest"]["unmoved"] > 0.5 > small["float32 model"]["unmoved"]
    assert png.read_bytes().startswith(b"\x89PNG")


def test_unknown_ways_are_refused() -> None:
    done = run("bf16.py", "--ways", "nearest")
    assert done.returncode == 2
    assert "--ways must be among" in done.stderr


def test_the_movement_of_weights_is_compared_with_float32_ones(tmp_path: Path) -> None:
    json = tmp_path / "result.json"
    done = run("bf16_movement.py", "--quick", "--steps", 60, "--no-peers", "--json", json)
    assert done.returncode == 0, done.stderr
    result = read(json)
    assert result["checkpoints"] == [10, 20, 30, 40, 50, 60]
    for rule in ("AdamW", "Lion"):
        found = result["rules"][rule]
        assert found["float32 weights"] == {"slope": [1.0] * 6, "error": [0.0] * 6}
        ours = f"optim8 {rule}8bit"
        assert found[ours]["slope"][-1] < 0.4  # a weight of 0.02 loses each update
        assert found[f"{ours} param_rounding=dithered"]["slope"][-1] == pytest.approx(1, abs=0.1)
        assert found[f"{ours} master_bits=24"]["slope"][-1] == pytest.approx(1, abs=0.15)
        assert found[f"{ours} master_bits=24"]["error"][-1] < found[f"{ours} param_rounding=dithered"]["error"][-1]
        assert f"{found[ours]['slope'][-1]:.2f} ({found[ours]['error'][-1]:.2f})" in done.stdout


def test_a_movement_is_measured_by_slope_and_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import bf16_movement

    exact = torch.tensor([3.0, -4.0], dtype=torch.float64)
    assert bf16_movement.compare(exact / 2, exact) == {"slope": 0.5, "error": 0.5}
    assert bf16_movement.compare(torch.tensor([4.0, 3.0]).double() + exact, exact) == {"slope": 1.0, "error": 1.0}


def test_sizes_that_do_not_fit_are_refused() -> None:
    done = run("bf16_movement.py", "--steps", 7)
    assert done.returncode == 2
    assert "--steps: must be a multiple of 6, got 7" in done.stderr
