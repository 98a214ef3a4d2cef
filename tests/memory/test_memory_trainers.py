"""`plan --for`: each line is read as its trainer reads it, and the optimizer that it makes has the planned bytes."""

from __future__ import annotations

import importlib
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from test_memory_configs import LLAMA_8B

import optim8
from optim8.__main__ import main
from optim8.memory.planning import trainers
from optim8.memory.planning.planner import OURS

yaml = pytest.importorskip("yaml")  # which the trainers need, and torch does not

MODEL = {"parameters": {"embed.weight": [300, 64], "norm.weight": [64]}}


def command(tmp_path: Path, *arguments: str, config: Any = None) -> int:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MODEL if config is None else config))
    return main(["plan", str(path), "--device=cpu", *arguments])


def of_class_path(text: str) -> tuple[Any, dict[str, Any]]:
    """The optimizer and its options, as torchtune and LightningCLI find them in their configuration."""
    section = yaml.safe_load(text)["optimizer"]
    path = section.pop("_component_", None) or section.pop("class_path")
    options = section.pop("init_args", section)
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name), options


def of_name(name: str, text: str) -> tuple[Any, dict[str, Any]]:
    """The optimizer and its options, as the Trainer makes them with the shim of optim8."""
    training_args = pytest.importorskip("transformers.training_args")
    shim = pytest.importorskip("optim8.integrations.transformers")
    arguments = training_args.TrainingArguments(optim=name, optim_args=text, use_cpu=True)
    cls = shim.optimizer_class(arguments.optim.value)
    return cls, shim.optimizer_arguments(cls, arguments)


def read(trainer: str, text: str) -> tuple[Any, dict[str, Any]]:
    if trainer == "transformers":
        words = shlex.split(text)
        assert words[:5] == ["python", "-m", "optim8", "run", "train.py"]
        return of_name(words[words.index("--optim") + 1], words[words.index("--optim_args") + 1])
    if trainer == "axolotl":
        section = yaml.safe_load(text)
        assert section["plugins"] == ["optim8.integrations.axolotl.Optim8Plugin"]
        return of_name(section["optimizer"], section["optim_args"])
    return of_class_path(text)


@pytest.mark.parametrize(
    "asked",
    [
        ["--optimizer=adamw8bit"],
        ["--optimizer=adamw8bit", "--optim-bits=16", "--min-8bit-size=0"],
        ["--optimizer=pagedadamw8bit", "--optim-bits=32"],
        ["--optimizer=ademamix8bit", "--paged"],
        ["--optimizer=lion8bit", "--dtype=bfloat16", "--master-bits=24"],
    ],
    ids=lambda asked: " ".join(asked),
)
@pytest.mark.parametrize("trainer", sorted(trainers.TRAINERS))
def test_the_line_makes_what_was_planned(
    trainer: str, asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(tmp_path, "--for", trainer, *asked) == 0
    cls, options = read(trainer, capsys.readouterr().out)
    assert command(tmp_path, "--json", *asked) == 0
    planned = json.loads(capsys.readouterr().out)
    dtype = getattr(torch, planned["dtypes"][0])
    weights = [torch.ones(shape, dtype=dtype, requires_grad=True) for shape in MODEL["parameters"].values()]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer = cls(weights, **options)
    optimizer.step()
    measured = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    assert measured == planned["state_bytes"]
    assert ("paged" in planned["optimizer"].lower()) == (cls.always_paged or options.get("paged", False))


def test_names_are_those_of_the_trainer() -> None:
    known = {name.value for name in pytest.importorskip("transformers.training_args").OptimizerNames}
    names = trainers.TRAINERS["transformers"].names
    assert names
    assert set(names.values()) <= known
    assert {name.lower() for name in names} <= set(OURS)


@pytest.mark.parametrize("name", sorted(name for name in OURS if not name.startswith("paged")))
def test_every_optimizer_has_a_line_by_its_path(name: str) -> None:
    planned = optim8.memory.plan({"parameters": {"a": [64, 128]}}, name, beside=False)
    for trainer in ("torchtune", "lightning"):
        assert of_class_path(trainers.configuration(planned, trainer)) == (OURS[name], {})


@pytest.mark.parametrize(
    "budget, options, bytes_a_parameter",
    [
        ("110GiB", {"optim_bits": 32, "master_bits": 32}, 14),
        ("80GiB", {"optim_bits": 16, "master_bits": 32}, 10.05),
        ("65GiB", {"master_bits": 32}, 8.05),
        ("56GiB", {"master_bits": 24}, 7.05),
        ("48GiB", {}, 6.05),
    ],
)
def test_the_most_precise_that_fits_is_chosen(
    budget: str, options: dict[str, int], bytes_a_parameter: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(tmp_path, "--dtype=bfloat16", "--budget", budget, "--for=torchtune", config=LLAMA_8B) == 0
    printed = capsys.readouterr()
    assert of_class_path(printed.out) == (optim8.AdamW8bit, options)
    *refused, chosen = [line for line in printed.err.splitlines() if line.startswith("master_bits=")]
    assert all("does not fit" in line for line in refused)
    assert "does not fit" not in chosen
    needed = float(chosen.split()[2]) * 2**30 / 8_030_261_248
    assert needed == pytest.approx(bytes_a_parameter, abs=0.06)


def test_what_is_asked_for_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--dtype=bfloat16", "--optim-bits=8", "--master-bits=16", "--budget=110GiB", "--for=torchtune"]
    assert command(tmp_path, *asked, config=LLAMA_8B) == 0
    assert of_class_path(capsys.readouterr().out) == (optim8.AdamW8bit, {})


def test_paged_state_comes_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--dtype=bfloat16", "--device=cuda", "--for=lightning"]
    assert command(tmp_path, *asked, "--budget=40GiB", config=LLAMA_8B) == 0
    text = capsys.readouterr().out
    assert of_class_path(text) == (optim8.PagedAdamW8bit, {})
    (callback,) = yaml.safe_load(text)["trainer"]["callbacks"]
    assert callback["class_path"] == "optim8.integrations.lightning.PagedStateCallback"
    assert command(tmp_path, *asked, "--budget=20GiB", config=LLAMA_8B) == 1
    printed = capsys.readouterr()
    assert not printed.out
    assert "None of these fits." in printed.err
    assert "paged=True" in printed.err.splitlines()[-4]


def test_json_has_the_line_and_what_was_tried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--dtype=bfloat16", "--for=torchtune", "--json"]
    assert command(tmp_path, *asked, "--budget=56GiB", config=LLAMA_8B) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["configuration"] == "optimizer:\n  _component_: optim8.AdamW8bit\n  master_bits: 24\n"
    assert [name for name, each in content["options"].items() if each["fits"]] == ["master_bits=24, optim_bits=8"]
    assert content["bytes"] == optim8.memory.plan(LLAMA_8B, dtype="bfloat16", master_bits=24).bytes
    assert command(tmp_path, *asked, "--budget=20GiB", config=LLAMA_8B) == 1
    assert json.loads(capsys.readouterr().out)["configuration"] is None


def test_embeddings_in_32_bits_are_planned_as_they_train() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(300, 64), torch.nn.Linear(64, 300))
    planned = optim8.memory.plan(model, "lion8bit", embeddings_in_32_bits=True, beside=False)
    assert planned.bytes["state32"] > 4 * 300 * 64
    named = {"parameters": {"embed.weight": [300, 64], "1.weight": [300, 64], "1.bias": [300]}}
    assert planned.bytes == optim8.memory.plan(named, "lion8bit", embeddings_in_32_bits=True, device="cpu").bytes
    with optim8.override(model[0], optim_bits=32):
        optimizer = optim8.Lion8bit(model.parameters())
        model(torch.arange(4)).sum().backward()
        optimizer.step()
    measured = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    assert measured == planned.state_bytes


def test_the_trainers_own_rule_for_embeddings_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It holds for bitsandbytes' 8-bit names, not for torchao's, nor where the class is given by its path."""
    for trainer, name, counted in (
        ("transformers", "lion8bit", True),
        ("axolotl", "pagedlion8bit", True),
        ("transformers", "adamw8bit", False),
        ("torchtune", "lion8bit", False),
    ):
        assert command(tmp_path, "--for", trainer, "--optimizer", name, "--json") == 0
        printed = capsys.readouterr()
        assert ("Embeddings have 32-bit state" in printed.err) == counted
        assert (json.loads(printed.out)["bytes"]["state32"] > 4 * 300 * 64) == counted


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--for=transformers", "--optimizer=muon8bit"], "transformers has no name for Muon8bit; it has for AdamW8bit"),
        (["--for=axolotl", "--optimizer=adam8bit"], "axolotl has no name for Adam8bit"),
        (
            ["--for=torchtune", "--optimizer=torch-adamw"],
            "a line for torchtune is for optimizers of optim8, got 'torch",
        ),
        (["--for=torchtune", "--paged", "--host-budget=1GiB"], "cannot hold the budgets of a Pager"),
        (["--for=torchtune", "--budget=24"], "a size needs a unit, got '24'"),
    ],
)
def test_what_has_no_line_is_refused(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(tmp_path, *arguments, config={"parameters": {"a": [64, 128]}}) == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert not printed.out
