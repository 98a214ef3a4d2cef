"""How many instructions does each kernel take on 64-bit Arm, with NEON and in scalar code?

They are counted in an emulator (shared/arm.py), so that no Arm machine is needed; times cannot be had there. The scalar
kernels are those of the same compiler, which vectorizes what it can of them with the same instructions.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from shared import arm
from shared.common import add_json, json_path, provenance, table, write_json

MOST = 0.45  # of the scalar instructions; what a kernel is asked to reach
NAME = "instructions-neon"
# The kernel's name: function of tests/arm/program.cpp, and the rule that it takes.
KERNELS = {
    "step of AdamW8bit": ("step_counted", "adamw"),
    "step of Lion8bit": ("step_counted", "lion"),
    "quantize_blockwise": ("quantize_counted", None),
    "dequantize_blockwise": ("dequantize_counted", None),
}


def count(machine: arm.Machine) -> dict[str, dict[str, float]]:
    """Instructions per value by instruction set and kernel."""
    values = machine.call("counted_values")
    rules = [machine.text("rule_name", i) for i in range(len(arm.RULES))]
    counts: dict[str, dict[str, float]] = {isa: {} for isa in arm.ARM.isas}
    for isa_index, isa in enumerate(arm.ARM.isas):
        for name, (function, rule) in KERNELS.items():
            machine.call("fill_counted")
            arguments = (isa_index,) if rule is None else (isa_index, rules.index(rule))
            counts[isa][name] = machine.instructions(function, *arguments) / values
    return counts


def render(result: Mapping[str, Any]) -> str:
    scalar, neon = (result["instructions_per_value"][isa] for isa in ("scalar", "neon"))
    rows = [[name, f"{scalar[name]:.1f}", f"{neon[name]:.1f}", f"{neon[name] / scalar[name]:.2f}"] for name in scalar]
    missed = [name for name in scalar if neon[name] > result["most_of_scalar"] * scalar[name]]
    goal = f"goal: at most {result['most_of_scalar']:.2f} of the scalar ones: {'missed' if missed else 'reached'}"
    tools = ", ".join(f"{name} {version}" for name, version in result["tools"].items())
    commit = result["commit"][:10] + (" with uncommitted changes" if result["dirty"] else "")
    return "\n\n".join(
        [
            table(["kernel, float32", "scalar", "NEON", "ratio"], rows),
            f"Instructions per value, {result['values']} values in blocks of 256; {goal}.",
            f"Emulated {result['emulated']}, {tools}; commit {commit}, {result['date'].split()[0]}.",
        ]
    )


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_json(parser, NAME)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    arguments = parse_arguments(argv)
    if missing := arm.packages_missing():
        print(f"arm_instructions: needs {', '.join(missing)}. Install the extra: pip install .[arm]", file=sys.stderr)
        return 2
    machine = arm.Machine(arm.ARM.build("program"))
    result = {
        **provenance(vars(arguments)),
        "emulated": "aarch64",
        "tools": {name: importlib.metadata.version(name) for name in ("ziglang", "unicorn")},
        "values": machine.call("counted_values"),
        "most_of_scalar": MOST,
        "instructions_per_value": count(machine),
    }
    print(render(result))
    path = json_path(arguments, NAME)
    write_json(path, result)
    print(f"\nWritten: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
