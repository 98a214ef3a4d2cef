"""The two small models: a decoder over words with a head of its own, and a mixture of experts."""

from __future__ import annotations

import torch
from lm.model import Block, Shape
from torch import Tensor, nn
from torch.nn import functional

BALANCE = 0.01  # weight of the loss that keeps all experts in use


class WordModel(nn.Module):
    """One block of `lm.model`, between an embedding and a head that share no weights: a row of each for each token."""

    def __init__(self, vocabulary: int, width: int, context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.block = Block(Shape(layers=1, heads=2, width=width, context=context))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=width**-0.5)

    def lower_half(self) -> list[nn.Parameter]:
        """The embeddings and the attention: half of the parameters, all below the others."""
        attention = (self.block.norm_attention, self.block.query_key_value, self.block.attention_out)
        return [p for part in (self.embedding, self.position, *attention) for p in part.parameters()]

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [batch, time, vocabulary] of the next token, for `tokens`, int64 [batch, time]."""
        x = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1]))
        logits: Tensor = self.head(self.norm(self.block(x)))
        return logits

    def losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of each target, in nats, flat."""
        return functional.cross_entropy(self(tokens).flatten(0, 1), targets.flatten(), reduction="none")


class Experts(nn.Module):
    """Perceptrons, of which a router gives each input to one (Fedus et al. 2021, arXiv 2101.03961).

    All experts are stacked in one tensor of each kind, so that a block holds rows, or biases, of several.
    """

    def __init__(self, experts: int, width: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.randn(experts, width) / width**0.5)
        self.weight_in = nn.Parameter(torch.randn(experts, width, hidden) / width**0.5)
        self.bias = nn.Parameter(torch.zeros(experts, hidden))
        self.weight_out = nn.Parameter(torch.randn(experts, hidden, classes) / hidden**0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [inputs, classes] for `x`, float32 [inputs, width]; and the loss for balance."""
        shares = functional.softmax(x @ self.router.t(), dim=1)
        share, chosen = shares.max(dim=1)
        hidden = torch.baddbmm(self.bias[chosen][:, None], x[:, None], self.weight_in[chosen])
        logits = (functional.gelu(hidden) @ self.weight_out[chosen])[:, 0] * share[:, None]
        used = torch.bincount(chosen, minlength=shares.shape[1]) / len(x)
        return logits, shares.shape[1] * (used * shares.mean(dim=0)).sum()
