"""Mixed precision by the training libraries: clipping, gradient scaling, and steps that the scaler leaves out.

Each test needs its library (`pip install optim8[trainers]`) and is skipped without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.harness import bits, parameter

import optim8

OPTIMIZERS = pytest.mark.parametrize("cls", [optim8.AdamW8bit, optim8.Lion8bit, optim8.PagedAdamW8bit])
CLIP = pytest.mark.parametrize("clip", ["norm", "value"])


class Scaled:
    """Parameters with gradients, an optimizer, and a scaler in use."""

    def __init__(self, cls: Any, device: torch.device) -> None:
        self.params = [parameter(torch.linspace(-1, 1, n, device=device)) for n in (5000, 10)]
        self.optimizer = cls(self.params, lr=0.01)
        self.scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
        self.scaler.scale(torch.zeros((), device=device))

    def set_grads(self, scale: float, *, infinite: bool = False) -> None:
        for i, p in enumerate(self.params):
            p.grad = torch.linspace(-2, 3 + i, p.numel(), device=p.device) * scale
        if infinite:
            self.params[1].grad[3] = float("inf")


@OPTIMIZERS
def test_accelerate_sees_skipped_steps(cls: Any, device: torch.device) -> None:
    """A schedule waits for them. accelerate asks whether `step` was called."""
    accelerate = pytest.importorskip("accelerate")
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.scheduler import AcceleratedScheduler

    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.Accelerator(cpu=device.type == "cpu")
    it = Scaled(cls, device)
    wrapped = AcceleratedOptimizer(it.optimizer, scaler=it.scaler)
    schedule = torch.optim.lr_scheduler.LambdaLR(it.optimizer, lambda n: 1 / (1 + n))
    wrapped_schedule = AcceleratedScheduler(schedule, wrapped, step_with_optimizer=True, split_batches=True)
    seen = []
    for i in range(4):
        it.set_grads(it.scaler.get_scale(), infinite=i in (1, 2))
        wrapped.step()
        wrapped_schedule.step()
        seen.append((wrapped.step_was_skipped, it.optimizer.param_groups[0]["lr"]))
    third = 0.01 / 3
    assert seen == [(False, 0.005), (True, 0.005), (True, 0.005), (False, pytest.approx(third))]
    assert it.optimizer.state[it.params[0]]["step"] == 2


@CLIP
@OPTIMIZERS
def test_lightning_clips_in_16_mixed(cls: Any, clip: str, device: torch.device) -> None:
    """The plugin, as Lightning's Trainer makes it on a GPU; it unscales first, where the optimizer lets it."""
    pytest.importorskip("pytorch_lightning")
    from pytorch_lightning.plugins.precision import MixedPrecision
    from pytorch_lightning.utilities.enums import GradClipAlgorithmType

    it, own = Scaled(cls, device), Scaled(cls, device)
    plugin = MixedPrecision("16-mixed", device.type, scaler=it.scaler)
    it.set_grads(1024.0)
    it.scaler.unscale_(it.optimizer)  # what the plugin does before it clips
    plugin.clip_gradients(it.optimizer, 0.5, GradClipAlgorithmType(clip))
    it.scaler.step(it.optimizer)
    own.set_grads(1.0)
    if clip == "norm":
        torch.nn.utils.clip_grad_norm_(own.params, 0.5)
    else:
        torch.nn.utils.clip_grad_value_(own.params, 0.5)
    own.optimizer.step()
    assert [bits(p) for p in it.params] == [bits(p) for p in own.params]


@OPTIMIZERS
def test_fabric_unscales_to_clip(cls: Any, device: torch.device) -> None:
    pytest.importorskip("lightning_fabric")
    from lightning_fabric.plugins.precision import MixedPrecision

    it = Scaled(cls, device)
    it.set_grads(1024.0)
    MixedPrecision("16-mixed", device.type, scaler=it.scaler).unscale_gradients(it.optimizer)
    assert it.params[0].grad[0] == -2


def test_fabric_clips(device: torch.device) -> None:
    fabric_module = pytest.importorskip("lightning_fabric")
    kind, precision = ("cpu", "bf16-mixed") if device.type == "cpu" else ("gpu", "16-mixed")
    fabric = fabric_module.Fabric(accelerator=kind, devices=1, precision=precision)
    model = torch.nn.Linear(64, 64)
    model, optimizer = fabric.setup(model, optim8.AdamW8bit(model.parameters(), lr=0.01))
    before = bits(model.weight)
    fabric.backward(model(torch.ones(4, 64, device=device)).float().square().mean() * 100)
    norm = fabric.clip_gradients(model, optimizer, max_norm=1.0)
    assert norm > 1
    total = sum(float(p.grad.square().sum()) for p in model.parameters()) ** 0.5
    assert total == pytest.approx(1, rel=1e-3)
    optimizer.step()
    assert bits(model.weight) != before


@CLIP
@pytest.mark.parametrize("cls", [optim8.AdamW8bit, optim8.Lion8bit])
def test_lightning_trains_in_mixed_precision(cls: Any, clip: str, tmp_path: Path, device: torch.device) -> None:
    lightning = pytest.importorskip("pytorch_lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.network = torch.nn.Linear(64, 128)
            self.largest: list[float] = []

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return (self.network(batch[0]).float() - 9).square().sum()

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.largest.append(max(float(p.grad.abs().max()) for p in self.parameters()))

        def configure_gradient_clipping(self, *args: Any, **options: Any) -> None:
            super().configure_gradient_clipping(*args, **options)
            self.clipped = max(float(p.grad.abs().max()) for p in self.parameters())

        def configure_optimizers(self) -> Any:
            return cls(self.parameters(), lr=1e-3)

    module = Module()
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(8, 64)), batch_size=4)
    lightning.Trainer(
        max_epochs=1,
        accelerator="cpu" if device.type == "cpu" else "gpu",
        devices=1,
        precision="bf16-mixed" if device.type == "cpu" else "16-mixed",
        gradient_clip_val=0.5,
        gradient_clip_algorithm=clip,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    ).fit(module, data)
    assert module.largest[0] > 0.5 >= module.clipped
