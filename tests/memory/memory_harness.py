"""Small models of several architectures, with what they hold after a step, measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Tied(nn.Module):
    """A language model whose output layer is its embedding, with a frozen layer and a parameter without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(301, 48)
        self.frozen = nn.Linear(48, 48).requires_grad_(False)
        self.mixed = nn.Linear(48, 90, bias=False)
        self.back = nn.Linear(90, 48)
        self.out = nn.Linear(48, 301, bias=False)
        self.out.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.out(self.back(self.mixed(self.frozen(self.embedding(tokens)))) * self.scale)


def cnn() -> nn.Module:
    """Convolutions, batch norms with their buffers, sizes that are no multiples of 64."""
    return nn.Sequential(
        nn.Conv2d(3, 37, 3, bias=False),
        nn.BatchNorm2d(37),
        nn.ReLU(),
        nn.Conv2d(37, 53, 3),
        nn.BatchNorm2d(53),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(53, 11),
    )


def transformer() -> nn.Module:
    return nn.Transformer(64, 4, 2, 2, 200, dropout=0.0, batch_first=True)


def recurrent() -> nn.Module:
    return nn.LSTM(40, 72, num_layers=2)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.dtype], tuple[torch.Tensor, ...]]]] = {
    "cnn": (cnn, lambda dtype: (torch.randn(2, 3, 12, 12, dtype=dtype),)),
    "transformer": (
        transformer,
        lambda dtype: (torch.randn(2, 5, 64, dtype=dtype), torch.randn(2, 3, 64, dtype=dtype)),
    ),
    "lstm": (recurrent, lambda dtype: (torch.randn(4, 2, 40, dtype=dtype),)),
    "tied": (Tied, lambda dtype: (torch.randint(0, 301, (2, 7)),)),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: tuple[torch.Tensor, ...], steps: int = 1) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        result = model(*inputs)
        result = result[0] if isinstance(result, tuple) else result
        result.float().square().mean().backward()
        optimizer.step()


def plain(value: Any) -> list[torch.Tensor]:
    """The plain tensors of a state's value; torchao wraps codes and scales in a tensor subclass."""
    if hasattr(value, "__tensor_flatten__"):
        return [tensor for name in value.__tensor_flatten__()[0] for tensor in plain(getattr(value, name))]
    return [value] if isinstance(value, torch.Tensor) else []


def bytes_by_kind(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes by kind after a step: of the tensors themselves, and (buffers) of what their storages hold beyond that."""
    found = {"parameters": sum(p.nbytes for p in model.parameters())}
    found["gradients"] = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    found |= {"codes": 0, "absmax": 0, "state32": 0}
    segments = getattr(getattr(optimizer, "memory", None), "segments", [])
    storages = {segment.span[0]: segment.memory.numel() for segment in segments}  # whole pages
    for state in optimizer.state.values():
        for name, tensor in state.items():
            kind = "codes" if tensor.dtype == torch.uint8 else "absmax" if name.endswith("absmax") else "state32"
            kind = "master" if name == "param_low" else kind
            found[kind] = found.get(kind, 0) + tensor.nbytes
            storage = tensor.untyped_storage()
            if not any(segment.holds(tensor) for segment in segments):
                storages[storage.data_ptr()] = storage.nbytes()
    state_bytes = sum(found.get(kind, 0) for kind in ("codes", "absmax", "state32", "master"))
    found["buffers"] = sum(storages.values()) - state_bytes + sum(b.nbytes for b in model.buffers())
    return found
