"""The experiment on bfloat16 weights runs, in small, and says what it measured."""

from __future__ import annotations

from pathlib import Path

import pytest
from experiments_harness import read, run

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
