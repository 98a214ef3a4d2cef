"""How much GPU memory training takes for models that people train, by the planner: nothing is measured here.

Parameters, gradients and optimizer state of each model with torch's AdamW and optim8's optimizers, counted by
`optim8.memory.plan`, whose bytes the tests hold against those of real trainings. Activations are not in it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shared.common import add_outputs, provenance, table
from shared.plotting import STYLES, new_figure, publish

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GIB = 2**30
CARDS = (24, 48, 80)  # GiB of memory that GPUs have
_HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8}
# Sizes as published with the models' weights.
MODELS: dict[str, dict[str, Any]] = {
    "Qwen2 0.5B": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "Llama 3.2 1B": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        **_HEADS,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "Gemma 2 2B": {
        "model_type": "gemma2",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 256000,
    },
    "Phi-3 mini": {
        "model_type": "phi3",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32064,
    },
    "Llama 3 8B": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        **_HEADS,
        "vocab_size": 128256,
    },
}
# How a training is called: the optimizer, and what else the planner is told. By dtype of parameters and gradients.
TRAININGS: dict[str, dict[str, dict[str, Any]]] = {
    "float32": {
        "torch AdamW": {"optimizer": "torch-adamw"},
        "optim8 AdamW8bit": {"optimizer": "adamw8bit"},
        "optim8 Lion8bit": {"optimizer": "lion8bit"},
        "optim8 AdamW8bit, paged": {"optimizer": "adamw8bit", "paged": True},
    },
    "bfloat16": {
        "torch AdamW, float32 master": {"optimizer": "torch-adamw", "master_copies": True},
        "torch AdamW": {"optimizer": "torch-adamw"},
        "optim8 AdamW8bit": {"optimizer": "adamw8bit"},
        "optim8 Lion8bit": {"optimizer": "lion8bit"},
        "optim8 AdamW8bit, paged": {"optimizer": "adamw8bit", "paged": True},
    },
}
_STYLE = {name: STYLES[place] for place, name in enumerate(TRAININGS["float32"])}
_STYLE["torch AdamW, float32 master"] = STYLES[4]

Result = Mapping[str, Any]


def count() -> list[dict[str, Any]]:
    """A row for every model, dtype and training: bytes on the GPU, and of what is paged in host memory."""
    from optim8.memory import plan

    rows = []
    for model, config in MODELS.items():
        for dtype, trainings in TRAININGS.items():
            for training, options in trainings.items():
                planned = plan(config, dtype=dtype, beside=False, **options)
                place = {"gpu_bytes": planned.tiers["device"], "host_bytes": planned.tiers["host"]}
                rows.append({"model": model, "parameters": planned.size, "dtype": dtype, "training": training, **place})
    return rows


def draw(result: Result) -> Figure:
    """A panel for each dtype: GPU memory against the size of the model, with the memory of common GPUs."""
    figure, panels = new_figure(columns=len(TRAININGS), width=7.2, height=6.2, sharey=True)
    for axes, (dtype, trainings) in zip(panels, TRAININGS.items()):
        for training in trainings:
            rows = [row for row in result["rows"] if (row["dtype"], row["training"]) == (dtype, training)]
            points = [(row["parameters"] / 1e9, row["gpu_bytes"] / GIB) for row in rows]
            each = rows[-1]["gpu_bytes"] / rows[-1]["parameters"]
            label = f"{training}: {each:.1f} bytes a parameter"
            axes.plot(*zip(*points), label=label, **_STYLE[training].line())
        for size in CARDS:
            axes.axhline(size, color="#777777", linestyle=(0, (1, 2)))
            axes.text(-0.1, size + 1, f"GPU with {size} GiB", color="#555555", fontsize=11)
        sizes = {row["model"]: row["parameters"] / 1e9 for row in result["rows"]}
        axes.set_xticks(list(sizes.values()), list(sizes), rotation=35, ha="right")
        axes.set_title(f"parameters and gradients in {dtype}")
        axes.legend(loc="upper left", fontsize=11)
        axes.set_xlim(left=-0.2)
        axes.set_ylim(0, 165)
        axes.set_xlabel("model, at its number of parameters")
    panels[0].set_ylabel("GPU memory before activations (GiB)")
    return figure


def render(result: Result) -> str:
    headers = [f"{training}, {dtype}" for dtype, names in TRAININGS.items() for training in names]
    rows: dict[str, list[str]] = {}
    for row in result["rows"]:  # by model, and in it by dtype and training
        cells = rows.setdefault(row["model"], [row["model"], f"{row['parameters'] / 1e9:.2f} B"])
        cells.append(f"{row['gpu_bytes'] / GIB:.1f}")
    return (
        f"{table(['model', 'parameters', *headers], [*rows.values()])}\n\nGiB of GPU memory for parameters, gradients "
        "and optimizer state, counted by the planner, not measured; the dtype is that of parameters and gradients. "
        "Activations come on top. Paged: optimizer state in host memory."
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_outputs(parser, "memory_models")
    arguments = parser.parse_args(argv)
    result = {**provenance(vars(arguments)), "measured": False, "rows": count()}
    publish("memory_models", result, arguments, draw, render)
    return 0


if __name__ == "__main__":
    sys.exit(main())
