"""The experiments on errors of the state: they run, and count what they say they count."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from experiments_harness import EXPERIMENTS, read, run

import optim8
from optim8 import functional


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))


@pytest.fixture
def small_gradients(scripts: None, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    import small_gradients as module

    monkeypatch.setattr(module, "SHAPE", (64, 64))  # 4096 values: the least that all keep in 8 bits
    return module


def test_quantization_error_ranks_the_codes(tmp_path: Path) -> None:
    text = tmp_path / "squares.txt"
    text.write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(400)))
    paths = ["--json", tmp_path / "q.json", "--png", tmp_path / "q.png", "--text", text]
    done = run("quantization_error.py", "--quick", "--seeds", 1, *paths)
    assert done.returncode == 0, done.stderr
    rows = {(row["code"], row["blocksize"]): row for row in read(tmp_path / "q.json")["rows"]}
    sizes = [None, 64, 128, 256, 512, 1024, 2048, 4096]
    expected = {(code, size) for code in ("linear", "quantile", "dynamic") for size in sizes}
    assert set(rows) == {*expected, ("optim8 AdamW8bit", 256)}
    for key in ("exp_avg", "exp_avg_sq"):
        # Blocks of 64 divide those of 4096 and the tensor: absmax, and with it every step of a code, can only shrink.
        assert 0 < rows["linear", 64][key][0] < rows["linear", 4096][key][0] <= rows["linear", None][key][0]
    # A second moment that becomes 0 makes the update 1e8 times too large at most; the dynamic code has few of them.
    assert rows["dynamic", 256]["update"][0] < rows["linear", 256]["update"][0]
    # Dithered, a value is off by 2 x (1 - x) of a cell in the mean, 1/3 where x is even; to the nearest, by 1/4.
    ratio = rows["optim8 AdamW8bit", 256]["exp_avg"][0] / rows["dynamic", 256]["exp_avg"][0]
    assert ratio == pytest.approx(4 / 3, rel=0.05)
    assert (tmp_path / "q.png").read_bytes().startswith(b"\x89PNG")


def test_state_is_stored_as_a_step_stores_it(scripts: None) -> None:
    from shared.schemes import round_trip_of_state

    parameter = torch.nn.Parameter(torch.zeros(20, 256))
    parameter.grad = torch.randn(20, 256, generator=torch.Generator().manual_seed(0))
    optimizer = optim8.AdamW8bit([parameter], min_8bit_size=0)
    optimizer.step()
    state = optimizer.state[parameter]

    def stored(stem: str, signed: bool) -> torch.Tensor:
        codes, absmax, code = state[f"{stem}_codes"], state[f"{stem}_absmax"], functional.create_dynamic_map(signed)
        return functional.dequantize_blockwise(codes, absmax=absmax, code=code, blocksize=256)

    expected = {"exp_avg": stored("exp_avg", True), "exp_avg_sq": stored("exp_avg_sq_root", False).square()}
    found = round_trip_of_state({"exp_avg": 0.1 * parameter.grad, "exp_avg_sq": 0.001 * parameter.grad**2})
    for key, values in expected.items():
        # The same codes but where a rounding of these products takes a value across the boundary between two.
        differs = (found[key] - values).abs() > 1e-5 * values.abs()
        assert differs.float().mean() < 0.01, key


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("size", [1, 62, 63, 64, 4096])
def test_tensor_wise_is_one_block(scripts: None, signed: bool, size: int) -> None:
    from shared.schemes import round_trip

    x = torch.randn(size, generator=torch.Generator().manual_seed(size)) ** 3
    x = x if signed else x.abs()
    code = functional.create_dynamic_map(signed)
    assert torch.equal(round_trip(x, code, None), round_trip(x, code, 4096))


def test_quantile_code_is_used_evenly(scripts: None) -> None:
    from shared.schemes import quantile_code

    x = torch.randn(2**16, generator=torch.Generator().manual_seed(0)) ** 3
    codes, _ = functional.quantize_blockwise(x, code=quantile_code(x, 4096), blocksize=4096)
    used = torch.bincount(codes.long(), minlength=256)
    # 257 quantiles hold 256 values each, and a boundary between two codes lies within those of its neighbours.
    assert used.sum() == 2**16
    assert used.min() > 0
    assert used.max() <= 3 * 256


def test_update_is_adams(scripts: None) -> None:
    from quantization_error import errors, update

    parameter = torch.nn.Parameter(torch.zeros(100, dtype=torch.float64))
    optimizer = torch.optim.AdamW([parameter], lr=1.0)
    for seed in range(3):
        parameter.data.zero_()
        parameter.grad = torch.randn(100, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        optimizer.step()
    moments = {name: optimizer.state[parameter][name] for name in ("exp_avg", "exp_avg_sq")}
    torch.testing.assert_close(update(moments, 3), -parameter.detach(), rtol=1e-12, atol=0)
    assert errors(moments, moments, 3) == {"exp_avg": 0.0, "exp_avg_sq": 0.0, "update": 0.0}
    doubled = {**moments, "exp_avg": 2 * moments["exp_avg"]}
    assert errors(moments, doubled, 3) == pytest.approx({"exp_avg": 1.0, "exp_avg_sq": 0.0, "update": 1.0})


def test_small_gradients_of_optim8_do_not_depend_on_the_scale(tmp_path: Path) -> None:
    paths = ["--json", tmp_path / "s.json", "--png", tmp_path / "s.png"]
    done = run("small_gradients.py", "--quick", "--no-peers", "--steps", 5, *paths)
    assert done.returncode == 0, done.stderr
    assert "not measured" in done.stdout
    assert "Not measured: torchao (left out of this run)." in done.stdout
    rows = {(row["case"], row["subject"], row["scale"]): row for row in read(tmp_path / "s.json")["rows"]}
    assert len(rows) == 3 * 2 * 2
    for (case, subject, scale), row in rows.items():
        if subject == "torch AdamW":
            # Five steps in float32, some ten roundings each of 6e-8.
            assert row["norm_ratio"] == pytest.approx(1, abs=1e-5), (case, scale)
        elif case == "gradients alike, eps 1e-15" and scale == 1e-3:
            # At 1e-12 eps is a thousandth of a gradient, in the exact update as well.
            other = rows[case, subject, 1e-12]
            assert row["norm_ratio"] == pytest.approx(other["norm_ratio"], rel=1e-3), case
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_ratio_of_updates(small_gradients: ModuleType) -> None:
    exact = torch.linspace(1, 2, 101, dtype=torch.float64)
    found = small_gradients.compare(2 * exact, exact)
    assert found == pytest.approx({"norm_ratio": 2, "lower": 2, "median": 2, "upper": 2, "not_finite": 0})
    broken = exact.clone()
    broken[3:5] = float("nan")
    found = small_gradients.compare(broken, exact)
    assert found == {"norm_ratio": None, "lower": None, "median": None, "upper": None, "not_finite": 2}
    assert small_gradients.cell({**found}) == "2 not finite"
    assert small_gradients.cell(None) == "not measured"


def test_a_peer_that_fails_is_told(small_gradients: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> torch.optim.Optimizer:
        raise RuntimeError("no kernel for this\nand more")

    monkeypatch.setattr(small_gradients, "peer_subjects", lambda: {"torchao AdamW8bit": failing})
    monkeypatch.setattr(small_gradients, "CASES", small_gradients.CASES[:1])
    result = small_gradients.measure(small_gradients.parse_arguments(["--quick", "--steps", "2"]))
    assert result["not_measured"]["torchao AdamW8bit"] == "RuntimeError: no kernel for this"
    assert {row["subject"] for row in result["rows"]} == {"torch AdamW", "optim8 AdamW8bit"}
