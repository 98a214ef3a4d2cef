"""The comparison of 8-bit with 32-bit training over seeds: it runs, pairs runs by seed, and its intervals are right."""

import shutil
from pathlib import Path

import pytest
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
