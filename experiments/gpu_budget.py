"""What the step should cost on an H100 and an H200, counted from its machine code: `python experiments/gpu_budget.py`.

Bytes and instructions per parameter of the 8-bit step's main path, and from them the fraction of copy bandwidth that
the instructions leave possible. Needs nvcc and no GPU. Not measured: to be held against what gpu_report.py measures.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared import sass
from shared.common import add_json, json_path, provenance, table, write_json

# From NVIDIA's data sheets of H100 SXM and H200 SXM and its tuning guide; an H200's clock is taken to be an H100's.
# 91 % of the memory's bandwidth is what a copy is taken to reach.
MULTIPROCESSORS, CLOCK = 132, 1.755e9
COPY_BANDWIDTH = {"H100": 0.91 * 3.35e12, "H200": 0.91 * 4.8e12}
USABLE = 0.8  # of what a pipe can do at most: what kernels whose instructions wait for each other are taken to reach
WARP, PER_LANE, BLOCK = 32, 8, 256
BYTES = {"float": 4, "bfloat16": 2, "float16": 2}


def main_path(kernel: sass.Kernel, states: int) -> list[str]:
    """The opcodes that a warp executes for one whole block with 8-bit state: the shortest way round.

    It goes from the reduction of the maxima to the store of the last state's absmax, which is the only plain one, and
    over the loads of the next block back.
    """
    opcodes, found = kernel.opcodes(), []
    for reduction in (i for i, opcode in enumerate(opcodes) if opcode.startswith("REDUX")):
        onward = kernel.ways_from(reduction)
        for store in [i for i in onward if opcodes[i] == "STG.E"][states - 1 : states]:
            back = kernel.ways_from(store)
            if reduction in back:
                found.append([*onward[store], *back[reduction]])
    return [opcodes[i] for i in min(found, key=len)]


def turn_path(kernel: sass.Kernel, states: int) -> list[str]:
    """The opcodes of a turn of the kernel over columns, two whole blocks: from the reduction of one block's maxima over
    the store of its last absmax, and the same of the second block, back to it.
    """
    opcodes = kernel.opcodes()

    def nearest(start: int, wanted: str, which: int = 1) -> list[int]:
        ways = kernel.ways_from(start)
        return ways[[i for i in ways if re.fullmatch(wanted, opcodes[i])][which - 1]]

    reduction = next(i for i, opcode in enumerate(opcodes) if opcode.startswith("REDUX"))
    way = nearest(reduction, r"STG\.E", states)
    way += nearest(way[-1], r"REDUX.*")
    way += nearest(way[-1], r"STG\.E", states)
    way += kernel.ways_from(way[-1])[reduction]
    return [opcodes[i] for i in way]


# What one multiprocessor does in a cycle, in lanes (CUDA C++ Programming Guide, table of arithmetic throughput, compute
# capability 9.0): everything together, and what goes to a pipe of its own.
LANES_PER_CYCLE = {"issue": 128, "integer and compare": 64, "special functions": 16, "shuffles and loads": 32}
_PIPES = {
    "special functions": r"MUFU|I2F|F2I|REDUX",
    "shuffles and loads": r"SHFL|LDG|STG|LDS",
    "integer and compare": r"LOP|SHF|IADD|VIADD|LEA|PRMT|SEL|ISETP|PLOP|VIMNMX|FMNMX|FSETP|FSEL|FSET|F2FP|IMAD",
}
# A gather of table values from up to 8 lines of the cache takes up to 8 turns, an access of 16 bytes a lane 4.
_TURNS = {r"LDG.*CONSTANT": 8, r"(LDG|STG|LDS).*\.128": 4, r"(LDG|STG).*\.64": 2}


def cycles_of(path: list[str]) -> dict[str, float]:
    """Cycles of a multiprocessor that a warp's way takes at least, by what limits it."""
    lanes = dict.fromkeys(LANES_PER_CYCLE, 0.0)
    for opcode in path:
        turns = next((n for pattern, n in _TURNS.items() if re.match(pattern, opcode)), 1)
        lanes["issue"] += WARP
        for pipe, pattern in _PIPES.items():
            if re.match(pattern, opcode):
                lanes[pipe] += WARP * turns
                break
    return {name: lanes[name] / rate for name, rate in LANES_PER_CYCLE.items()}


def rows_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The 8-bit step, with dithered rounding, of float32 and bfloat16 parameters whose gradients have their dtype."""
    heads = ["rule", "dtype", "bytes/parameter", "instructions/parameter", "registers"]
    of_card = [f"{head}, {card}" for card in COPY_BANDWIDTH for head in ("held back by", "of copy expected")]
    cells = [
        [
            row["rule"],
            "float32" if row["param"] == "float" else row["param"],
            f"{row['bytes_per_parameter']:.2f}",
            f"{row['instructions_per_parameter']:.1f}",
            str(row["registers"]),
            *[cell for on in row["on"].values() for cell in (on["limit"], f"{on['of_copy_expected']:.0%}")],
        ]
        for row in rows
        if row["param"] == row["grad"] != "float16"
    ]
    return table([*heads, *of_card], cells)


def on_card(taken: Mapping[str, float], nbytes: float, bandwidth: float) -> dict[str, Any]:
    """What limits a block that takes these cycles and moves these bytes, at most and as we expect."""
    memory = BLOCK * nbytes / bandwidth * MULTIPROCESSORS * CLOCK
    cycles = {**taken, "memory": memory}
    limit = max(cycles, key=lambda name: cycles[name])
    return {
        "memory_cycles_per_block": memory,
        "limit": limit,
        "of_copy_bound": memory / cycles[limit],
        "of_copy_expected": min(1.0, USABLE * memory / max(taken.values())),
        "issue_share_needed": taken["issue"] / memory,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json(parser, "gpu_budget")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        kernels = sass.step_kernels("sm_90", Path(folder))
    rows, rules = [], sass.rules_by_type()
    for name, kernel in kernels.items():
        types = r", ".join([r"(?:\w+::)*(\w+)"] * 2)
        found = re.search(rf"step_(rows|columns)<(?:\w+::)*(\w+), {sass.DITHERED}, {types}[,>]", name)
        if found is None:
            continue
        kind, struct, param, grad = found.groups()
        rule = rules[struct]
        states = len(rule.moments)
        if not states:  # what memory limits anyway
            continue
        path, blocks = (turn_path(kernel, states), 2) if kind == "columns" else (main_path(kernel, states), 1)
        taken = {limit: cycles / blocks for limit, cycles in cycles_of(path).items()}
        low_bytes = sum(moment.wide for moment in rule.moments)
        moved = 2 * BYTES[param] + BYTES[grad] + states * (2 + 2 * 4 / BLOCK) + 2 * low_bytes
        rows.append(
            {
                "rule": rule.name if kind == "rows" else f"{rule.name}, columns",
                "param": param,
                "grad": grad,
                "registers": kernel.registers,
                "warps_per_multiprocessor": 65536 // (-(-kernel.registers // 8) * 8 * WARP * 4) * 4,
                "bytes_per_parameter": moved,
                "instructions_per_parameter": len(path) / PER_LANE / blocks,
                "cycles_per_block": taken,
                "on": {card: on_card(taken, moved, bandwidth) for card, bandwidth in COPY_BANDWIDTH.items()},
            }
        )
    constants = {"copy_bandwidth": COPY_BANDWIDTH, "multiprocessors": MULTIPROCESSORS, "clock": CLOCK, "usable": USABLE}
    result = json_path(arguments, "gpu_budget")
    write_json(result, {**provenance({}), "assumed": constants, "measured": False, "kernels": rows})
    print(f"{rows_table(rows)}\n\nWritten: {result}")


if __name__ == "__main__":
    main()
