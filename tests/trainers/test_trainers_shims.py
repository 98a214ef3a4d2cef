"""Lightning, timm and axolotl with their shims.

Each test needs its library and is skipped without it.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.harness import bits, state_bits
from trainers_harness import inner, small_language_model, trainer

import optim8
from optim8.integrations import timm, transformers

LIGHTNING = pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])


def training(package: str, callback: Any, folder: Path, epochs: int, start: str | None = None) -> Any:
    """Train two layers with an optimizer each, a paged and a resident one. Returns Lightning's trainer."""
    pl = importlib.import_module(package)

    class Module(pl.LightningModule):  # type: ignore[misc,name-defined]
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = torch.nn.ModuleList(torch.nn.Linear(96, 96) for _ in range(2))

        def training_step(self, batch: Any, _: int) -> None:
            loss = self.layers[1](self.layers[0](batch[0])).square().mean()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def on_train_start(self) -> None:
            paged = self.trainer.optimizers[0]
            self.trainer.tiers = {
                place.tier for place in paged.placement()
            }  # at the end Lightning moves all to the CPU

        def configure_optimizers(self) -> Any:
            classes = (optim8.PagedAdamW8bit, optim8.AdamW8bit)
            return [cls(layer.parameters(), lr=0.01) for cls, layer in zip(classes, self.layers, strict=True)]

    data = torch.utils.data.TensorDataset(torch.randn(8, 96, generator=torch.Generator().manual_seed(1)))
    run = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[] if callback is None else [callback],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
    )
    run.fit(Module(), torch.utils.data.DataLoader(data, batch_size=4), ckpt_path=start)
    run.save_checkpoint(folder / f"{epochs}.ckpt")
    return run


@LIGHTNING
def test_lightning_leaves_paged_state_where_it_is(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy stands for the move to another device, which a machine without a GPU does not have."""
    pytest.importorskip(package)
    monkeypatch.delitem(sys.modules, "optim8.integrations.lightning", raising=False)  # it looks which package is there
    from optim8.integrations.lightning import PagedStateCallback

    utilities = importlib.import_module(
        {"lightning.pytorch": "lightning.fabric", "pytorch_lightning": "lightning_fabric"}[package]
        + ".utilities.optimizer"
    )
    straight = training(package, PagedStateCallback(), tmp_path, 2)
    training(package, PagedStateCallback(), tmp_path, 1)
    monkeypatch.setattr(utilities, "move_data_to_device", lambda value, device: value.clone())
    without = training(package, None, tmp_path, 2, str(tmp_path / "1.ckpt"))
    assert without.tiers == {"host"}  # else this shows nothing
    moved: list[Any] = []

    def move(value: torch.Tensor, device: Any) -> torch.Tensor:
        moved.append(value)
        return value.clone()

    monkeypatch.setattr(utilities, "move_data_to_device", move)
    resumed = training(package, PagedStateCallback(), tmp_path, 2, str(tmp_path / "1.ckpt"))
    assert resumed.tiers == {"disk"}
    assert moved, "the resident optimizer is loaded as Lightning does it"
    for optimizer, other in zip(straight.optimizers, resumed.optimizers, strict=True):
        for p, q in zip(optimizer.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
            assert bits(p) == bits(q)
            assert state_bits(optimizer, p) == state_bits(other, q)
    assert "load_optimizer_state_dict" not in vars(resumed.strategy)


def test_timm_makes_them_by_name() -> None:
    """By timm 1.0.31's factory, with its groups, its momentum and its Lookahead."""
    factory = pytest.importorskip("timm.optim")
    timm.install()
    model = torch.nn.Sequential(torch.nn.Linear(96, 96), torch.nn.LayerNorm(96))
    optimizer = factory.create_optimizer_v2(model, opt="adamw8bit", lr=1e-3, weight_decay=0.05, betas=(0.8, 0.9))
    assert type(optimizer) is optim8.AdamW8bit
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.05]
    assert optimizer.defaults["betas"] == (0.8, 0.9)
    assert factory.create_optimizer_v2(model, opt="sgd8bit", lr=0.1).defaults["momentum"] == 0.9
    assert (
        type(factory.create_optimizer_v2(model, opt="lookahead_pagedlion8bit")._base_optimizer) is optim8.PagedLion8bit
    )
    ours = {name.lower() for name in optim8.__all__ if name.endswith("8bit")}
    assert ours <= set(factory.list_optimizers())


def test_axolotl_registers_the_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """By axolotl's own plugin manager; a training with axolotl was not run."""
    pytest.importorskip("axolotl")
    base = importlib.import_module("axolotl.integrations.base")
    library = pytest.importorskip("transformers")
    own = library.Trainer.get_optimizer_cls_and_kwargs
    monkeypatch.setattr(library.Trainer, "get_optimizer_cls_and_kwargs", staticmethod(own))
    manager = base.PluginManager.get_instance()
    manager.register("optim8.integrations.axolotl.Optim8Plugin")
    manager.plugins["optim8.integrations.axolotl.Optim8Plugin"].register({})
    run = trainer(small_language_model(device), tmp_path, device, {"optim": "paged_adamw_8bit"})
    assert type(inner(run.create_optimizer())) is optim8.PagedAdamW8bit
    assert transformers.optimizer_class("ao_adamw_8bit") is None
