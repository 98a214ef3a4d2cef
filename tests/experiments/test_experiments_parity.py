"""The comparison of 8-bit with 32-bit training over seeds: it runs, pairs runs by seed, and its intervals are right."""

import importlib.util
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from experiments_harness import EXPERIMENTS, read, run

SMALL = ["--quick", "--seeds", 2, "--optimizers", "adamw8bit"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    text = tmp_path_factory.mktemp("text") / "squares.txt"
    text.write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(400)))
    return [*SMALL, "--text", text]


@pytest.fixture(scope="module")
def compared(small: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small comparison."""
    out = tmp_path_factory.mktemp("parity")
    done = run("parity.py", *small, "--out", out, "--json", out / "parity.json", "--png", out / "parity.png")
    assert done.returncode == 0, done.stderr
    assert "against 32-bit state" in done.stdout
    return out


def test_pairs_share_their_seed(compared: Path) -> None:
    result = read(compared / "parity.json")
    assert list(result["optimizers"]) == ["adamw", "adamw8bit"]
    (pair,) = result["pairs"]
    for seed, difference in enumerate(pair["relative_differences"]):
        runs = {name: read(compared / f"seed-{seed}" / f"{name}.json") for name in ("adamw", "adamw8bit")}
        assert {figures["settings"]["seed"] for figures in runs.values()} == {seed}
        ratio = runs["adamw8bit"]["validation_loss"] / runs["adamw"]["validation_loss"]
        assert difference == ratio - 1
        # From the same start on the same batches: before the first update the losses are the same bits.
        assert runs["adamw"]["training_curve"][0] == runs["adamw8bit"]["training_curve"][0]
        assert runs["adamw"]["parameters_sha256"] != runs["adamw8bit"]["parameters_sha256"]
    losses = result["optimizers"]["adamw"]["validation_losses"]
    assert len(set(losses)) == 2  # another seed is another training


def test_finished_trainings_are_kept(
    small: list[object],
    compared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    from parity import main

    out = tmp_path / "out"
    shutil.copytree(compared, out)
    marked = out / "seed-1" / "adamw.json"
    loss = read(marked)["validation_loss"]
    marked.write_text(marked.read_text().replace(f'"validation_loss": {loss}', '"validation_loss": 123.0'))
    options = ["--resume", "--out", out, "--json", tmp_path / "again.json", "--png", tmp_path / "again.png"]
    assert main([str(option) for option in (*small, *options)]) == 0
    assert read(tmp_path / "again.json")["optimizers"]["adamw"]["validation_losses"][1] == 123.0
    assert main([str(option) for option in (*small, "--steps", 6, *options)]) == 2
    assert "steps=5 there and 6 here" in capsys.readouterr().err


def test_interval_is_students(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    from parity import confidence_interval

    # Two-sided 95 % quantile of Student's distribution with 3 degrees of freedom, from printed tables: 3.182.
    found = confidence_interval([1.0, 2.0, 3.0, 4.0])
    half = 3.182 * (5 / 3) ** 0.5 / 2
    assert found["mean"] == 2.5
    assert found["upper"] - 2.5 == pytest.approx(half, rel=2e-4)
    assert 2.5 - found["lower"] == pytest.approx(half, rel=2e-4)


def test_one_seed_has_no_interval(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    from parity import main

    with pytest.raises(SystemExit, match="2"):
        main(["--seeds", "1"])
    assert "needs at least 2 seeds, got 1" in capsys.readouterr().err


@pytest.fixture
def long(small: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a longer comparison in small, with the source of a short module as the later text."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    from lm import data

    monkeypatch.setattr(data, "SOURCES", ("keyword",))
    outputs = ["--out", tmp_path, "--json", tmp_path / "long.json", "--png", tmp_path / "long.png"]
    return [str(option) for option in (*small, "--long", *outputs)]


def test_long_comparison_has_both_roundings_at_every_rate(
    long: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from parity import main

    assert main([*long, "--shift", "--optimizers", "adamw8bit,adamw8bit-nearest"]) == 0
    printed = capsys.readouterr().out
    assert "| learning rate |" in printed
    assert "from half of the steps on of source of keyword" in printed
    result = read(tmp_path / "long.json")
    names = ["adamw", "adamw8bit", "adamw8bit-nearest"]
    assert list(result["optimizers"]) == [*names, *(f"{name} x3" for name in names)]
    assert [pair["counterpart"] for pair in result["pairs"]] == ["adamw", "adamw", "adamw x3", "adamw x3"]
    for folder, rate in (("seed-1", 1), ("seed-1-rate-3", 3)):
        found = [read(tmp_path / folder / f"{name}.json") for name in names]
        assert len({figures["parameters_sha256"] for figures in found}) == 3
        assert len({figures["training_curve"][0][1] for figures in found}) == 1
        for figures in found:
            settings = figures["settings"]
            assert figures["learning_rate"] == rate * 1e-3
            assert (settings["rate"], settings["end"], settings["min_8bit_size"]) == (rate, 0, 1024)
            assert settings["later_text_sha256"] == result["later_text"]["sha256"] != settings["text_sha256"]
        assert found[0]["state_bytes_per_parameter"] > 8
        assert found[1]["state_bytes_per_parameter"] < 2.1  # all but the norms' gains


def test_other_libraries_may_have_fewer_seeds(
    long: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bitsandbytes")
    from parity import main

    few = ["--seeds", "3", "--peer-seeds", "2", "--rates", "1", "--optimizers", "adamw8bit,bitsandbytes-adamw8bit"]
    assert main([*long, *few]) == 0
    assert "Means over 3 seeds (bitsandbytes AdamW8bit: 2);" in capsys.readouterr().out
    result = read(tmp_path / "long.json")
    assert list(result["peers"]) == ["bitsandbytes"]
    assert [len(found["validation_losses"]) for found in result["optimizers"].values()] == [3, 3, 2]
    assert [len(pair["relative_differences"]) for pair in result["pairs"]] == [3, 2]
    assert result["optimizers"]["bitsandbytes-adamw8bit"]["state_bytes_per_parameter"] < 2.1


def test_a_library_that_is_missing_is_named(
    long: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from parity import main

    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SystemExit, match="2"):
        main([*long, "--optimizers", "bitsandbytes-adamw8bit"])
    assert "bitsandbytes-adamw8bit needs bitsandbytes, which is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--rates", "1,fast", "must be numbers"), ("--peer-seeds", "1", "needs at least 2 seeds, got 1")],
)
def test_arguments_that_cannot_be_honoured(
    long: list[str], capsys: pytest.CaptureFixture[str], option: str, value: str, message: str
) -> None:
    from parity import main

    with pytest.raises(SystemExit, match="2"):
        main([*long, option, value])
    assert message in capsys.readouterr().err


def test_the_text_changes_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    from lm import train
    from lm.data import Text

    seen: list[Any] = []

    def record(values: torch.Tensor, *rest: Any) -> Any:
        seen.append(values)
        return draw(values, *rest)

    draw = train.random_batch
    monkeypatch.setattr(train, "random_batch", record)
    before, after = (
        Text(name, name, torch.full((40,), code), torch.full((20,), code)) for name, code in (("a", 1), ("b", 2))
    )
    settings = train.Settings("adamw8bit", 10, 2, 1, 2, 64, 8, "float32", 0, "cpu", 1, "a", later_text_sha256="b")
    figures = train.Run(settings, before, tmp_path, after).train()
    assert [values is after.training for values in seen] == [False] * 5 + [True] * 5
    # The loss of a text of one letter falls at once; that of the other letter starts higher.
    losses = [loss for _, loss in figures["training_curve"]]
    assert losses[4] < min(losses[0], losses[5])
    assert [point for point, _ in figures["validation_curve"]] == [2, 4, 6, 8, 10]
    assert figures["validation_curve"][1][1] < figures["validation_curve"][2][1]  # already of the other letter


def test_learning_rate_ends_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    from lm.train import learning_rate

    assert [learning_rate(2.0, step, 100) for step in (0, 4, 5, 100)] == [0.4, 2.0, 2.0, pytest.approx(0.2)]
    assert learning_rate(2.0, 100, 100, end=0.0) == 0
    middle = 5 + 95 / 2
    assert learning_rate(1.0, math.floor(middle), 100, end=0.0) > 0.5 > learning_rate(1.0, math.ceil(middle), 100, 0.0)
