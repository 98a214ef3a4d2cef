"""The experiments run, in small; a resumed training ends with the same bits; the documents quote what was measured."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from experiments_harness import EXPERIMENTS, read, run

import optim8

# Every matrix has at least 4096 entries, so all but the norms' gains gets 8-bit state. Eight steps: the checkpoint
# lies between two evaluations.
TINY = ["--steps=8", "--batch=2", "--layers=1", "--heads=2", "--width=64", "--context=64", "--threads=1"]
TEXT = "".join(f"{n} times {n} is {n * n}.\n" for n in range(400))


def hidden(folder: Path) -> list[Path]:
    """What an interrupted atomic write would leave behind."""
    return list(folder.glob(".*"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a training that takes a moment."""
    text = tmp_path_factory.mktemp("text") / "squares.txt"
    text.write_text(TEXT)
    return [*TINY, f"--text={text}"]


@pytest.fixture(scope="module")
def trained(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and output of a whole run."""
    out = tmp_path_factory.mktemp("trained")
    done = run("train_lm.py", *tiny, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_training_writes_table_pictures_logs_and_figures(trained: tuple[Path, str]) -> None:
    out, printed = trained
    runs = read(out / "result.json")["runs"]
    assert list(runs) == ["adamw", "adamw8bit", "lion8bit"]
    for name, figures in runs.items():
        assert figures["label"] in printed
        assert figures["validation_curve"][-1][0] == 8
        assert figures["step"]["repeats"] == 8
        assert figures["peak_memory_bytes"] > figures["memory_before_bytes"] > 0
        assert list((out / "tensorboard" / name).glob("events*"))
    for picture in ("loss.png", "memory.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert not hidden(out)


def test_training_measures_state(trained: tuple[Path, str]) -> None:
    runs = read(trained[0] / "result.json")["runs"]
    sizes = [3 * 64 * 64, 64 * 64, 4 * 64 * 64, 4 * 64 * 64, 256 * 64, 64 * 64]
    small, count = 3 * 64, len(sizes) + 3
    assert runs["adamw"]["parameters"] == sum(sizes) + small
    steps = 4 * count  # a float32 counter for every tensor
    assert runs["adamw"]["state_bytes"] == 8 * (sum(sizes) + small) + steps
    assert runs["adamw8bit"]["state_bytes"] == 2 * sum(n + n // 256 * 4 for n in sizes) + 8 * small + steps
    assert runs["lion8bit"]["state_bytes"] == sum(n + n // 256 * 4 for n in sizes) + 4 * small + steps


def test_resumed_training_ends_with_the_same_bits(tiny: list[str], trained: tuple[Path, str], tmp_path: Path) -> None:
    names = ["adamw", "adamw8bit", "lion8bit"]
    mark = 123.0
    for name in names:
        checkpoint = torch.load(trained[0] / f"{name}.checkpoint.pt", weights_only=True)
        assert checkpoint["progress"]["step"] == 4
        checkpoint["progress"]["losses"][0] = mark  # shows in the curve only if the run did not start again
        torch.save(checkpoint, tmp_path / f"{name}.checkpoint.pt")
    done = run("train_lm.py", *tiny, "--resume", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    actual, expected = read(tmp_path / "result.json")["runs"], read(trained[0] / "result.json")["runs"]
    for name in names:
        assert actual[name]["training_curve"][0][1] == mark
        assert actual[name]["training_curve"][1:] == expected[name]["training_curve"][1:]
        assert actual[name]["validation_curve"] == expected[name]["validation_curve"]
        assert actual[name]["parameters_sha256"] == expected[name]["parameters_sha256"]
    assert len({run["parameters_sha256"] for run in actual.values()}) == len(names)


def test_resume_refuses_other_settings(tiny: list[str], trained: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copy(trained[0] / "adamw.checkpoint.pt", tmp_path)
    done = run("train_lm.py", *tiny, "--optimizers", "adamw", "--seed", 1, "--resume", "--out", tmp_path)
    assert done.returncode != 0
    assert "seed=0 there and 1 here" in done.stderr
    assert not (tmp_path / "result.json").exists()


def test_interrupted_training_leaves_no_half_written_file(tiny: list[str], tmp_path: Path) -> None:
    arguments = [*tiny, "--steps", "1000000", "--optimizers", "adamw", "--out", str(tmp_path)]
    command = [sys.executable, str(EXPERIMENTS / "train_lm.py"), *arguments]
    # What runs in the background of a shell ignores SIGINT, and so would all that it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    finally:
        signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("tensorboard/adamw/events*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: to the script and the process that trains
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in errors
    assert [path.name for path in tmp_path.iterdir()] == ["tensorboard"]


def test_training_refuses_text_that_is_too_short(tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_bytes(b"x" * 600)
    done = run("train_lm.py", *TINY, "--text", text, "--out", tmp_path / "out")
    assert done.returncode != 0
    assert "must be longer than the context of 64 bytes, got 60 of 600 bytes" in done.stderr


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    from shared.common import atomic_path, write_json

    path = tmp_path / "result.json"
    write_json(path, {"old": 1})

    def fail_half_way() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half of the ne")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail_half_way()
    assert read(path) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the result of a quick benchmark."""
    folder = tmp_path_factory.mktemp("results")
    few = ["--threads", 1, "--repeats", 3, "--dtypes", "float32", "--no-peers"]
    done = run("bench_step.py", "--quick", *few, "--json", folder / "bench_step.json")
    assert done.returncode == 0, done.stderr
    return folder


def test_benchmark_counts_bytes_and_ratios(benchmark: Path) -> None:
    rows = read(benchmark / "bench_step.json")["timings"]
    table = {(row["case"], row["subject"]): row for row in rows}
    # Parameters and state are read and written, gradients read: 4 bytes each, codes 1 byte, absmax 4 bytes per 256.
    traffic = [
        ("one tensor of 256 Ki", "torch AdamW fused", 28),
        ("one tensor of 256 Ki", "optim8 AdamW8bit", 12 + 4 + 16 / 256),
        ("one tensor of 256 Ki", "optim8 Lion8bit", 12 + 2 + 8 / 256),
        ("64 tensors of 1024", "optim8 AdamW8bit", 28),
        ("64 tensors of 1024", "optim8 AdamW8bit min_8bit_size=0", 12 + 4 + 16 / 256),
    ]
    for case, subject, expected in traffic:
        assert table[case, subject]["bytes_per_parameter"] == pytest.approx(expected), (case, subject)
    for (case, _), row in table.items():
        reference = table[case, "torch AdamW fused"]
        assert row["speed_ratio"] == pytest.approx(reference["median_ms"] / row["median_ms"])
        assert row["parameters"] == reference["parameters"]
        assert row["lower_quartile_ms"] <= row["median_ms"] <= row["upper_quartile_ms"]
    assert {row["parameters"] for row in rows} == {2**18, 2**16}


def test_the_products_of_muon_are_told_from_its_step(tmp_path: Path) -> None:
    done = run("muon_share.py", "--quick", "--repeats", 3, "--json", tmp_path / "result.json")
    assert done.returncode == 0, done.stderr
    rows = read(tmp_path / "result.json")["shares"]
    assert [row["dtype"] for row in rows] == ["float32", "bfloat16"]
    for row in rows:
        assert row["in_matrices"] < row["parameters"] == 2**18
        assert 0 < row["share_outside"] < 1
        assert row["products"]["upper_quartile_ms"] < row["step"]["upper_quartile_ms"]
        assert f"| {row['case']}, {row['dtype']} " in done.stdout


def test_builds_are_compared_in_one_run(tmp_path: Path) -> None:
    """A build with itself: every step is timed for both, and a first step too."""
    itself = Path(optim8.__file__).parents[1]
    done = run(
        "compare_builds.py", itself, "--quick", "--repeats", 1, "--processes", 2, "--json", tmp_path / "result.json"
    )
    assert done.returncode == 0, done.stderr
    rows = read(tmp_path / "result.json")["timings"]
    assert sum("first step" in row["subject"] for row in rows) == len({row["threads"] for row in rows})
    for row in rows:
        assert row["ratio"] == pytest.approx(row["before"]["median_ms"] / row["after"]["median_ms"])
        assert row["before"]["repeats"] == row["after"]["repeats"] == 2


def test_a_build_that_is_not_there_is_told(tmp_path: Path) -> None:
    done = run("compare_builds.py", tmp_path, "--quick", "--repeats", 1, "--json", tmp_path / "result.json")
    assert done.returncode != 0
    assert "no optim8" in done.stderr
    assert not (tmp_path / "result.json").exists()


def test_report_finds_a_wrong_number_and_mends_it(
    benchmark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import report

    document = tmp_path / "document.md"

    def check(*options: str) -> int:
        monkeypatch.setattr("sys.argv", ["report.py", *options, f"--results={benchmark}", str(document)])
        return report.main()

    document.write_text("before\n<!-- table:bench_step -->\n1.23\n<!-- /table -->\nafter\n")
    assert check("--check") == 1
    assert "1.23" in document.read_text()
    assert check() == 0
    mended = document.read_text()
    assert mended.startswith("before\n<!-- table:bench_step -->\n| case")
    assert mended.endswith("<!-- /table -->\nafter\n")
    assert check("--check") == 0
    document.write_text(mended.replace("GB/s", "MB/s", 1))
    assert check("--check") == 1


def test_documents_quote_what_was_measured() -> None:
    done = run("report.py", "--check")
    assert done.returncode == 0, done.stderr


def test_roofline_relates_kernels_to_the_limit(tmp_path: Path) -> None:
    done = run("roofline.py", "--quick", "--repeats", 3, "--json", tmp_path / "r.json", "--png", tmp_path / "r.png")
    assert done.returncode == 0, done.stderr
    for measured in read(tmp_path / "r.json")["measured"]:
        limit = max(measured["limits"].values())
        assert {row["dtype"] for row in measured["kernels"]} == {"float32", "bfloat16"}
        for row in measured["kernels"]:
            assert row["share_of_limit"] == pytest.approx(row["bytes_per_second"] / limit)
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
