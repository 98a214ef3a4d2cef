"""Which AdamW8bit for which GPU: the most precise one that fits a model, by the planner: nothing is measured here.

`choices` of the planner are tried in its order for known models, with a part of each GPU's memory left to activations.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import memory_models
from memory_models import GIB, MODELS
from shared.common import add_json, json_path, provenance, table, write_json

CARDS = (16, *memory_models.CARDS)  # GiB
ROOM = 0.25  # of a GPU's memory, for activations and all else that the planner does not count
DTYPES = ("bfloat16", "float32")  # of parameters and gradients
# Of a large tensor, scales and the count of steps take what they take in any model.
_LARGE = {"parameters": {"weight": [2**14, 2**14]}}
_STATES: dict[str, dict[str, Any]] = {
    "AdamW8bit, 32-bit state": {"optim_bits": 32},
    "AdamW8bit, 16-bit state": {"optim_bits": 16},
    "AdamW8bit": {},
    "AdamW8bit, paged": {"paged": True},
    "Lion8bit": {"optimizer": "lion8bit"},
}
_WEIGHTS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16, `master_bits=32`": {"dtype": "bfloat16", "master_bits": 32},
    "bfloat16, `master_bits=24`": {"dtype": "bfloat16", "master_bits": 24},
    "bfloat16": {"dtype": "bfloat16"},
}

Result = Mapping[str, Any]


def count_bytes() -> list[dict[str, Any]]:
    """Bytes on the GPU for each parameter: weight, gradient and state, by weights and by state."""
    from optim8.memory import plan

    rows = []
    for weights, of_weights in _WEIGHTS.items():
        for state, of_state in _STATES.items():
            planned = plan(_LARGE, beside=False, **of_weights, **of_state)
            # The memory through which paged state goes has a fixed size, whatever the model has.
            through = sum(row.nbytes for row in planned.rows if row.kind == "paging buffers" and row.tier == "device")
            taken = (planned.tiers["device"] - through) / planned.size
            rows.append({"weights": weights, "state": state, "bytes_per_parameter": taken})
    return rows


def choose() -> list[dict[str, Any]]:
    """A row for every model, dtype and GPU: what changes from AdamW8bit as by default, and the bytes that it takes."""
    from optim8.memory import plan
    from optim8.memory.planning import budget, trainers

    rows = []
    for model, config in MODELS.items():
        for dtype in DTYPES:
            planned = plan(config, dtype=dtype, beside=False)
            for card in CARDS:
                limit = int(card * GIB * (1 - ROOM))
                sharded = (option for option in budget.options(planned, limit) if "world_size" in option.change)
                found = next((option for option in [*trainers.choices(planned, limit), *sharded] if option.fits), None)
                row = {"model": model, "parameters": planned.size, "dtype": dtype, "gpu_gib": card, "choice": None}
                if found:
                    row["choice"] = {key: value for key, value in found.change.items() if key != "budget"}
                    row |= {"gpu_bytes": found.plan.tiers["device"], "host_bytes": found.plan.tiers["host"]}
                rows.append(row)
    return rows


def cell(row: Mapping[str, Any]) -> str:
    """A choice in words, with the GiB that it takes."""
    choice = row["choice"]
    if choice is None:
        return "nothing"
    size = f"{row['gpu_bytes'] / GIB:.1f}"
    if "world_size" in choice:
        return f"{choice['world_size']} GPUs: {size} each"
    if "paged" in choice:
        return f"paged: {size}, and {row['host_bytes'] / GIB:.1f} on the host"
    weights = f"weights {choice['master_bits']}, " if "master_bits" in choice else ""
    return f"{weights}state {choice['optim_bits']}: {size}"


def render(result: Result) -> str:
    """The choice for each model and GPU, a table for each dtype."""
    parts = []
    for dtype in DTYPES:
        rows: dict[str, list[str]] = {}
        for row in result["rows"]:
            if row["dtype"] == dtype:
                name = f"{row['model']}, {row['parameters'] / 1e9:.2f} B"
                rows.setdefault(row["model"], [name]).append(cell(row))
        headers = [f"weights and gradients in {dtype}", *(f"{card} GiB" for card in CARDS)]
        parts.append(table(headers, [*rows.values()]))
    parts.append(
        "Bits of weights (`master_bits`) and of state (`optim_bits`), and GiB of GPU memory for parameters, gradients "
        "and state of AdamW8bit, counted by the planner, not measured. "
        f"{ROOM:.0%} of the memory is left to activations; where they take less or more, another choice fits. Paged: "
        "state in host memory as far as it does not fit, weights 16. GPUs: all of it sharded over so many (FSDP2), "
        "weights 16, state 8."
    )
    return "\n\n".join(parts)


def render_bytes(result: Result) -> str:
    """Bytes for each parameter, by weights and by state."""
    rows: dict[str, list[str]] = {}
    for row in result["bytes"]:
        rows.setdefault(row["weights"], [row["weights"]]).append(f"{row['bytes_per_parameter']:.2f}")
    headers = ["bytes a parameter on the GPU", *dict.fromkeys(row["state"] for row in result["bytes"])]
    return (
        f"{table(headers, [*rows.values()])}\n\nWeight, gradient of the same dtype, and state of a large tensor, "
        "counted by the planner. Paged: state is in host memory, but for a buffer of a fixed size."
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_json(parser, "memory_choices")
    arguments = parser.parse_args(argv)
    result = {**provenance(vars(arguments)), "measured": False, "bytes": count_bytes(), "rows": choose()}
    path = json_path(arguments, "memory_choices")
    write_json(path, result)
    print(f"\n{render_bytes(result)}\n\n{render(result)}\n\nWritten: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
