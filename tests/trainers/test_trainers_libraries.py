"""Training by the libraries that people train with: a tiny model made from a config, nothing is downloaded.

Each test needs its library (`pip install optim8[trainers]`) and is skipped without it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES
from support.harness import ALL, bits, state_bits
from trainers_harness import inner, small_language_model, trainer

import optim8

OPTIONS = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5}


@pytest.fixture
def language_model(device: torch.device) -> Any:
    pytest.importorskip("transformers")
    return partial(small_language_model, device)


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit"])
def test_hugging_face_trainer(name: str, language_model: Any, tmp_path: Path, device: torch.device) -> None:
    """By class and by instance; a run resumed from a checkpoint ends bit for bit as the one that went on."""
    cls = getattr(optim8, name)
    by_class = language_model()
    run = trainer(by_class, tmp_path, device, OPTIONS, optimizer_cls_and_kwargs=(cls, {"lr": 1e-2}))
    run.train()
    assert type(inner(run.optimizer)) is cls
    assert {inner(run.optimizer).precision(p) for p in by_class.parameters()} == {"8bit", "32bit"}
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert float(losses[-1]) < float(losses[0])

    resumed = language_model()
    again = trainer(resumed, tmp_path, device, OPTIONS, optimizer_cls_and_kwargs=(cls, {"lr": 1e-2}))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for p, q in zip(by_class.parameters(), resumed.parameters(), strict=True):
        assert bits(p) == bits(q)
        assert state_bits(inner(run.optimizer), p) == state_bits(inner(again.optimizer), q)

    by_instance = language_model()
    optimizer = cls(by_instance.parameters(), lr=1e-2)
    trainer(by_instance, tmp_path / "instance", device, OPTIONS, optimizers=(optimizer, None)).train()
    assert optimizer.state[by_instance.model.embed_tokens.weight]["step"] == 4


def test_peft(language_model: Any, tmp_path: Path, device: torch.device) -> None:
    """Adapters train, the frozen model stays and has no state."""
    peft = pytest.importorskip("peft")
    base = language_model()
    before = {name: bits(p) for name, p in base.named_parameters()}
    adapters = peft.LoraConfig(r=32, target_modules=["q_proj", "gate_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, adapters)
    optimizer = optim8.AdamW8bit(model.parameters(), lr=1e-2, min_8bit_size=2048)
    trainer(model, tmp_path, device, OPTIONS, optimizers=(optimizer, None)).train()
    trained = {name for name, p in model.named_parameters() if p in optimizer.state}
    assert trained
    assert all("lora_" in name for name in trained)
    assert {optimizer.precision(p) for p in model.parameters() if p in optimizer.state} == {"8bit"}
    for name, p in model.get_base_model().named_parameters():
        if "lora_" not in name:
            assert bits(p) == before[name.replace("base_layer.", "")]


def small_network(device: torch.device) -> torch.nn.Sequential:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 70)).to(device)


def batches() -> torch.utils.data.DataLoader[Any]:
    data = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data), batch_size=4)


@ALL
def test_accelerate(case: Any, tmp_path: Path, device: torch.device) -> None:
    """Accumulation and clipping by accelerate; the state is saved and loaded; the end is that of a plain loop."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=2, cpu=device.type == "cpu")
    model, twin = small_network(device), small_network(device)
    optimizer, own = (case.make(m.parameters(), min_8bit_size=4096) for m in (model, twin))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    own_schedule = torch.optim.lr_scheduler.StepLR(own, 2)
    prepared, wrapped, loader, wrapped_schedule = accelerator.prepare(model, optimizer, batches(), schedule)
    for i, (x,) in enumerate(loader):
        with accelerator.accumulate(prepared):
            accelerator.backward((prepared(x) - 1).square().mean())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(prepared.parameters(), 0.5)
            wrapped.step()
            wrapped_schedule.step()
            wrapped.zero_grad()
        if i == 3:
            accelerator.save_state(str(tmp_path / "state"))
            for p in model.parameters():
                p.data.add_(1)
            accelerator.load_state(str(tmp_path / "state"))
    for i, (x,) in enumerate(batches()):
        ((twin(x.to(device)) - 1).square().mean() / 2).backward()
        if i % 2:
            torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
            own.step()
            own_schedule.step()
            own.zero_grad()
    assert optimizer.param_groups[0]["lr"] == own.param_groups[0]["lr"]
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert bits(p) == bits(q)
        assert state_bits(inner(wrapped), p) == state_bits(own, q)


def test_lightning(tmp_path: Path, device: torch.device) -> None:
    """The trainer of Lightning with a schedule, clipping and accumulation; a resumed run ends as one that went on."""
    lightning = pytest.importorskip("pytorch_lightning")
    case = CASES["AdamW8bit"]

    class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.network = small_network(torch.device("cpu"))

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return (self.network(batch[0]) - 1).square().mean()

        def configure_optimizers(self) -> Any:
            optimizer = case.make(self.parameters(), min_8bit_size=4096)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    def fit(epochs: int, folder: Path, start: str | None = None) -> tuple[Any, Any]:
        module = Module()
        run = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu" if device.type == "cpu" else "gpu",
            devices=1,
            gradient_clip_val=0.5,
            accumulate_grad_batches=2,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        run.fit(module, batches(), ckpt_path=start)
        run.save_checkpoint(folder / "end.ckpt")
        return module, run.optimizers[0]

    straight, optimizer = fit(2, tmp_path / "straight")
    assert type(optimizer) is optim8.AdamW8bit
    fit(1, tmp_path / "first")
    resumed, other = fit(2, tmp_path / "second", str(tmp_path / "first" / "end.ckpt"))
    assert optimizer.param_groups[0]["lr"] == case.hypers[0]["lr"] / 4
    for p, q in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert bits(p) == bits(q)
        assert state_bits(optimizer, p) == state_bits(other, q)
