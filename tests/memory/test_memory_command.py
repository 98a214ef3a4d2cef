"""The planner's command line: what it prints, what it ends with, and what it keeps quiet."""

from __future__ import annotations

import argparse
import json
import logging
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from test_memory_configs import LLAMA_8B

import optim8
from optim8.__main__ import main
from optim8.memory import command


def test_the_command_prints_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_8B))
    arguments = ["plan", str(path), "--dtype=bfloat16", "--budget=24GiB"]
    assert main(arguments) == 1
    printed = capsys.readouterr().out
    for word in ("8,030,261,248 parameters", "torch AdamW", "bitsandbytes AdamW8bit", "torchao AdamW8bit", "absmax"):
        assert word in printed
    assert "left for activations: sharding='fsdp', world_size=2." in printed
    assert main(["plan", str(path), "--dtype=bfloat16", "--budget=40GiB", "--paged"]) == 0
    assert "It fits as planned, if activations, which are not planned, take at most" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert content["bytes"] == optim8.memory.plan(LLAMA_8B, dtype="bfloat16").bytes
    assert content["options"]["as planned"]["fits"] is False


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["--paged", "--host-budget=1GiB"], 2, "Raise host_budget to 15"),
        (["--paged", "--host-budget=20GiB"], 0, "codes (host)"),
        (["--optimizer=pagedadamw8bit", "--host-budget=1GiB", "--device=cpu"], 0, "codes (disk)"),
        (["--paged", "--budget=62GiB"], 0, " host\n"),
        (["--host-budget=1GiB"], 2, "--host-budget is for paged state. Pass --paged too"),
        (["--paged", "--host-budget=1B"], 2, "host_budget must have room for one bucket"),
        (["--paged", "--host-budget=1"], 2, "host_budget must be a number and a unit"),
        (["--budget=24"], 2, "a size needs a unit, got '24'. Write 24GiB"),
    ],
)
def test_the_command_plans_paged_state(
    arguments: list[str], code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_8B))
    assert main(["plan", str(path), *arguments]) == code
    printed = capsys.readouterr()
    assert words in (printed.err if code else printed.out)
    assert bool(printed.out) == (code == 0)


def test_the_exit_status_says_whether_it_fits(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"parameters": {"w": [1000, 1000]}}')
    assert main(["plan", str(path)]) == 0
    for budget, code in (("1GiB", 0), ("9MB", 1), ("1B", 1)):
        assert main(["plan", str(path), f"--budget={budget}"]) == code
        assert main(["plan", str(path), f"--budget={budget}", "--json"]) == code


def test_help_states_every_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    for action in parser._actions:
        if (
            action.option_strings and action.nargs != 0 and action.dest != "budget"
        ):  # without a budget none is looked at
            assert "(default: " in (action.help or ""), action.dest
    for default in ("adamw8bit", "ddp", "1", "4096", "8"):
        assert f"(default: {default})" in text
    assert "1 where the plan does not fit" in text


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"optim8 {optim8.__version__}\n"


def test_warnings_of_other_libraries_are_not_above_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"parameters": 5000}')
    genuine = command.plan

    def warns(*arguments: Any, **options: Any) -> Any:
        warnings.warn("old in torch", FutureWarning, stacklevel=1)
        logging.getLogger("torch").warning("a developer's matter")
        return genuine(*arguments, **options)

    monkeypatch.setattr(command, "plan", warns)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert main(["plan", str(path)]) == 0
        logging.getLogger("torch").warning("heard again")
        warnings.warn("seen again", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["seen again"]
    assert caplog.messages == ["heard again"]
