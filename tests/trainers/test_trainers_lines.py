"""The lines of docs/trainers.md, each given to the builder of its framework.

A block there says for which framework it is, as in ```yaml for=hydra. Each test needs its framework and is skipped
without it.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.harness import bits

import optim8
from optim8.integrations import nemo

DOCUMENT = Path(__file__).resolve().parent.parent.parent / "docs" / "trainers.md"
BLOCKS = re.findall(r"^```yaml for=(\w+)\n(.*?)^```$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def lines(framework: str) -> list[str]:
    """The blocks for a framework, of which there is one at least."""
    found = [text for name, text in BLOCKS if name == framework]
    assert found, f"docs/trainers.md has no block for {framework}"
    return found


def configuration(framework: str) -> Any:
    omegaconf = pytest.importorskip("omegaconf")
    (text,) = lines(framework)
    return omegaconf.OmegaConf.create(text)


@pytest.fixture
def weight(device: torch.device) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.linspace(-1, 1, 5000, device=device))


def steps(optimizer: Any, weight: torch.nn.Parameter, bits_of_state: str = "8bit") -> None:
    """It is one of ours, and trains."""
    assert isinstance(optimizer, optim8.AdamW8bit)
    before = bits(weight)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert bits(weight) != before
    assert optimizer.precision(weight) == bits_of_state


def test_every_block_has_a_test() -> None:
    assert {name for name, _ in BLOCKS} == {"lightning", "torchtune", "hydra", "nemo", "verl"}


def test_hydra(weight: torch.nn.Parameter) -> None:
    """By path, with parameters and with groups of them."""
    hydra = pytest.importorskip("hydra")
    optim = configuration("hydra").optim
    optimizer = hydra.utils.instantiate(optim, [{"params": [weight], "weight_decay": 0.2}])
    assert (optimizer.defaults["lr"], optimizer.defaults["betas"]) == (1e-4, (0.9, 0.98))
    assert optimizer.param_groups[0]["weight_decay"] == 0.2
    steps(optimizer, weight)


def test_torchtune(weight: torch.nn.Parameter) -> None:
    config = pytest.importorskip("torchtune.config")
    optimizer = config.instantiate(configuration("torchtune").optimizer, [weight])
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (2e-5, 0.1)
    steps(optimizer, weight)


def test_verl(weight: torch.nn.Parameter) -> None:
    verl = pytest.importorskip("verl.workers.config.optimizer")
    optim = importlib.import_module("omegaconf").OmegaConf.to_container(configuration("verl").optim)
    optim["lr"] = float(optim["lr"])  # "1e-6" is a string to YAML
    steps(verl.build_optimizer([weight], verl.FSDPOptimizerConfig(**optim)), weight, "16bit")


def test_nemo() -> None:
    """Its models refuse our path, and take our name."""
    classes = pytest.importorskip("nemo.core.classes")
    omegaconf = importlib.import_module("omegaconf")

    class Model(classes.ModelPT):  # type: ignore[misc,name-defined]
        def __init__(self, optim: Any) -> None:
            super().__init__(omegaconf.OmegaConf.create({"optim": optim}))
            self.layer = torch.nn.Linear(96, 96)

        def setup_training_data(self, *_: Any) -> None: ...
        def setup_validation_data(self, *_: Any) -> None: ...
        @classmethod
        def list_available_models(cls) -> None: ...

    nemo.install()
    model = Model(configuration("nemo").optim)
    model.setup_optimization()
    optimizer = model._optimizer
    assert (optimizer.defaults["lr"], optimizer.defaults["betas"]) == (1e-4, (0.9, 0.98))
    steps(optimizer, model.layer.weight)
    with pytest.raises(ValueError, match=r"unsafe target 'optim8\.AdamW8bit' is blocked"):
        Model(configuration("hydra").optim).setup_optimization()


@pytest.mark.parametrize("text", lines("lightning"), ids=["class", "callback"])
@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_lightning(package: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jsonargparse")
    pl = pytest.importorskip(package)
    cli = importlib.import_module(f"{package}.cli")
    monkeypatch.delitem(sys.modules, "optim8.integrations.lightning", raising=False)  # it looks which package is there
    monkeypatch.setattr(sys, "argv", ["program"])  # which the CLI warns about

    class Module(pl.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(96, 96)

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return self.layer(batch[0]).square().mean()

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 96)), batch_size=4)

    (tmp_path / "config.yaml").write_text(text)
    options = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    options |= {"enable_checkpointing": False, "enable_model_summary": False, "default_root_dir": str(tmp_path)}
    arguments = ["--config", str(tmp_path / "config.yaml")]
    made = cli.LightningCLI(Module, args=arguments, trainer_defaults=options, save_config_callback=None, run=False)
    made.trainer.fit(made.model)
    (optimizer,) = made.trainer.optimizers
    assert optimizer.defaults["lr"] == 1e-3
    assert type(optimizer) is (optim8.PagedAdamW8bit if "Paged" in text else optim8.AdamW8bit)
    assert optimizer.precision(made.model.layer.weight) == "8bit"
    names = [type(callback).__name__ for callback in made.trainer.callbacks]
    assert ("PagedStateCallback" in names) == ("PagedStateCallback" in text)
