"""A small GPT: pre-norm transformer decoder over bytes (Radford et al. 2019), without biases and without dropout."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY = 256  # one token per byte


@dataclass(frozen=True)
class Shape:
    """Size of the model. `width` must be a multiple of `heads`; `context` is the longest sequence in bytes."""

    layers: int
    heads: int
    width: int
    context: int

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(
                f"Shape: width must be a multiple of heads, got width={self.width} and heads={self.heads}. "
                "Change one of them."
            )


class Block(nn.Module):
    """Attention, then a perceptron four times as wide, each added to its input of shape [batch, time, width]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.heads = shape.heads
        self.norm_attention = nn.LayerNorm(width, bias=False)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.norm_mlp = nn.LayerNorm(width, bias=False)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        packed = self.query_key_value(self.norm_attention(x))
        query, key, value = packed.view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, time, width))
        hidden: Tensor = self.mlp_out(functional.gelu(self.mlp_in(self.norm_mlp(x))))
        return x + hidden


class GPT(nn.Module):
    """Bytes in, logits of the next byte out. The output layer is the byte embedding (tied weights)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.byte_embedding = nn.Embedding(VOCABULARY, shape.width)
        self.position_embedding = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm_out = nn.LayerNorm(shape.width, bias=False)
        self._initialize(shape.layers)

    def _initialize(self, layers: int) -> None:
        """Normal with deviation 0.02; the projections that end a residual branch are smaller by sqrt(2 * layers)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                ends_branch = name.endswith(("attention_out.weight", "mlp_out.weight"))
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * layers) if ends_branch else 1.0))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [batch, time, 256] for `tokens`: int64 [batch, time], below 256, time at most `shape.context`."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.byte_embedding(tokens) + self.position_embedding(positions)
        for block in self.blocks:
            x = block(x)
        return functional.linear(self.norm_out(x), self.byte_embedding.weight)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per byte (float32 scalar) of `targets`, int64 [batch, time]."""
        return functional.cross_entropy(self(tokens).flatten(0, 1).float(), targets.flatten())
