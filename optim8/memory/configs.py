"""Shapes of the parameters that a config describes: Hugging Face's llama, mistral, qwen2, gpt2 and bert, or shapes
written out.

Sizes must be in the config. What says how parts are joined (tied embeddings, biases, heads) has the default of the
model's own config class. Sources: the models' papers (arXiv 2302.13971, Radford et al. 2019, arXiv 1810.04805).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Shapes = dict[str, tuple[int, ...]]


def shapes(config: Mapping[str, Any]) -> tuple[str, Shapes, Any]:
    """Title, shape of every parameter by name (tied ones once), and the dtype that the config names, or None.

    Raises:
        ValueError: the model type is unknown, or a size is missing or no positive whole number.
    """
    stated = config.get("dtype", config.get("torch_dtype"))
    kind = config.get("model_type")
    if kind is None:
        return "explicit sizes", _explicit(config), stated if isinstance(stated, str) else None
    if kind not in FAMILIES:
        raise ValueError(
            f"optim8.memory.plan: model_type must be one of {', '.join(FAMILIES)}, got {kind!r}. Pass the model "
            "itself, built under torch.device('meta'), a safetensors file, or the shapes."
        )
    read, architecture = FAMILIES[kind]
    named = config.get("architectures") or [architecture]
    return str(named[0]), read(config, str(named[0])), stated


def _size(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        got = "nothing" if value is None else repr(value)
        raise ValueError(f"optim8.memory.plan: the config needs {name!r}, a whole number of at least 1, got {got}.")
    return value


def _explicit(config: Mapping[str, Any]) -> Shapes:
    """`{"parameters": {name: shape}}`, `{"parameters": count}`, or `{name: shape}` itself."""
    listed = config.get("parameters", config)
    if isinstance(listed, int) and not isinstance(listed, bool):
        listed = {"parameters": [listed]}
    if not isinstance(listed, Mapping) or not listed:
        raise ValueError(
            "optim8.memory.plan: a config needs 'model_type', or sizes as {\"parameters\": {name: shape}} or "
            f'{{"parameters": count}}, got {listed!r}.'
        )
    found: Shapes = {}
    for name, shape in listed.items():
        if listed is config and name in ("dtype", "torch_dtype"):
            continue
        sizes = [shape] if isinstance(shape, int) else shape
        if not isinstance(sizes, (list, tuple)) or not all(
            isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in sizes
        ):
            raise ValueError(f"optim8.memory.plan: the shape of {name!r} must be whole numbers, got {shape!r}.")
        found[name] = tuple(sizes)
    return found


def _head(config: Mapping[str, Any], name: str, architecture: str, tied: bool, shape: tuple[int, ...]) -> Shapes:
    """The output layer of a language model; nothing where it is the embedding."""
    if architecture.endswith(("LMHeadModel", "ForCausalLM")):
        return {} if config.get("tie_word_embeddings", tied) else {name: shape}
    if architecture.endswith("Model"):
        return {}
    raise ValueError(
        f"optim8.memory.plan: architectures of a {config['model_type']} must name a language model or its body, got "
        f"{architecture!r}. Pass the model itself, built under torch.device('meta')."
    )


def _llama(config: Mapping[str, Any], architecture: str, qkv_bias: bool | None = None) -> Shapes:
    hidden, inner = _size(config, "hidden_size"), _size(config, "intermediate_size")
    vocabulary, heads = _size(config, "vocab_size"), _size(config, "num_attention_heads")
    width = _size(config, "head_dim", hidden // heads)
    out, key = heads * width, _size(config, "num_key_value_heads", heads) * width
    biased = bool(config.get("attention_bias", False))
    query_bias = biased if qkv_bias is None else qkv_bias
    block: Shapes = {}
    for name, rows, columns, bias in (
        ("self_attn.q_proj", out, hidden, query_bias),
        ("self_attn.k_proj", key, hidden, query_bias),
        ("self_attn.v_proj", key, hidden, query_bias),
        ("self_attn.o_proj", hidden, out, biased if qkv_bias is None else False),
        ("mlp.gate_proj", inner, hidden, bool(config.get("mlp_bias", False))),
        ("mlp.up_proj", inner, hidden, bool(config.get("mlp_bias", False))),
        ("mlp.down_proj", hidden, inner, bool(config.get("mlp_bias", False))),
    ):
        block[f"{name}.weight"] = (rows, columns)
        if bias:
            block[f"{name}.bias"] = (rows,)
    block |= {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    found: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(_size(config, "num_hidden_layers")):
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    found["model.norm.weight"] = (hidden,)
    return found | _head(config, "lm_head.weight", architecture, False, (vocabulary, hidden))


def _mistral(config: Mapping[str, Any], architecture: str) -> Shapes:
    return _llama({**config, "num_key_value_heads": config.get("num_key_value_heads", 8)}, architecture, False)


def _qwen2(config: Mapping[str, Any], architecture: str) -> Shapes:
    return _llama(config, architecture, True)


def _gpt2(config: Mapping[str, Any], architecture: str) -> Shapes:
    width, vocabulary = _size(config, "n_embd"), _size(config, "vocab_size")
    inner = _size(config, "n_inner", 4 * width)
    block: Shapes = {}
    for name, rows, columns in (
        ("attn.c_attn", width, 3 * width),
        ("attn.c_proj", width, width),
        ("mlp.c_fc", width, inner),
        ("mlp.c_proj", inner, width),
    ):
        block |= {f"{name}.weight": (rows, columns), f"{name}.bias": (columns,)}
    for name in ("ln_1", "ln_2"):
        block |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    found: Shapes = {
        "transformer.wte.weight": (vocabulary, width),
        "transformer.wpe.weight": (_size(config, "n_positions"), width),
    }
    for layer in range(_size(config, "n_layer")):
        found |= {f"transformer.h.{layer}.{name}": shape for name, shape in block.items()}
    found |= {"transformer.ln_f.weight": (width,), "transformer.ln_f.bias": (width,)}
    return found | _head(config, "lm_head.weight", architecture, True, (vocabulary, width))


def _linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _bert(config: Mapping[str, Any], architecture: str) -> Shapes:
    width, inner = _size(config, "hidden_size"), _size(config, "intermediate_size")
    vocabulary = _size(config, "vocab_size")
    found: Shapes = {
        "bert.embeddings.word_embeddings.weight": (vocabulary, width),
        "bert.embeddings.position_embeddings.weight": (_size(config, "max_position_embeddings"), width),
        "bert.embeddings.token_type_embeddings.weight": (_size(config, "type_vocab_size", 2), width),
        **_norm("bert.embeddings.LayerNorm", width),
    }
    for layer in range(_size(config, "num_hidden_layers")):
        at = f"bert.encoder.layer.{layer}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            found |= _linear(f"{at}.attention.{part}", width, width)
        found |= _norm(f"{at}.attention.output.LayerNorm", width)
        found |= _linear(f"{at}.intermediate.dense", inner, width) | _linear(f"{at}.output.dense", width, inner)
        found |= _norm(f"{at}.output.LayerNorm", width)
    if architecture not in _BERT_HEADS:
        raise ValueError(
            f"optim8.memory.plan: architectures of a bert must be one of {', '.join(_BERT_HEADS)}, got "
            f"{architecture!r}. Pass the model itself, built under torch.device('meta')."
        )
    pooled, masked, pair, labels = _BERT_HEADS[architecture]
    if pooled:
        found |= _linear("bert.pooler.dense", width, width)
    if masked:
        found |= _linear("cls.predictions.transform.dense", width, width)
        found |= _norm("cls.predictions.transform.LayerNorm", width)
        found["cls.predictions.bias"] = (vocabulary,)
        if not config.get("tie_word_embeddings", True):
            found |= _linear("cls.predictions.decoder", vocabulary, width)
    if pair:
        found |= _linear("cls.seq_relationship", 2, width)
    if labels:
        count = len(config["id2label"]) if config.get("id2label") else _size(config, "num_labels", 2)
        found |= _linear("classifier", count, width)
    return found


# Whether a bert has a pooler, a head for masked tokens, one for pairs of sentences, and one over labels.
_BERT_HEADS = {
    "BertModel": (True, False, False, False),
    "BertForMaskedLM": (False, True, False, False),
    "BertForPreTraining": (True, True, True, False),
    "BertForSequenceClassification": (True, False, False, True),
    "BertForTokenClassification": (False, False, False, True),
}

# By model_type: how to read the config, and the architecture where it names none.
FAMILIES: dict[str, tuple[Callable[[Mapping[str, Any], str], Shapes], str]] = {
    "llama": (_llama, "LlamaForCausalLM"),
    "mistral": (_mistral, "MistralForCausalLM"),
    "qwen2": (_qwen2, "Qwen2ForCausalLM"),
    "gpt2": (_gpt2, "GPT2LMHeadModel"),
    "bert": (_bert, "BertModel"),
}
