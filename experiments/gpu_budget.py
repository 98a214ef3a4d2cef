"""What the step should cost on an H100, counted from its machine code: `python experiments/gpu_budget.py`.

Bytes and instructions per parameter of the 8-bit step's main path, and from them the fraction of copy bandwidth that
the instructions leave possible. Needs no GPU. No measurement: a bound, to be held against one of gpu_report.py.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import sass
from common import RESULTS, provenance, table, write_json

# H100 SXM, from NVIDIA's data sheet and tuning guide; 91 % of the memory's bandwidth is what a copy is taken to reach.
MULTIPROCESSORS, CLOCK, SCHEDULERS = 132, 1.755e9, 4
COPY_BANDWIDTH = 0.91 * 3.35e12
WARP, PER_LANE, BLOCK = 32, 8, 256
BYTES = {"float": 4, "bfloat16": 2, "float16": 2}


def main_path(kernel: sass.Kernel) -> tuple[int, int]:
    """Of a whole block with 8-bit state: instructions from its first load to its last store, and shuffles among them.

    The last shuffle of the encoder before the code that re-assembles warps is the path's last but the code's stores.
    """
    opcodes = kernel.opcodes()
    loads = [i for i, opcode in enumerate(opcodes) if opcode.startswith("LDG") and "128" in opcode]
    shuffles = [i for i, opcode in enumerate(opcodes) if opcode.startswith("SHFL.IDX")]
    last = shuffles[len(shuffles) // 2 - 1]
    lengths = [length for load in loads if (length := kernel.shortest(load, last)) is not None]
    return max(lengths), len(shuffles) // 2 + kernel.count(r"SHFL\.BFLY") // 2


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        kernels = sass.kernels_of("step.cu", "sm_90", Path(folder))
    rows = []
    for name, kernel in kernels.items():
        found = re.search(r"step_rows<.*?(AdamFamily<\w+>|Lion), (?:\w+::)*(\w+), (?:\w+::)*(\w+)>", name)
        if found is None:
            continue
        rule, param, grad = found.groups()
        states = 1 if rule == "Lion" else 2
        instructions, shuffles = main_path(kernel)
        moved = 2 * BYTES[param] + BYTES[grad] + states * (2 + 2 * 4 / BLOCK)
        by_memory = COPY_BANDWIDTH / moved
        by_issue = MULTIPROCESSORS * SCHEDULERS * CLOCK * BLOCK / instructions
        # One warp shuffle a cycle and multiprocessor; a gather of table values touches up to 8 cache lines.
        by_exchange = MULTIPROCESSORS * CLOCK * BLOCK / (shuffles + 8 * PER_LANE * states)
        slowest = min(by_memory, by_issue, by_exchange)
        limit = {by_memory: "memory", by_issue: "instructions", by_exchange: "shuffles and gathers"}[slowest]
        rows.append(
            {
                "rule": {"AdamFamily<false>": "adam", "AdamFamily<true>": "adamw"}.get(rule, "lion"),
                "param": param,
                "grad": grad,
                "registers": kernel.registers,
                "warps_per_multiprocessor": 65536 // (-(-kernel.registers // 8) * 8 * WARP * 4) * 4,
                "bytes_per_parameter": moved,
                "instructions_per_parameter": instructions / PER_LANE,
                "shuffles_per_block": shuffles,
                "expected_of_copy": slowest / by_memory,
                "limit": limit,
                "parameters_per_second": slowest,
            }
        )
    constants = {"copy_bandwidth": COPY_BANDWIDTH, "multiprocessors": MULTIPROCESSORS, "clock": CLOCK}
    write_json(
        RESULTS / "gpu-budget.json", {**provenance({}), "assumed": constants, "measured": False, "kernels": rows}
    )
    heads = ["rule", "param", "grad", "registers", "bytes_per_parameter", "instructions_per_parameter", "limit"]
    cells = [[*(str(row[head])[:20] for head in heads), f"{row['expected_of_copy']:.0%}"] for row in rows]
    print(table([*heads, "of copy, at most"], cells))


if __name__ == "__main__":
    main()
