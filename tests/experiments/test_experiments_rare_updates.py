"""The training of what is rarely updated: it pairs by seed, its tasks are what they say, and its tables tell all."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from experiments_harness import EXPERIMENTS, read, run

import optim8

OURS = ["torch AdamW", "optim8 dithered", "optim8 nearest", "v itself, dithered"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import rare_updates as module

    return module


def test_every_optimizer_is_compared_at_every_rate(tmp_path: Path) -> None:
    paths = ["--json", tmp_path / "r.json", "--png", tmp_path / "r.png"]
    done = run("rare_updates.py", "--quick", "--seeds", 2, "--no-peers", *paths)
    assert done.returncode == 0, done.stderr
    result = read(tmp_path / "r.json")
    assert list(result["tasks"]) == ["embeddings", "experts", "part"]
    for name, task in result["tasks"].items():
        assert [rate["learning_rate"] for rate in task["rates"]] == [0.002, 0.006, 0.018]
        for rate in task["rates"]:
            assert [row["optimizer"] for row in rate["rows"]] == OURS
            exact, *others = rate["rows"]
            for key in ("all", "rare"):
                assert exact[key]["relative_difference"] is None
                losses = [row[key]["losses"] for row in rate["rows"]]
                assert len({tuple(each) for each in losses}) == len(OURS), name  # each rounds in its own way
                assert len(set(losses[0])) == 2  # another seed is another training
                for row in others:
                    differences = [a / b - 1 for a, b in zip(row[key]["losses"], exact[key]["losses"])]
                    found = row[key]["relative_difference"]
                    assert found["mean"] == pytest.approx(sum(differences) / 2, abs=1e-12)
                    # Student's distribution with 1 degree of freedom: 12.706 deviations, over the root of 2.
                    half = 12.706 * abs(differences[0] - differences[1]) / 2
                    assert found["upper"] - found["mean"] == pytest.approx(half, rel=1e-3)
                    # From one start on the same batches, in 8 steps.
                    assert abs(found["mean"]) < 0.02, (name, row)
        assert f"| {name}: the rarer half of the" in done.stdout
    assert "Not measured: bitsandbytes (left out of this run)." in done.stdout
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("root", [True, False])
def test_the_simulation_steps_as_optim8_does_but_for_the_root(script: ModuleType, root: bool) -> None:
    from rarity.subjects import CodedAdamW

    start = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    one, other = (torch.nn.Parameter(start.clone()) for _ in range(2))
    options = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}
    ours = optim8.AdamW8bit([one], min_8bit_size=0, **options)
    simulated = CodedAdamW([other], root=root, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        one.grad = torch.randn(start.shape, generator=generator) * torch.logspace(0, -4, 256)
        other.grad = one.grad.clone()
        ours.step()
        simulated.step()
    state, kept = ours.state[one], simulated.state[other]
    apart = ((one - other).norm() / (one - start).norm()).item()
    assert torch.equal(state["exp_avg_codes"].flatten(), kept[True][0])  # v has no part in m
    assert torch.equal(state["exp_avg_sq_root_codes"].flatten(), kept[False][0]) == root
    # With the root only the last bits of float32 differ; v itself has no codes for gradients of 1e-4 beside those of 1.
    assert apart < 1e-4 if root else apart > 0.01


def test_all_state_is_8_bit(script: ModuleType) -> None:
    from rarity.subjects import subjects
    from rarity.tasks import TASKS, Sizes

    for make_task in TASKS.values():
        model = make_task(Sizes(8)).model()
        for name in OURS[1:3]:
            optimizer = subjects(peers=False)[name](list(model.parameters()), lr=1e-3)
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            for state in optimizer.state.values():
                assert state["exp_avg_sq_root_codes"].dtype == torch.uint8


def test_tokens_have_the_frequencies_of_zipf(script: ModuleType) -> None:
    from rarity.tasks import Words, zipf

    words = Words(64, seed=0)
    _, targets = words.batch(2000, 50, torch.Generator().manual_seed(0))
    counts = torch.bincount(targets.flatten(), minlength=64)
    found = counts.sort(descending=True).values / targets.numel()
    # 100000 draws: the rarest of 64 comes some 330 times, give or take 18, and the order is that of the counts.
    torch.testing.assert_close(found, zipf(64), rtol=0.25, atol=0)
    assert counts[words.rare].sum() / targets.numel() == pytest.approx(zipf(64)[32:].sum().item(), rel=0.05)
    assert counts[words.rare].max() < counts[~words.rare].min() * 1.25


def test_the_same_batches_for_every_optimizer(script: ModuleType) -> None:
    from rarity.tasks import TASKS, Sizes

    for make_task in TASKS.values():
        task = make_task(Sizes(8, vocabulary=64, experts=8, checked=8))
        drawn = []
        for _ in range(2):
            torch.manual_seed(3)
            model, batches = task.model(), torch.Generator().manual_seed(3)
            drawn.append([task.loss(model, step, batches).item() for step in (0, 7)] + list(task.check(model)))
        assert drawn[0] == drawn[1]


def test_the_lower_half_is_frozen_and_thawed(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from rarity.tasks import TASKS, LanguageTask, Sizes

    task = TASKS["part"](Sizes(16, vocabulary=64, checked=8))
    seen: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []

    def prepare(self: LanguageTask, model: Any, step: int) -> None:
        lower = model.lower_half()
        rest = [p for p in model.parameters() if all(p is not other for other in lower)]
        seen.append(tuple([p.detach().clone() for p in part] for part in (lower, rest)))  # type: ignore[arg-type]
        original(self, model, step)

    original = LanguageTask.prepare
    monkeypatch.setattr(LanguageTask, "prepare", prepare)
    script.train(
        task, "optim8", lambda params, **options: optim8.AdamW8bit(params, min_8bit_size=0, **options), 0.01, 0
    )
    moved = [
        [not all(map(torch.equal, before[part], after[part])) for before, after in itertools.pairwise(seen)]
        for part in (0, 1)
    ]
    assert moved[0] == [True] * 8 + [False] * 4 + [True] * 3
    assert moved[1] == [True] * 15
    sizes = [sum(p.numel() for p in part) for part in seen[0]]
    big = TASKS["part"](Sizes(16)).model()
    half = sum(p.numel() for p in big.lower_half()) / sum(p.numel() for p in big.parameters())
    assert 0.4 < half < 0.6
    assert min(sizes) > 0


def losses(value: float, seeds: int = 3) -> list[tuple[float, float]]:
    return [(value + seed, 2 * value + seed) for seed in range(seeds)]


def test_a_loss_that_is_no_number_is_told(script: ModuleType) -> None:
    from rarity.report import cell

    found = script.row("torchao", [(float("nan"), 1.0), (2.0, float("inf")), (3.0, 3.0)], losses(1.0))
    assert found["all"]["losses"] == [None, 2.0, 3.0]
    assert found["all"]["relative_difference"] is None
    assert cell(found["all"]) == "not finite (1 of 3)"


def test_intervals_that_leave_0_out_are_counted(script: ModuleType) -> None:
    from rarity.report import counts_table

    exact = losses(4.0)
    rows = [
        script.row("torch AdamW", exact, exact),
        script.row("optim8 dithered", exact, exact),
        script.row("optim8 nearest", [(1.1 * a, 0.9 * b) for a, b in exact], exact),
        script.row("torchao", [(float("nan"), b) for _, b in exact], exact),
    ]
    task = {"rates": [{"learning_rate": 0.1, "rows": rows}, {"learning_rate": 0.3, "rows": rows[:2]}]}
    lines = counts_table({"tasks": {"experts": task}, "peers": {"torchao": "1.0"}}).splitlines()[2:]
    cells = [[part.strip() for part in line.strip("|").split("|")] for line in lines]
    assert cells == [
        ["optim8 dithered", "0 and 0 of 2", "0.00%", "0 and 0 of 2", "0.00%"],
        ["optim8 nearest", "1 and 0 of 1", "10.00%", "0 and 1 of 1", "10.00%"],
        ["torchao 1.0", "0 and 0 of 1", "1 not finite", "0 and 0 of 1", "0.00%"],
    ]


def test_a_peer_that_fails_is_told(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fail(*_: Any, **__: Any) -> None:
        calls.append(1)
        raise RuntimeError("no kernel for this\nand more")

    makes = {"torch AdamW": torch.optim.AdamW, "torchao": fail}
    monkeypatch.setattr(script, "subjects", lambda peers: makes)
    result = script.measure(script.parse_arguments(["--quick", "--tasks", "experts", "--seeds", "2"]))
    assert result["not_measured"]["torchao"] == "RuntimeError: no kernel for this"
    assert [row["optimizer"] for row in result["tasks"]["experts"]["rates"][0]["rows"]] == ["torch AdamW"]
    assert len(calls) == 1  # it is not tried again


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--tasks", "embeddings,all", "must be among embeddings, experts, part, got all"),
        ("--seeds", "1", "an interval needs at least 2, got 1"),
        ("--steps", "6", "must be a multiple of 4, got 6"),
    ],
)
def test_arguments_that_cannot_be_honoured(
    script: ModuleType, capsys: pytest.CaptureFixture[str], option: str, value: str, message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        script.parse_arguments([option, value])
    assert f"{option}: {message}" in capsys.readouterr().err
