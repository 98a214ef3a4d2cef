"""Shapes of the parameters that a config describes: of Hugging Face's decoders (decoders.py), gpt2 and bert, or a list
of shapes.

Sizes must be in the config. Options of structure (tied embeddings, biases, heads) have the default of the model's own
config class. Sources: the models' papers (Radford et al. 2019, arXiv 1810.04805).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from optim8.memory.models.decoders import DECODERS
from optim8.memory.models.entries import Reader, Shapes, UnknownShapes, head, size


def shapes(config: Mapping[str, Any]) -> tuple[str, Shapes]:
    """Title, and the shape of every parameter by name; parameters that are tied count once.

    Raises:
        UnknownShapes: this package does not know such a model, or what one of its options does to sizes.
        ValueError: a size is missing or no positive whole number.
    """
    kind = config.get("model_type")
    if kind is None:
        return "explicit sizes", _explicit(config)
    if kind not in FAMILIES:
        raise UnknownShapes(f"optim8.memory.plan: the shapes of a {kind!r} are not written down here")
    read, architecture = FAMILIES[kind]
    named = config.get("architectures") or [architecture]
    reader = Reader(config)
    found = read(reader, str(named[0]))
    reader.check(kind)
    return str(named[0]), found


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


def _gpt2(config: Mapping[str, Any], architecture: str) -> Shapes:
    width, vocabulary = size(config, "n_embd"), size(config, "vocab_size")
    inner = size(config, "n_inner", 4 * width)
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
        "transformer.wpe.weight": (size(config, "n_positions"), width),
    }
    for layer in range(size(config, "n_layer")):
        found |= {f"transformer.h.{layer}.{name}": shape for name, shape in block.items()}
    found |= {"transformer.ln_f.weight": (width,), "transformer.ln_f.bias": (width,)}
    return found | head(config, "lm_head.weight", architecture, True, (vocabulary, width))


def _linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _bert(config: Mapping[str, Any], architecture: str) -> Shapes:
    positions = config.get("position_embedding_type") or "absolute"
    if positions != "absolute":
        raise UnknownShapes(f"optim8.memory.plan: position_embedding_type={positions!r} is not written down here")
    width, inner = size(config, "hidden_size"), size(config, "intermediate_size")
    vocabulary = size(config, "vocab_size")
    found: Shapes = {
        "bert.embeddings.word_embeddings.weight": (vocabulary, width),
        "bert.embeddings.position_embeddings.weight": (size(config, "max_position_embeddings"), width),
        "bert.embeddings.token_type_embeddings.weight": (size(config, "type_vocab_size", 2), width),
        **_norm("bert.embeddings.LayerNorm", width),
    }
    for layer in range(size(config, "num_hidden_layers")):
        at = f"bert.encoder.layer.{layer}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            found |= _linear(f"{at}.attention.{part}", width, width)
        found |= _norm(f"{at}.attention.output.LayerNorm", width)
        found |= _linear(f"{at}.intermediate.dense", inner, width) | _linear(f"{at}.output.dense", width, inner)
        found |= _norm(f"{at}.output.LayerNorm", width)
    if architecture not in _BERT_HEADS:
        raise UnknownShapes(f"optim8.memory.plan: the shapes of a {architecture!r} are not written down here")
    heads = _BERT_HEADS[architecture]
    if heads.pooler:
        found |= _linear("bert.pooler.dense", width, width)
    if heads.masked_tokens:
        found |= _linear("cls.predictions.transform.dense", width, width)
        found |= _norm("cls.predictions.transform.LayerNorm", width)
        found["cls.predictions.bias"] = (vocabulary,)
        if not config.get("tie_word_embeddings", True):
            found |= _linear("cls.predictions.decoder", vocabulary, width)
    if heads.sentence_pairs:
        found |= _linear("cls.seq_relationship", 2, width)
    if heads.labels:
        count = len(config["id2label"]) if config.get("id2label") else size(config, "num_labels", 2)
        found |= _linear("classifier", count, width)
    return found


@dataclass(frozen=True)
class _BertHeads:
    """What an architecture has above bert's layers."""

    pooler: bool = False
    masked_tokens: bool = False
    sentence_pairs: bool = False
    labels: bool = False


_BERT_HEADS = {
    "BertModel": _BertHeads(pooler=True),
    "BertForMaskedLM": _BertHeads(masked_tokens=True),
    "BertForPreTraining": _BertHeads(pooler=True, masked_tokens=True, sentence_pairs=True),
    "BertForSequenceClassification": _BertHeads(pooler=True, labels=True),
    "BertForTokenClassification": _BertHeads(labels=True),
}

# By model_type: the function that reads the config, and the architecture of a config that names none.
FAMILIES: dict[str, tuple[Callable[[Mapping[str, Any], str], Shapes], str]] = {
    **DECODERS,
    "gpt2": (_gpt2, "GPT2LMHeadModel"),
    "bert": (_bert, "BertModel"),
}
