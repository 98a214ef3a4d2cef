"""What other libraries have printed of their optimizers' memory, beside what the planner counts for the same settings.

Figures are copied from the sources that each setting names; no training runs here. `optim8.memory.plan` counts
parameters, gradients and state of their optimizers and of optim8's. What a printed peak has beyond that is activations,
temporary tensors and the allocator's, which the planner does not count.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import memory_models
from shared.common import add_json, json_path, provenance, table, write_json

GB, GIB = 10**9, 2**30
_AO = "https://github.com/pytorch/ao/blob/072500abcfbdec15a429eb53160c63fb92534b85/torchao/optim/README.md"
_HUGGING_FACE = (
    "https://github.com/huggingface/transformers/blob/04b696acabab4a3ca21b1716a488d8223e57b726/docs/source/en/"
    "perf_train_gpu_one.md"
)
_FLASHOPTIM = "https://arxiv.org/abs/2602.23349v1"


def vit_huge(classes: int) -> dict[str, Any]:
    """The shapes of timm's vit_huge_patch14_224 with a head for this many classes."""
    width, hidden = 1280, 5120
    linear = {"head": (classes, width)}
    norms = ["norm"]
    for index in range(32):
        block = f"blocks.{index}"
        norms += [f"{block}.norm1", f"{block}.norm2"]
        linear |= {f"{block}.attn.qkv": (3 * width, width), f"{block}.attn.proj": (width, width)}
        linear |= {f"{block}.mlp.fc1": (hidden, width), f"{block}.mlp.fc2": (width, hidden)}
    shapes = {"cls_token": [1, 1, width], "pos_embed": [1, 257, width]}
    shapes |= {"patch_embed.proj.weight": [width, 3, 14, 14], "patch_embed.proj.bias": [width]}
    shapes |= {f"{name}.{part}": [width] for name in norms for part in ("weight", "bias")}
    shapes |= {f"{name}.weight": list(size) for name, size in linear.items()}
    shapes |= {f"{name}.bias": [size[0]] for name, size in linear.items()}
    return {"parameters": shapes}


# Sizes as published with the models' weights.
LLAMA_2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
T5_3B = {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "d_model": 1024,
    "d_ff": 16384,
    "d_kv": 128,
    "num_layers": 24,
    "num_heads": 32,
    "vocab_size": 32128,
}

Options = Mapping[str, Any]  # what the planner is told

_TORCH = {"optimizer": "torch-adamw"}
_BITSANDBYTES = {"optimizer": "bitsandbytes-adamw8bit"}
_TORCHAO = {"optimizer": "torchao-adamw8bit"}
_OURS: dict[str, Options] = {"optim8 AdamW8bit": {"optimizer": "adamw8bit"}}
_OURS_IN_16_BITS: dict[str, Options] = {
    **_OURS,
    "optim8 AdamW8bit, master_bits=24": {"optimizer": "adamw8bit", "master_bits": 24},
}


@dataclass(frozen=True)
class Setting:
    """A training whose memory somebody has printed.

    Attributes:
        training: what the source says of it.
        source, version: where the figures stand, and of which version of the library or date they are.
        of: what the figures are: "peak", "state", or "parameters, gradients and state".
        unit, unit_bytes: the unit of the figures: its name, and its bytes; None where they are bytes a parameter.
        printed: the figure and what the planner is told, by optimizer; None where it does not know the optimizer.
        ours: what the planner is told of ours.
    """

    name: str
    training: str
    source: str
    version: str
    of: str
    unit: str
    unit_bytes: int | None
    model: Mapping[str, Any]
    dtype: str
    printed: Mapping[str, tuple[float, Options | None]]
    ours: Mapping[str, Options]


SETTINGS = (
    Setting(
        "torchao: ViT-H",
        "timm's vit_huge_patch14_224 (630M parameters), resisc45, bfloat16 AMP, compiled, batch 8, 4070Ti SUPER",
        _AO,
        "PyTorch 2.4",
        "peak",
        "GB",
        GB,  # as its benchmarks/benchmark_low_bit_adam.py divides
        vit_huge(45),
        "float32",
        {
            "PyTorch (fused)": (12.23, _TORCH),
            "bnb 8-bit": (8.32, _BITSANDBYTES),
            "ao 8-bit": (8.33, _TORCHAO),
            "ao FP8 E4M3": (8.33, None),
            "lpmm 4-bit": (7.72, None),
            "ao 4-bit": (7.72, None),
        },
        _OURS,
    ),
    Setting(
        "torchao: Llama2-7B",
        "Alpaca, full bfloat16, A100, by torchtune 52d1b838; the table says GB, torchtune divides by 2**30",
        _AO,
        "PyTorch 2.4",
        "peak",
        "GiB",
        GIB,  # torchtune/training/memory.py; in 1e9 bytes the planned ones alone would be more than the peak
        LLAMA_2_7B,
        "bfloat16",
        {
            "PyTorch (fused)": (51.6, _TORCH),
            "bnb 8-bit": (39.3, _BITSANDBYTES),
            "ao 8-bit": (39.1, _TORCHAO),
            "ao 4-bit": (33.2, None),
        },
        _OURS_IN_16_BITS,
    ),
    Setting(
        "Hugging Face: a model of 3B parameters, like t5-3b",
        "AdamW, and bitsandbytes' if all of its state is quantized; calculated, not measured",
        _HUGGING_FACE,
        "commit 04b696a",
        "state",
        "GB",
        GB,
        T5_3B,
        "float32",
        {"AdamW": (24, _TORCH), "8bit BNB": (6, _BITSANDBYTES)},
        _OURS,
    ),
    Setting(
        "FlashOptim: AdamW, here for the sizes of Llama-3.1-8B",
        "from its abstract; AdamW in float32, FlashAdamW with split weights and 16-bit gradients",
        _FLASHOPTIM,
        "26 Feb 2026",
        "parameters, gradients and state",
        "bytes a parameter",
        None,
        memory_models.MODELS["Llama 3 8B"],
        "bfloat16",
        {
            "AdamW": (16, {**_TORCH, "dtype": "float32"}),
            "FlashAdamW": (7, {"optimizer": "flashoptim-adamw"}),
            "FlashAdamW with gradient release": (5, None),
        },
        _OURS_IN_16_BITS,
    ),
)
LEFT_OUT = (
    "a row of 7B parameters from Hugging Face: this version of the page has 3B only",
    "the peaks of FlashOptim's finetuning of 8B parameters: its README has them as a picture",
)

Result = Mapping[str, Any]


def count(settings: Sequence[Setting] = SETTINGS) -> list[dict[str, Any]]:
    """Each setting with its source, and a row for every optimizer: the printed figure and the planned bytes, of what
    the figure is of. Either is None where there is none."""
    from optim8.memory import plan

    found = []
    for setting in settings:
        rows = []
        ours: dict[str, tuple[float | None, Options]] = {name: (None, told) for name, told in setting.ours.items()}
        for optimizer, (printed, options) in {**setting.printed, **ours}.items():
            row: dict[str, Any] = {"optimizer": optimizer, "printed": printed, "planned_bytes": None}
            if options is not None:
                planned = plan(setting.model, **{"dtype": setting.dtype, **options}, beside=False)
                row["planned_bytes"] = planned.state_bytes if setting.of == "state" else planned.total
                row["parameters"] = planned.size
            rows.append(row)
        told = ("name", "training", "source", "version", "of", "unit", "unit_bytes", "dtype")
        found.append({**{name: getattr(setting, name) for name in told}, "rows": rows})
    return found


def in_unit(setting: Mapping[str, Any], row: Mapping[str, Any]) -> float | None:
    """The planned bytes in the unit of the printed figures."""
    if row["planned_bytes"] is None:
        return None
    return float(row["planned_bytes"] / (setting["unit_bytes"] or row["parameters"]))


def render(result: Result) -> str:
    parts = []
    for setting in result["settings"]:
        rows = []
        for row in setting["rows"]:
            printed, planned = row["printed"], in_unit(setting, row)
            cells = ["-" if printed is None else f"{printed:g}", "-" if planned is None else f"{planned:.2f}"]
            known = printed is not None and planned is not None
            rows.append([row["optimizer"], *cells, f"{round(printed - planned, 2) + 0.0:.2f}" if known else "-"])
        source = f"[{setting['version']}]({setting['source']})"
        headers = ["optimizer", f"printed, {setting['unit']}", "planned", "printed less planned"]
        parts += [f"{setting['name']}, {setting['of']}: {setting['training']} ({source}).", table(headers, rows)]
    parts.append(
        "Printed: the sources' own figures. Planned: parameters, gradients and state as the planner counts them, state "
        "alone where the figure is of state; not measured. A printed peak has activations and temporary tensors beyond "
        f"it. Left out: {'; '.join(result['left_out'])}."
    )
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_json(parser, "published")
    arguments = parser.parse_args(argv)
    result = {**provenance(vars(arguments)), "measured": False, "settings": count(), "left_out": list(LEFT_OUT)}
    path = json_path(arguments, "published")
    write_json(path, result)
    print(f"{render(result)}\n\nWritten: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
