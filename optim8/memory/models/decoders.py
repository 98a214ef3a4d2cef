"""Shapes of the parameters of decoders like llama, as Hugging Face's transformers holds them.

They have attention with rotary positions, gated feed-forward layers and norms without bias. Some have experts in place
of the feed-forward layer, whose matrices are stacked into one tensor, as in transformers 5. Sources: the models' papers
(arXiv 2302.13971, 2310.06825, 2401.04088, 2407.10671, 2505.09388, 2404.14219, 2408.00118).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from optim8.memory.models.entries import Shapes, head, size

Config = Mapping[str, Any]


def _llama(config: Config, _layer: int) -> Shapes:
    return _gated("mlp", config, "intermediate_size", bool(config.get("mlp_bias", False)))


def _dense(config: Config, _layer: int) -> Shapes:
    return _gated("mlp", config, "intermediate_size")


def _gate_up(config: Config, _layer: int) -> Shapes:
    """Gate and input as one matrix."""
    hidden, inner = size(config, "hidden_size"), size(config, "intermediate_size")
    return {"mlp.gate_up_proj.weight": (2 * inner, hidden), "mlp.down_proj.weight": (hidden, inner)}


def _gated(name: str, config: Config, inner: str, bias: bool = False) -> Shapes:
    hidden, width = size(config, "hidden_size"), size(config, inner)
    parts = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    found: Shapes = {f"{name}.{part}.weight": shape for part, shape in parts.items()}
    return found | ({f"{name}.{part}.bias": shape[:1] for part, shape in parts.items()} if bias else {})


def _experts(config: Config, inner: str) -> Shapes:
    hidden, width = size(config, "hidden_size"), size(config, inner)
    experts = size(config, "num_experts", other="num_local_experts")  # transformers writes either, by version
    return {
        "mlp.gate.weight": (experts, hidden),
        "mlp.experts.gate_up_proj": (experts, 2 * width, hidden),
        "mlp.experts.down_proj": (experts, hidden, width),
    }


def _mixtral(config: Config, _layer: int) -> Shapes:
    return _experts(config, "intermediate_size")


def _qwen_moe(config: Config, layer: int) -> Shapes:
    every = size(config, "decoder_sparse_step", 1)
    if layer in (config.get("mlp_only_layers") or ()) or (layer + 1) % every:
        return _dense(config, layer)
    return _experts(config, "moe_intermediate_size")


def _qwen2_moe(config: Config, layer: int) -> Shapes:
    found = _qwen_moe(config, layer)
    if "mlp.gate.weight" in found:
        found |= _gated("mlp.shared_expert", config, "shared_expert_intermediate_size")
        found["mlp.shared_expert_gate.weight"] = (1, size(config, "hidden_size"))
    return found


@dataclass(frozen=True)
class Decoder:
    """The options by which the families differ; the defaults are llama's."""

    forward: Callable[[Config, int], Shapes] = _llama
    key_heads: int | None = None  # where the config names none; None: as many as there are heads
    head_dim: int | None = None  # where the config names none; None: what the heads divide the width into
    bias: tuple[bool, bool] | None = None  # of queries, keys and values, and of the output; None: attention_bias says
    one_matrix: bool = False  # queries, keys and values
    head_norms: bool = False  # of queries and keys
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    tied: bool = False  # where the config does not say

    def __call__(self, config: Config, architecture: str) -> Shapes:
        """The shape of every parameter by name."""
        hidden, vocabulary = size(config, "hidden_size"), size(config, "vocab_size")
        attention = self._attention(config, hidden)
        found: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
        for layer in range(size(config, "num_hidden_layers")):
            block = attention | self.forward(config, layer) | {f"{name}.weight": (hidden,) for name in self.norms}
            found |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
        found["model.norm.weight"] = (hidden,)
        return found | head(config, "lm_head.weight", architecture, self.tied, (vocabulary, hidden))

    def _attention(self, config: Config, hidden: int) -> Shapes:
        heads = size(config, "num_attention_heads")
        width = size(config, "head_dim", self.head_dim or hidden // heads)
        out, key = heads * width, size(config, "num_key_value_heads", self.key_heads or heads) * width
        stated = bool(config.get("attention_bias", False))
        inner_bias, outer_bias = (stated, stated) if self.bias is None else self.bias
        inner = {"qkv_proj": out + 2 * key} if self.one_matrix else {"q_proj": out, "k_proj": key, "v_proj": key}
        found: Shapes = {}
        for name, rows in inner.items():
            found[f"self_attn.{name}.weight"] = (rows, hidden)
            if inner_bias:
                found[f"self_attn.{name}.bias"] = (rows,)
        found["self_attn.o_proj.weight"] = (hidden, out)
        if outer_bias:
            found["self_attn.o_proj.bias"] = (hidden,)
        if self.head_norms:
            found |= {"self_attn.q_norm.weight": (width,), "self_attn.k_norm.weight": (width,)}
        return found


def _qwen2_moe_decoder(config: Config, architecture: str) -> Shapes:
    biased = bool(config.get("qkv_bias", True))
    return Decoder(_qwen2_moe, key_heads=16, bias=(biased, False))(config, architecture)


_GEMMA_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)

# By model_type: the function that reads the config, and the architecture of a config that names none.
DECODERS: dict[str, tuple[Callable[[Config, str], Shapes], str]] = {
    "llama": (Decoder(), "LlamaForCausalLM"),
    "mistral": (Decoder(_dense, key_heads=8, bias=(False, False)), "MistralForCausalLM"),
    "mixtral": (Decoder(_mixtral, key_heads=8, bias=(False, False)), "MixtralForCausalLM"),
    "qwen2": (Decoder(_dense, key_heads=32, bias=(True, False)), "Qwen2ForCausalLM"),
    "qwen2_moe": (_qwen2_moe_decoder, "Qwen2MoeForCausalLM"),
    "qwen3": (Decoder(_dense, key_heads=32, head_dim=128, head_norms=True), "Qwen3ForCausalLM"),
    "qwen3_moe": (Decoder(_qwen_moe, key_heads=4, head_norms=True), "Qwen3MoeForCausalLM"),
    "gemma2": (Decoder(_dense, key_heads=4, head_dim=256, norms=_GEMMA_NORMS, tied=True), "Gemma2ForCausalLM"),
    "phi3": (Decoder(_gate_up, bias=(False, False), one_matrix=True), "Phi3ForCausalLM"),
}
