"""`python -m optim8 run`: the program sees what it would see without it."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from integrations_harness import REPORT, last_json, python
from support.processes import child_environment
from support.stand_in import write_package

import optim8
from optim8.__main__ import main
from optim8.integrations import nemo, ranks, timm, transformers

# Arguments that a parser of ours would take for its own.
HOSTILE = ["--", "-h", "--as", "x", "--version", "-m", "run", ""]


@pytest.fixture
def no_shims(monkeypatch: pytest.MonkeyPatch) -> None:
    """For programs that run in this process: what is changed in frameworks would stay for the tests after it."""
    for shim in (nemo, ranks, timm, transformers):
        monkeypatch.setattr(shim, "after_import", lambda name, action: None)


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A script, modules in packages, a folder, a zip file and a link, in a folder with a space in its name."""
    folder = tmp_path / "my programs"
    for path in ("script.py", "package/module.py", "package/__init__.py", "folder/__main__.py", "tool/__main__.py"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("" if path.endswith("__init__.py") else REPORT)
    with zipfile.ZipFile(folder / "program.zip", "w") as archive:
        archive.writestr("__main__.py", REPORT)
    (folder / "links").mkdir()
    (folder / "links" / "link.py").symlink_to(folder / "script.py")
    return folder


PROGRAMS = [
    ["script.py"],
    ["package/module.py"],
    ["links/link.py"],
    ["folder"],
    ["program.zip"],
    ["-m", "package.module"],
    ["-m", "tool"],
]


@pytest.mark.usefixtures("no_shims")
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: " ".join(program))
def test_the_program_sees_what_python_would_show(
    program: list[str], programs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", child_environment()["PYTHONPATH"])  # which that process has
    expected = last_json(python(*program, *HOSTILE, folder=programs))
    monkeypatch.chdir(programs)
    monkeypatch.setattr(sys, "argv", ["optim8"])
    monkeypatch.setattr(sys, "path", [str(programs), *sys.path])  # as python -m optim8 begins
    before = sys.modules["__main__"]
    assert main(["run", *program, *HOSTILE]) == 0
    actual = json.loads(capsys.readouterr().out)
    if "-m" not in program:
        # runpy has one path for the program and for sys.argv[0]: the whole one, which __file__ is in Python too.
        expected["argv"][0] = str(programs / program[0])
    assert actual == expected
    assert actual["argv"][1:] == HOSTILE
    assert sys.modules["__main__"] is before


def test_the_program_of_a_process_of_its_own(programs: Path) -> None:
    """The environment too is what the program would see."""
    plain, actual = (last_json(python(*start, "script.py", folder=programs)) for start in ([], ["-m", "optim8", "run"]))
    assert actual == {**plain, "argv": [str(programs / "script.py")]}


# A program that trains, in each process that a launcher of ranks starts.
RANK = """
import os, sys
import bitsandbytes, torch
weight = torch.nn.Parameter(torch.ones(5000))
optimizer = bitsandbytes.optim.AdamW8bit([weight], lr=float(sys.argv[sys.argv.index("--lr") + 1]))
weight.sum().backward()
optimizer.step()
print(os.environ.get("LOCAL_RANK"), type(optimizer).__module__, optimizer.precision(weight), float(weight[0]) < 1)
"""


@pytest.mark.parametrize("launcher", ["torch.distributed.run --nproc-per-node=2", "accelerate.commands.launch --cpu"])
def test_under_launchers_of_ranks(launcher: str, tmp_path: Path) -> None:
    if launcher.startswith("accelerate"):
        pytest.importorskip("accelerate")
    (tmp_path / "train.py").write_text(RANK)
    start = [*launcher.split(), "-m", "optim8", "run", "--as", "bitsandbytes", "train.py", "--lr", "0.1"]
    completed = python("-m", *start, folder=tmp_path, OMP_NUM_THREADS="1")
    assert completed.returncode == 0, completed.stderr
    said = sorted(completed.stdout.split("\n")[:-1])
    assert [line.split(" ", 1)[1] for line in said] == ["optim8.optim.adam 8bit True"] * len(said)
    assert len(said) == (2 if launcher.startswith("torch") else 1)
    assert completed.stderr.count("gives the optimizers and the functional API of optim8") == 1


# A program for which Lightning starts a second rank itself.
LIGHTNING = """
import os, sys
import bitsandbytes, pytorch_lightning as pl, torch

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(96, 96)
    def training_step(self, batch, _):
        return self.layer(batch[0]).square().mean()
    def configure_optimizers(self):
        return bitsandbytes.optim.AdamW8bit(self.parameters(), lr=0.1)

data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(8, 96)), batch_size=2)
quiet = dict.fromkeys(["logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"], False)
trainer = pl.Trainer(strategy="ddp", accelerator="cpu", devices=2, max_epochs=1, **quiet)
trainer.fit(Module(), data)
with open(f"rank-{trainer.global_rank}", "w") as file:
    file.write(f"{type(trainer.optimizers[0]).__module__} {sys.argv[1:]}")
"""


@pytest.mark.slow
def test_ranks_that_lightning_starts(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_lightning")
    (write_package(tmp_path) / "train.py").write_text(LIGHTNING)
    start = ["-m", "optim8", "run", "--as", "bitsandbytes", "train.py", "--", "-h"]
    completed = python(*start, folder=tmp_path, OMP_NUM_THREADS="1")
    assert completed.returncode == 0, completed.stderr
    found = [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)]
    assert found == [f"{optim8.AdamW8bit.__module__} ['--', '-h']"] * 2


def test_a_lightning_that_starts_ranks_in_another_way_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    ranks._patch([], ModuleType("subprocess_script"))
    assert "starts further ranks without optim8. Start them with torchrun -m optim8 run." in capsys.readouterr().err


@pytest.mark.parametrize("command", [["python", "/x/train.py", "--lr"], ["python", "-m", "train", "--lr"]])
def test_the_command_of_a_rank(command: list[str]) -> None:
    module = ModuleType("subprocess_script")
    module._basic_subprocess_cmd = lambda: command  # type: ignore[attr-defined]
    module._hydra_subprocess_cmd = lambda local_rank: (command, "/there")  # type: ignore[attr-defined]
    ranks._patch(["--as", "bitsandbytes"], module)
    expected = ["python", "-m", "optim8", "run", "--as", "bitsandbytes", *command[1:]]
    assert module._basic_subprocess_cmd() == expected
    assert module._hydra_subprocess_cmd(local_rank=1) == (expected, "/there")


# What a process of multiprocessing finds under the name, for each way to start one.
CHILDREN = """
import multiprocessing, sys

def found(queue):
    from bitsandbytes.optim import AdamW8bit
    queue.put(AdamW8bit.__module__)

if len(sys.argv) > 1:
    from optim8.integrations import bitsandbytes as stand_in
    stand_in.install()
if __name__ == "__main__":
    import json
    answers = {}
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        process = context.Process(target=found, args=(queue,))
        process.start()
        answers[method] = queue.get(timeout=120)
        process.join()
    print(json.dumps(answers))
"""


def test_children(tmp_path: Path) -> None:
    """A forked one has the shims; a spawned one has those that the main module installs itself."""
    (write_package(tmp_path) / "program.py").write_text(CHILDREN)
    run = ["-m", "optim8", "run", "--as", "bitsandbytes", "program.py"]
    ours = optim8.AdamW8bit.__module__
    assert last_json(python(*run, folder=tmp_path)) == {"fork": ours, "spawn": "bitsandbytes.optim"}
    assert last_json(python(*run, "itself", folder=tmp_path)) == {"fork": ours, "spawn": ours}


@pytest.mark.usefixtures("no_shims")
@pytest.mark.parametrize(
    "code, ends_with", [("raise SystemExit(3)", 3), ("import sys\nsys.exit('no data')", "no data"), ("1 / 0", None)]
)
def test_how_the_program_ends(code: str, ends_with: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["optim8"])
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    (tmp_path / "program.py").write_text(code)
    with pytest.raises(ZeroDivisionError if ends_with is None else SystemExit) as caught:
        main(["run", str(tmp_path / "program.py")])
    assert ends_with is None or caught.value.args == (ends_with,)


def test_what_is_no_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "nothing.py"]) == 2
    assert "there is no nothing.py. Name a file" in capsys.readouterr().err
    for arguments in (["run"], ["run", "-m"], ["run", "--as", "numpy", "x.py"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.args == (2,)
