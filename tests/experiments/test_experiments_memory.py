"""The experiment on memory: it runs a process for each point, and its bytes are those of the state."""

import gc
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from experiments_harness import EXPERIMENTS, read, run


@pytest.fixture
def memory_profile(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import memory_profile as module

    return module


def test_points_count_state_by_place(tmp_path: Path) -> None:
    paths = ["--json", tmp_path / "m.json", "--png", tmp_path / "m.png"]
    done = run("memory_profile.py", "--quick", "--no-peers", "--steps", 1, *paths)
    assert done.returncode == 0, done.stderr
    assert "Not measured: bitsandbytes (left out of this run)." in done.stdout
    rows = {row["subject"]: row for row in read(tmp_path / "m.json")["rows"]}
    matrices = [256 * 1024, 64 * 1024, 3 * 1024**2, 1024**2, 4 * 1024**2, 4 * 1024**2]
    gains, tensors = 3 * 1024, 6 + 3
    count = sum(matrices) + gains
    codes = 2 * sum(n + n // 256 * 4 for n in matrices) + 8 * gains + 4 * tensors
    expected = {"torch AdamW": 8 * count + 4 * tensors, "optim8 AdamW8bit": codes, "optim8 AdamW8bit, paged": codes}
    assert {name: row["state_bytes"] for name, row in rows.items()} == expected
    for name, row in rows.items():
        assert row["parameters"] == count
        # Parameters and gradients are in memory, and the state that is not in the file.
        least = 8 * count + row["state_bytes"] - row["state_on_disk_bytes"]
        assert row["peak_growth_bytes"] > least, name
    paged = rows["optim8 AdamW8bit, paged"]
    assert paged["state_bytes"] - paged["state_on_disk_bytes"] <= 20 * 2**20 < paged["state_bytes"]
    assert rows["optim8 AdamW8bit"]["state_on_disk_bytes"] == 0
    assert rows["optim8 AdamW8bit"]["peak_growth_bytes"] < rows["torch AdamW"]["peak_growth_bytes"]
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")


def test_a_peer_that_fails_is_told(memory_profile: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"parameters": 1, "state_bytes": 2, "state_on_disk_bytes": 0, "peak_growth_bytes": 3}

    def in_own_process(_: Any, subject: str, *__: int) -> dict[str, Any] | str:
        return "OSError: no CPU kernel" if subject.startswith("torchao") else figures

    monkeypatch.setattr(memory_profile, "in_own_process", in_own_process)
    monkeypatch.setattr(memory_profile, "peer_versions", lambda: {"torchao": "1.2.3"})
    result = memory_profile.measure(memory_profile.parse_arguments(["--quick"]))
    assert result["not_measured"]["torchao AdamW8bit"] == "OSError: no CPU kernel"
    assert {row["subject"] for row in result["rows"]} == {
        "torch AdamW",
        "optim8 AdamW8bit",
        "optim8 AdamW8bit, paged",
    }
    monkeypatch.setattr(memory_profile, "in_own_process", lambda *_: "Killed")
    with pytest.raises(RuntimeError, match="torch AdamW, 1 layers of 1024: Killed"):
        memory_profile.measure(memory_profile.parse_arguments(["--quick"]))


def test_the_cost_of_watching(tmp_path: Path) -> None:
    done = run("bench_monitoring.py", "--quick", "--json", tmp_path / "b.json")
    assert done.returncode == 0, done.stderr
    result = read(tmp_path / "b.json")
    (training,) = result["trainings"]
    assert training["tokens"] == 2 * 32
    assert set(training["costs"]) == {"memory.profile (allocations)", "memory.profile (rss)", "monitor (every=100)"}
    for name, found in training["costs"].items():
        assert f"| {name} " in done.stdout
        assert found["lower"] <= found["cost"] <= found["upper"]
    assert result["short_step"]["alone"]["repeats"] == result["short_step"]["rss"]["repeats"] >= 3


def test_a_cost_is_work_over_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import bench_monitoring as module

    # 1 ms in each step and 40 ms in each block of 20 steps, of steps of 100 ms; medians, so one outlier is none.
    found = module.interval([0.001] * 9 + [5.0], [0.1] * 20, [0.04] * 3, 1)
    assert found["ms"] == pytest.approx(3.0)
    assert found["cost"] == found["lower"] == pytest.approx(0.03)
    spread_out = module.interval([0.001, 0.002, 0.003] * 5, [0.1] * 20, [], 1 / 100)
    assert spread_out["cost"] == pytest.approx(0.0002)
    assert spread_out["lower"] < spread_out["cost"] < spread_out["upper"]
    alone, ends = module.long_steps(module.Training(1, 16, 8, 1), 2, 1)
    assert len(alone) == 2
    assert {key: len(values) for key, values in ends.items()} == {"allocations": 1, "rss": 1}


def test_planned_activations_are_within_the_goal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import activations

    import optim8

    recorded = read(EXPERIMENTS / "results" / "activations.json")
    assert [row["training"] for row in recorded["rows"]] == [*activations.TRAININGS]
    for row in recorded["rows"]:
        assert abs(row["planned_bytes"] / row["measured_bytes"] - 1) < recorded["goal"], row
        model, loss = activations.TRAININGS[row["training"]]()
        planned = optim8.memory.plan(model, loss=loss, beside=False)
        if recorded["torch"] == torch.__version__:  # another may save other tensors
            assert planned.total == row["planned_bytes"]  # the plan says today what the document shows
            assert planned.bytes["activations"] == row["planned_activation_bytes"]
    assert "missed" not in activations.render(recorded)
    recorded["rows"][0]["measured_bytes"] *= 2
    assert "0.500, missed" in activations.render(recorded)


def test_activations_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import activations

    monkeypatch.setitem(activations.TRAININGS, "small", lambda: activations.gpt(1, 64, 16, 2, checkpointed=True))
    gc.collect()
    row = activations.measure_one("small")
    assert abs(row["planned_bytes"] / row["measured_bytes"] - 1) < 0.05
