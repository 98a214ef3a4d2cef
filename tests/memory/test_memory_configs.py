"""Configs, files and the command line of the planner: sizes as published, errors that say what to do."""

from __future__ import annotations

import resource
import sys
from typing import Any

import pytest
import torch

import optim8
from optim8.memory.models import configs
from optim8.memory.planning import budget
from optim8.memory.planning.plans import budget_bytes
from optim8.text import size_cell

LLAMA = {"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32}
LLAMA_7B = {**LLAMA, "intermediate_size": 11008, "vocab_size": 32000}
LLAMA_8B = {**LLAMA, "intermediate_size": 14336, "vocab_size": 128256, "num_key_value_heads": 8}
LLAMA_70B = {
    **LLAMA_8B,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "intermediate_size": 28672,
    "torch_dtype": "bfloat16",
}
GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}
BERT = {
    "model_type": "bert",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 30522,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
}
QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
MIXTRAL = {**LLAMA_7B, "model_type": "mixtral", "intermediate_size": 14336, "num_local_experts": 8}
QWEN2_MOE = {
    **QWEN2,
    "model_type": "qwen2_moe",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 60,
    "tie_word_embeddings": False,
}
QWEN3 = {
    **QWEN2,
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 28,
}
QWEN3_MOE = {
    **QWEN3,
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_hidden_layers": 48,
    "num_experts": 128,
    "tie_word_embeddings": False,
}
GEMMA2 = {**QWEN2, "model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26}
GEMMA2 |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256000}
PHI3 = {**LLAMA, "model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "vocab_size": 32064}
# Numbers of parameters as published with the weights of these models.
PUBLISHED: list[tuple[dict[str, Any], int]] = [
    (LLAMA_7B, 6_738_415_616),
    (LLAMA_8B, 8_030_261_248),
    (LLAMA_70B, 70_553_706_496),
    ({**LLAMA_8B, "model_type": "mistral", "vocab_size": 32000}, 7_241_732_096),
    (MIXTRAL, 46_702_792_704),
    (QWEN2, 494_032_768),
    (QWEN2_MOE, 14_315_784_192),
    (QWEN3, 596_049_920),
    (QWEN3_MOE, 30_532_122_624),
    (GEMMA2, 2_614_341_888),
    (PHI3, 3_821_079_552),
    (GPT2, 124_439_808),
    ({**GPT2, "n_embd": 1600, "n_layer": 48, "n_head": 25}, 1_557_611_200),
    (BERT, 109_482_240),
    ({**BERT, "architectures": ["BertForPreTraining"]}, 110_106_428),
]

# What a config may say about how parts are joined, each far from the default.
VARIANTS: list[dict[str, Any]] = [
    {**{key: value for key, value in QWEN3_MOE.items() if key != "num_experts"}, "num_local_experts": 128},
    {**LLAMA_7B, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    {**LLAMA_7B, "head_dim": 96, "num_key_value_heads": 4, "architectures": ["LlamaModel"]},
    {**QWEN2, "tie_word_embeddings": False},
    {**MIXTRAL, "head_dim": 64, "tie_word_embeddings": True},
    {**QWEN2_MOE, "qkv_bias": False, "mlp_only_layers": [1], "intermediate_size": 999},
    {**QWEN3_MOE, "decoder_sparse_step": 2, "attention_bias": True, "head_dim": 32},
    {**QWEN3, "attention_bias": True, "architectures": ["Qwen3Model"]},
    {**GEMMA2, "tie_word_embeddings": False, "attention_bias": True},
    {**PHI3, "num_key_value_heads": 8, "tie_word_embeddings": True},
    {**GPT2, "n_inner": 100, "tie_word_embeddings": False},
    {**GPT2, "architectures": ["GPT2Model"]},
    *[{**BERT, "architectures": [name], "num_labels": 5} for name in configs._BERT_HEADS],
    {**BERT, "architectures": ["BertForMaskedLM"], "tie_word_embeddings": False},
]


@pytest.mark.parametrize("config, count", PUBLISHED, ids=lambda value: str(value)[:40])
def test_sizes_are_those_published(config: dict[str, Any], count: int) -> None:
    assert optim8.memory.plan(config, beside=False).size == count


@pytest.mark.peers
@pytest.mark.parametrize("config", [row for row, _ in PUBLISHED] + VARIANTS, ids=lambda value: str(value)[:40])
def test_shapes_are_those_of_transformers(config: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    config = {**config, **({"n_layer": 2} if config["model_type"] == "gpt2" else {"num_hidden_layers": 2})}
    title, shapes = configs.shapes(config)
    with torch.device("meta"):
        model = getattr(transformers, title)(transformers.AutoConfig.for_model(**config))
    expected = sorted(tuple(p.shape) for p in model.parameters())
    assert sorted(shapes.values()) == expected


# Not written down in this package: transformers builds them. Numbers as published with the weights.
BUILT: list[tuple[dict[str, Any], str, int]] = [
    (
        {"model_type": "opt", "architectures": ["OPTForCausalLM"], "hidden_size": 768, "ffn_dim": 3072},
        "OPTForCausalLM",
        125_239_296,
    ),
    (
        {"model_type": "t5", "d_model": 512, "d_ff": 2048, "d_kv": 64, "num_heads": 8, "num_layers": 6},
        "T5ForConditionalGeneration",
        60_506_624,
    ),
    (
        {"model_type": "vit", "architectures": ["ViTForImageClassification"], "num_labels": 1000},
        "ViTForImageClassification",
        86_567_656,
    ),
    (
        {
            "model_type": "deepseek_v2",
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_hidden_layers": 27,
            "vocab_size": 102400,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 512,
            "q_lora_rank": None,
        },
        "DeepseekV2ForCausalLM",
        15_706_484_224,
    ),
    (
        {**LLAMA_7B, "architectures": ["LlamaForSequenceClassification"]},
        "LlamaForSequenceClassification",
        6_607_351_808,
    ),
    ({**BERT, "architectures": ["BertForQuestionAnswering"]}, "BertForQuestionAnswering", 108_893_186),
    ({**GPT2, "architectures": ["GPT2DoubleHeadsModel"], "num_labels": 1}, "GPT2DoubleHeadsModel", 124_440_577),
]


@pytest.mark.peers
@pytest.mark.parametrize("config, title, count", BUILT, ids=[title for _, title, _ in BUILT])
def test_other_models_are_built_by_transformers(config: dict[str, Any], title: str, count: int) -> None:
    pytest.importorskip("transformers")
    planned = optim8.memory.plan({**config, "torch_dtype": "bfloat16"}, beside=False)
    assert (planned.title, planned.size, planned.dtypes) == (title, count, ("bfloat16",))
    assert optim8.memory.plan(config, dtype="float16", beside=False).bytes["parameters"] == 2 * count


UNBUILT: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "none-such"}, "of a 'none-such' are not written down here.*knows no such model type"),
    (
        {"model_type": "t5", "architectures": ["MyT5"]},
        "cannot build it.*names MyT5.*Mend the config, or pass the model",
    ),
    ({"model_type": "opt", "hidden_size": "wide"}, "cannot build it.*hidden_size"),
]


@pytest.mark.peers
@pytest.mark.parametrize("config, message", UNBUILT, ids=[message[:30] for _, message in UNBUILT])
def test_what_transformers_cannot_build_is_refused(config: dict[str, Any], message: str) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=f"(?s)^optim8.memory.plan: .*{message}"):
        optim8.memory.plan(config)


def test_without_transformers_other_models_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for config in ({"model_type": "t5"}, {**BERT, "architectures": ["BertForQuestionAnswering"]}):
        with pytest.raises(ValueError, match=r"not installed. Install it \(pip install transformers\), or pass"):
            optim8.memory.plan(config)
    assert optim8.memory.plan(MIXTRAL, beside=False).size == 46_702_792_704


UNREAD: list[dict[str, Any]] = [
    {**GPT2, "add_cross_attention": True},
    {**BERT, "position_embedding_type": "relative_key"},
    {**BERT, "pruned_heads": {"0": [1]}},
    {**LLAMA_8B, "num_nextn_predict_layers": 1},
    {**LLAMA_8B, "vocabulary_size": 7},
    {**QWEN3, "mlp_bias": True},
]


@pytest.mark.parametrize("config", UNREAD, ids=lambda config: list(config)[-1])
def test_options_that_change_sizes_and_are_not_read_are_refused(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where transformers is there it builds the model; else nothing is left out without a word."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    name = list(config)[-1]
    with pytest.raises(ValueError, match=rf"{name}=.* not written down here, and transformers, .* not installed"):
        optim8.memory.plan(config)
    neutral = {**config, name: None, "rope_theta": 5e5, "max_window_layers": 28, "num_experts_per_tok": 2}
    assert optim8.memory.plan(neutral, beside=False).size


SMALL = {
    **dict.fromkeys(("hidden_size", "n_embd"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_key_value_heads"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_local_experts", "num_experts"), 4),
    "intermediate_size": 96,
    "vocab_size": 100,
    "n_positions": 32,
    "max_position_embeddings": 32,
    "head_dim": 16,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "pad_token_id": 0,
    "layer_types": None,
}


def changed(value: Any) -> list[Any]:
    """Other values that an option may have, by what it has."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [2 * value, value + 1]
    return [True, 3, 32] if value is None else [[0]] if value == [] else []


@pytest.mark.peers
@pytest.mark.slow
@pytest.mark.parametrize("kind", configs.FAMILIES)
def test_every_option_of_transformers_is_read_or_refused(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    written = transformers.AutoConfig.for_model(kind).to_dict()
    written = {name: SMALL.get(name, value) if value is not None else None for name, value in written.items()}
    for name, value in written.items():
        for other in changed(value) if name not in ("model_type", "architectures", "dtype") else []:
            config = {**written, name: other}
            try:
                with torch.device("meta"):
                    made = transformers.AutoConfig.for_model(**config)
                    model = getattr(transformers, configs.FAMILIES[kind][1])(made)
            except Exception:
                continue  # no model
            try:
                _, shapes = configs.shapes(config)
            except ValueError:
                continue
            expected = sorted(tuple(p.shape) for p in model.parameters())
            assert sorted(shapes.values()) == expected, f"{name}={other!r}"


def test_70b_needs_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    planned = optim8.memory.plan(LLAMA_70B)
    assert planned.dtypes == ("bfloat16",)
    assert planned.bytes["parameters"] == 2 * 70_553_706_496
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB


def test_a_config_of_another_library_is_read_as_its_dict() -> None:
    class Config:
        def to_dict(self) -> dict[str, Any]:
            return GPT2

    assert optim8.memory.plan(Config()).bytes == optim8.memory.plan(GPT2).bytes
    assert optim8.memory.plan({**GPT2, "quantization_config": None}).bytes == optim8.memory.plan(GPT2).bytes


ERRORS: list[tuple[Any, dict[str, Any], str]] = [
    (7, {}, "the model must be"),
    ({**LLAMA_7B, "vocab_size": None}, {}, "'vocab_size'.*got nothing"),
    ({**GPT2, "n_layer": True}, {}, "'n_layer'.*got True"),
    ({**LLAMA_7B, "quantization_config": {"bits": 4}}, {}, "a quantized model .*Take that entry out"),
    ({**MIXTRAL, "num_local_experts": None}, {}, "'num_experts' or 'num_local_experts'.*got nothing"),
    ({**QWEN3_MOE, "num_local_experts": 7}, {}, "'num_experts' and 'num_local_experts' must agree, got 128 and 7"),
    ({}, {}, "needs 'model_type', or sizes"),
    ({"w": [3, "x"]}, {}, "shape of 'w'"),
    ({"w": [3]}, {"optimizer": "sgd"}, "optimizer must be one of adadelta8bit, .*, adamw8bit, .*got 'sgd'"),
    ({"w": [3]}, {"optimizer": torch.optim.AdamW}, "must be one of adadelta8bit, .*, adamw8bit, .*AdamW'>"),
    ({"w": [3]}, {"optimizer": "adamw-8bit"}, "Do you mean 'adamw8bit'"),
    ({"w": [3]}, {"optimizer": "torch-adamw", "optim_bits": 8}, "optim_bits belongs to optim8"),
    ({"w": [3]}, {"optimizer": "torch-adamw", "paged": True}, "paged belongs to optim8"),
    ({"w": [3]}, {"paged": "yes"}, "paged must be True, False or"),
    ({"w": [3]}, {"optimizer": "pagedlion8bit", "paged": False}, "always paged"),
    ({"w": [3]}, {"sharding": "zero"}, "sharding must be one of ddp, fsdp"),
    ({"w": [3]}, {"world_size": 0}, "world_size must be"),
    ({"w": [3]}, {"device": "tpu"}, "device must be"),
    ({"w": [3]}, {"dtype": "int8"}, "dtype must be one of"),
    ({"w": [3]}, {"dtype": "float64"}, "must be dense and float32, bfloat16 or float16"),
    ({"w": [3]}, {"optim_bits": 4}, "optim_bits must be 8, 16 or 32"),
    (
        torch.nn.Linear(2, 2),
        {"optimizer": optim8.AdamW8bit(torch.nn.Linear(2, 2).parameters())},
        "must be a parameter of the model",
    ),
]


@pytest.mark.parametrize("source, options, message", ERRORS, ids=[row[2][:30] for row in ERRORS])
def test_what_cannot_be_planned_is_refused(source: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        optim8.memory.plan(source, **options)


def test_what_fits_a_budget() -> None:
    planned = optim8.memory.plan(LLAMA_7B, "torch-adamw")
    need = planned.tiers["device"]
    assert planned.fits(need)
    assert not planned.fits(need - 1)
    found = {option.name: option for option in budget.options(planned, "80GiB")}
    assert [name for name, option in found.items() if option.fits] == [
        "optimizer='adamw8bit'",
        "optimizer='lion8bit'",
        "dtype='bfloat16'",
        "sharding='fsdp', world_size=2",
    ]
    assert found["dtype='bfloat16'"].plan.bytes == optim8.memory.plan(LLAMA_7B, "torch-adamw", dtype="bfloat16").bytes
    left = 2**40 - need
    assert f"at most the {size_cell(left)} that are left" in budget.describe(budget.options(planned, "1TiB"), "1TiB")
    assert "None of these fits" in budget.describe(budget.options(planned, 1), 1)


def test_two_changes_at_once_where_one_is_too_little() -> None:
    planned = optim8.memory.plan(LLAMA_7B, "torch-adamw", beside=False)
    limit = 14 * 6_738_415_616 // 2  # what parameters and gradients of 16 bits with state of 8 bits take, and more
    found = {option.name: option for option in budget.options(planned, limit)}
    both = "optimizer='adamw8bit', dtype='bfloat16'"
    assert [name for name, option in found.items() if option.fits] == [
        both,
        "optimizer='lion8bit', dtype='bfloat16'",
        "sharding='fsdp', world_size=4",
    ]
    assert found[both].plan.bytes == optim8.memory.plan(LLAMA_7B, "adamw8bit", dtype="bfloat16").bytes
    assert both in budget.describe(list(found.values()), limit)


@pytest.mark.parametrize(
    "text, size",
    [
        ("24GiB", 24 * 2**30),
        ("1.5 KiB", 1536),
        ("80GB", 80 * 10**9),
        ("7B", 7),
        (7, 7),
        ("3kB", 3000),
        ("24Gib", 24 * 2**30),
    ],
)
def test_sizes_as_text(text: str | int, size: int) -> None:
    assert budget_bytes(text) == size


@pytest.mark.parametrize("text", ["24", "2.5 "])
def test_sizes_without_a_unit_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=rf"needs a unit, got '{text}'. Write {text.strip()}GiB"):
        budget_bytes(text)


@pytest.mark.parametrize("text", ["", "GiB", "24iB", "-1", "nan", "inf", "1e400", -1, True, None, "24 GiB extra"])
def test_sizes_that_are_none(text: Any) -> None:
    with pytest.raises(ValueError, match="a size must be"):
        budget_bytes(text)


def test_bytes_are_printed_in_binary_units() -> None:
    assert [size_cell(n) for n in (0, 999, 1000, 2**20, 5 * 2**40)] == [
        "0 B",
        "999 B",
        "0.98 KiB",
        "1.00 MiB",
        "5.00 TiB",
    ]
