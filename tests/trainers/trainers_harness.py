"""What the tests with training libraries share: a tiny model made from a config, its data; nothing is downloaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # what would download something fails


def small_language_model(device: torch.device) -> Any:
    """A small Llama with random weights; one with 8-bit state for its matrices and 32-bit for its norms."""
    import transformers

    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).to(device)


class Sequences(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(16) * (1 + index % 3)) % 64
        return {"input_ids": ids, "labels": ids}


def trainer(model: Any, folder: Path, device: torch.device, options: dict[str, Any], **more: Any) -> Any:
    """A Trainer of 4 steps that saves each second one. `options` are TrainingArguments, `more` is the Trainer's."""
    import transformers

    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=False,
        **options,
    )
    return transformers.Trainer(model, arguments, train_dataset=Sequences(), **more)


def inner(optimizer: Any) -> Any:
    """The optimizer inside a library's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
