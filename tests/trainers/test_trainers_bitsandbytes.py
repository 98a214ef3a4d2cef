"""Libraries that ask for bitsandbytes by name, with optim8 in its place or beside it.

Each test needs its library (`pip install optim8[trainers]`) and is skipped without it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.harness import bits, state_bits
from support.stand_in import stand_in
from trainers_harness import inner, small_language_model, trainer

import optim8


@pytest.fixture
def alias() -> Iterator[None]:
    """`import bitsandbytes` gives optim8, and no bitsandbytes is installed beside it."""
    utils = pytest.importorskip("transformers").utils.import_utils
    with stand_in():
        utils.is_bitsandbytes_available.cache_clear()
        yield
    utils.is_bitsandbytes_available.cache_clear()


def bitsandbytes_names() -> list[str]:
    """The Trainer's names whose optimizer is one of bitsandbytes."""
    try:
        from transformers import trainer_optimizer
    except ImportError:
        return []
    return sorted(str(getattr(name, "value", name)) for name in trainer_optimizer._BITSANDBYTES_OPTIMIZERS)


def expected_class(optim: str) -> type[torch.optim.Optimizer]:
    for part, cls in (("ademamix", "AdEMAMix"), ("adam", "AdamW"), ("lion", "Lion"), ("rmsprop", "RMSprop")):
        if part in optim:
            return getattr(optim8.optim, cls)  # type: ignore[no-any-return]
    raise AssertionError(f"{optim} is of no known optimizer")


@pytest.mark.usefixtures("alias")
@pytest.mark.parametrize("optim", bitsandbytes_names())
def test_the_trainers_names(optim: str, tmp_path: Path, device: torch.device) -> None:
    """Trains, and resumed from a checkpoint it ends bit for bit as the run that went on; what is not here says so."""
    cls = expected_class(optim)
    model = small_language_model(device)
    run = trainer(model, tmp_path, device, {"optim": optim})
    if issubclass(cls, optim8.optim.absent.AbsentOptimizer):
        with pytest.raises(NotImplementedError, match=f"{cls.__name__}: optim8 has no such optimizer"):
            run.train()
        return
    run.train()
    optimizer = inner(run.optimizer)
    assert type(optimizer) is cls
    assert {optimizer.precision(p) for p in model.parameters()} == ({"8bit", "32bit"} if "8bit" in optim else {"32bit"})
    if device.type == "cpu":
        assert {place.tier for place in optimizer.placement()} == {"disk" if "paged" in optim else "host"}
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert float(losses[-1]) < float(losses[0])
    resumed = small_language_model(device)
    again = trainer(resumed, tmp_path, device, {"optim": optim})
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert bits(p) == bits(q)
        assert state_bits(optimizer, p) == state_bits(inner(again.optimizer), q)


def test_names_are_found() -> None:
    pytest.importorskip("transformers")
    assert {"adamw_bnb_8bit", "paged_lion_32bit", "rmsprop_bnb_8bit", "ademamix_8bit"} <= set(bitsandbytes_names())


@pytest.mark.usefixtures("alias")
def test_embeddings_in_32_bits_as_the_trainer_has_them(tmp_path: Path, device: torch.device) -> None:
    """With bitsandbytes it asks for that itself, by the name of the module of the class; here the user does."""
    model = small_language_model(device)
    run = trainer(model, tmp_path, device, {"optim": "adamw_bnb_8bit"})
    optimizer = inner(run.create_optimizer())
    assert optimizer.precision(model.model.embed_tokens.weight) == "8bit"
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            optim8.override(module, optim_bits=32)
    run.train()
    eight = {name for name, p in model.named_parameters() if inner(run.optimizer).precision(p) == "8bit"}
    assert inner(run.optimizer).precision(model.model.embed_tokens.weight) == "32bit"
    assert eight
    assert not any("embed" in name for name in eight)


def test_lora_plus(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """It imports bitsandbytes for a class called AdamW8bit; AdamW(optim_bits=8) is the same under another name."""
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # cannot be imported
    adapters = peft.LoraConfig(r=32, target_modules=["q_proj", "gate_proj"], init_lora_weights=False)
    model = peft.get_peft_model(small_language_model(device), adapters)
    options = {"lr": 1e-3, "loraplus_lr_ratio": 16, "min_8bit_size": 2048}
    with pytest.raises(ImportError):
        create_loraplus_optimizer(model, optim8.AdamW8bit, **options)
    with stand_in():
        assert type(create_loraplus_optimizer(model, optim8.AdamW8bit, **options)) is optim8.AdamW8bit
    optimizer = create_loraplus_optimizer(model, optim8.optim.AdamW, optim_bits=8, **options)
    assert isinstance(optimizer, optim8.AdamW8bit)
    ids = torch.arange(16, device=device)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert {optimizer.precision(p) for p in optimizer.state} == {"8bit"}
    assert {group["lr"] for group in optimizer.param_groups if group["params"]} == {1e-3, 16e-3}
