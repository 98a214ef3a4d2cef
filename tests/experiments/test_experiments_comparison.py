"""What the README compares: bytes as the planner counts them, and speeds from the results that hold them."""

from __future__ import annotations

import math
import re
from types import ModuleType

import pytest
from experiments_harness import EXPERIMENTS, read

import optim8

RESULTS = EXPERIMENTS / "results"


@pytest.fixture
def comparison(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import comparison as module

    return module


def cells(table: str) -> dict[str, list[str]]:
    """The rows of a Markdown table by what stands first in them."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows}


def test_memory_of_models_is_what_the_planner_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import memory_models

    recorded = read(RESULTS / "memory_models.json")
    assert recorded["measured"] is False
    assert memory_models.count() == recorded["rows"]  # the plan says today what the picture shows
    llama = optim8.memory.plan(memory_models.MODELS["Llama 3 8B"], dtype="bfloat16", beside=False)
    shown = cells(memory_models.render(recorded))
    column = shown["model"].index("optim8 AdamW8bit, bfloat16")
    assert shown["Llama 3 8B"][column] == f"{llama.tiers['device'] / 2**30:.1f}"
    assert "not measured" in memory_models.render(recorded)


def test_the_choice_for_a_gpu_is_the_planners(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import memory_choices

    recorded = read(RESULTS / "memory_choices.json")
    assert recorded["measured"] is False
    assert memory_choices.count_bytes() == recorded["bytes"]
    assert memory_choices.choose() == recorded["rows"]
    room = 1 - memory_choices.ROOM
    for row in recorded["rows"]:
        assert row["choice"] is None or row["gpu_bytes"] <= room * row["gpu_gib"] * 2**30, row
    in_bfloat16, in_float32, _ = memory_choices.render(recorded).split("\n\n")
    config = memory_choices.MODELS["Llama 3 8B"]
    planned = optim8.memory.plan(config, dtype="bfloat16", master_bits=24, beside=False)
    column = cells(in_bfloat16)["weights and gradients in bfloat16"].index("80 GiB")
    shown = cells(in_bfloat16)["Llama 3 8B, 8.03 B"][column]
    assert shown == f"weights 24, state 8: {planned.tiers['device'] / 2**30:.1f}"
    planned = optim8.memory.plan(config, sharding="fsdp", world_size=4, dtype="float32", beside=False)
    shown = cells(in_float32)["Llama 3 8B, 8.03 B"][column - 1]
    assert shown == f"4 GPUs: {planned.tiers['device'] / 2**30:.1f} each"
    wide = optim8.memory.plan(config, dtype="bfloat16", optim_bits=16, master_bits=32, beside=False)
    of_bytes = cells(memory_choices.render_bytes(recorded))
    column = of_bytes["bytes a parameter on the GPU"].index("AdamW8bit, 16-bit state")
    assert of_bytes["bfloat16, `master_bits=32`"][column] == f"{wide.tiers['device'] / wide.size:.2f}"


def test_published_figures_stand_beside_what_the_planner_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")  # it knows the shapes of T5
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import published

    recorded = read(RESULTS / "published.json")
    assert recorded["measured"] is False
    assert published.count() == recorded["settings"]  # the plan says today what the table shows
    assert sum(map(math.prod, published.vit_huge(45)["parameters"].values())) == 630_822_445  # as timm 1.0.31 has it
    peaks = [setting for setting in recorded["settings"] if setting["of"] == "peak"]
    assert len(peaks) == 2
    for setting in recorded["settings"]:
        assert re.search(
            r"/blob/[0-9a-f]{40}/|arxiv\.org/abs/[0-9.]+v[0-9]+$", setting["source"]
        )  # it stays what it was
        planned = {row["optimizer"]: published.in_unit(setting, row) for row in setting["rows"]}
        assert planned["optim8 AdamW8bit"] is not None
        for row in setting["rows"]:
            if setting in peaks and row["printed"] and planned[row["optimizer"]]:
                assert planned[row["optimizer"]] < row["printed"]  # a peak has activations too
    shown = cells(published.render(recorded))
    assert shown["8bit BNB"][0] == "6"
    assert shown["FlashAdamW"] == ["7", "7.13", "-0.13"]  # two float16 scales for each 32 values more


def test_peers_stand_beside_each_other_with_their_versions(comparison: ModuleType) -> None:
    names = ("memory_profile", "bench_step-peers", "bench_step-avx2", "small_gradients", "long_run", "bf16_movement")
    memory, step, avx2, gradients, *moved = (read(RESULTS / f"{name}.json") for name in names)
    table = cells(comparison.peers(memory, step, avx2, gradients, *moved))
    versions = memory["peers"]
    assert [name.split(" AdamW")[0] for name in table["on a CPU, float32 parameters"]] == [
        "torch",
        "optim8",
        *(f"{library} {versions[library]}" for library in ("bitsandbytes", "torchao")),
    ]
    largest = max(row["parameters"] for row in memory["rows"])
    for place, subject in enumerate(comparison.ADAMW):
        (row,) = [r for r in memory["rows"] if (r["subject"], r["parameters"]) == (subject, largest)]
        assert table["optimizer state, bytes a parameter"][place] == f"{row['state_bytes'] / largest:.2f}"
    assert table["speed of a step, CPU with AVX2"][2:] == ["not measured"] * 2  # no run has peers with AVX2
    rest = {**gradients, "rows": [row for row in gradients["rows"] if not row["subject"].startswith("torchao")]}
    fewer = cells(comparison.peers(memory, step, avx2, rest, *moved))
    assert fewer["size of the update for gradients of 1e-8, exact is 1"][3] == "not measured"


def test_movements_are_those_of_the_results(comparison: ModuleType) -> None:
    long, bf16 = (read(RESULTS / f"{name}.json") for name in ("long_run", "bf16_movement"))
    labelled = {row[0]: row[1:] for row in comparison._movements(long, bf16)}
    at = long["checkpoints"].index(3000)

    def length(case: str, subject: str, part: str) -> str:
        (row,) = (r for r in long["rows"] if (r["rule"], r["case"], r["subject"]) == ("adamw", case, subject))
        return f"{row['parts'][part]['length'][at]:.2f}"

    subjects = ("optim8 dithered", "bitsandbytes", "torchao")
    steady, small, constant, weights = labelled.values()
    assert steady[1:] == [length("nothing changes", subject, "changed") for subject in subjects]
    assert small[1:] == [length("half have gradients of 1e-3", subject, "changed") for subject in subjects]
    assert constant[1:] == [
        " / ".join(length("blocks of -1, blocks of 1", subject, part) for part in ("changed", "others"))
        for subject in subjects
    ]
    adamw = bf16["rules"]["AdamW"]
    kept = ("torch AdamW", "optim8 AdamW8bit master_bits=24", "bitsandbytes AdamW8bit")
    kept = (*kept, "torchao AdamW8bit bf16_stochastic_round=True")
    assert weights == [f"{adamw[name]['slope'][-1]:.2f} ({adamw[name]['error'][-1]:.2f})" for name in kept]
    less = {**long, "rows": [row for row in long["rows"] if row["subject"] != "torchao"]}
    assert comparison._movements(less, bf16)[1][-1] == "not measured"


def test_steps_are_ratios_of_their_own_run(comparison: ModuleType) -> None:
    best, avx2, peers = (read(RESULTS / f"bench_step{name}.json") for name in ("", "-avx2", "-peers"))
    text = comparison.steps(best, avx2, peers)
    heads = cells(text)["float32 parameters"]
    for result, subject, head in (
        (best, "optim8 AdamW8bit", "optim8 AdamW8bit, AVX-512"),
        (avx2, "optim8 AdamW8bit", "optim8 AdamW8bit, AVX2"),
        (avx2, "optim8 Lion8bit", "optim8 Lion8bit, AVX2"),
        (peers, "torchao AdamW8bit", f"torchao {peers['peers']['torchao']} AdamW8bit"),
    ):
        rows = {(r["case"], r["threads"], r["subject"]): r for r in result["timings"] if r["dtype"] == "float32"}
        torch_row, row = (rows["one tensor of 64 Mi", 2, name] for name in (comparison.REFERENCE, subject))
        expected = f"{torch_row['median_ms'] / row['median_ms']:.2f}"
        assert cells(text)["one tensor of 64 Mi"][heads.index(head)] == expected, (
            head
        )  # of two threads, which come last
