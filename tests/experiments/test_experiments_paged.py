"""The experiment on paged state: it runs, and its shares are those of its times."""

import statistics
from pathlib import Path

import pytest
from experiments_harness import read, run


def test_steps_are_compared_with_the_fastest_plain_calls(tmp_path: Path) -> None:
    paths = ["--json", tmp_path / "p.json", "--png", tmp_path / "p.png", "--directory", tmp_path]
    done = run("paged.py", "--quick", "--proof", *paths)
    assert done.returncode == 0, done.stderr
    result = read(tmp_path / "p.json")
    state = 2 * (12_000_000 + 12_000_000 // 256 * 4) + 4
    assert result["tiers"] == {
        "resident": {"host": state},
        "paged": {"disk": state},
        "paged, 16MiB": {"disk": state},
    }
    assert result["page_cache"][0]["ratio"] == 1
    disk = result["disk"]
    medians = {name: statistics.median(seconds) for name, seconds in disk["plain_seconds"].items()}
    assert "past the page cache, beside arithmetic" in done.stdout
    del medians["past the page cache, beside arithmetic"]  # shows what limits a step; nothing is compared with it
    assert len(medians) == 3
    assert disk["fastest"] == min(medians, key=lambda name: medians[name])
    assert disk["share"] == pytest.approx(min(medians.values()) / statistics.median(disk["step_seconds"]))
    assert disk["bytes"] > 2 * state
    assert len(disk["past_page_cache"]) == len(disk["step_seconds"]) == 1
    proof = result["proof"]
    assert (proof["resident"], proof["same_bits"]) == ("cannot be allocated", True)
    assert proof["state"] > proof["data_limit"]
    assert proof["peak"] <= 1.1 * proof["may_have"]
    assert "state cannot be allocated" in done.stdout
    assert f"{disk['step_bandwidth'] / 1e6:.0f} MB/s" in done.stdout
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir() if path.suffix not in (".json", ".png")] == []
