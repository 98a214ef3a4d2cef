"""What the compiler made of a kernel: its registers, its memory accesses, and the length of its main path."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from optim8 import rules
from optim8.rules import Rule

ROOT = Path(__file__).resolve().parents[2]
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", f"-I{ROOT / 'csrc'}"]
# Rules that have the kernel over columns (in_columns in csrc/core/rules).
IN_COLUMNS = ("Adam", "AdamW", "Lion")
DITHERED = r"(?:\w+::)*Coding<\(optim8::base::Rounding\)1, true, false>"  # in the names of kernels
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);")


def rules_by_type() -> dict[str, Rule]:
    """The rules by the names of their structs, which stand in the names of kernels."""
    lines = re.findall(r"X\((\w+), (\w+)\)", (ROOT / "csrc/core/rules/all.h").read_text())
    return {struct: rules.every()[name] for name, struct in lines}


def tool_folder() -> Path | None:
    """Where cuobjdump and nvdisasm are: from their packages, or the toolkit's."""
    packaged = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin"))
    for folder in [*packaged, Path(shutil.which("cuobjdump") or "/").parent]:
        if (folder / "cuobjdump").exists() and (folder / "nvdisasm").exists():
            return folder
    return None


def opcode_of(text: str) -> str:
    """An instruction without its predicate and its operands."""
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


@dataclass(frozen=True)
class Kernel:
    """One kernel's instructions, as (address, text), and the registers of a thread."""

    name: str
    instructions: tuple[tuple[int, str], ...]
    registers: int

    def opcodes(self) -> list[str]:
        return [opcode_of(text) for _, text in self.instructions]

    def count(self, pattern: str) -> int:
        return sum(bool(re.match(pattern, opcode)) for opcode in self.opcodes())

    @cached_property
    def _following(self) -> list[list[int]]:
        """Of each instruction those that may come after it."""
        places = {address: i for i, (address, _) in enumerate(self.instructions)}
        last = len(self.instructions) - 1
        return [[to for to in self._next(i, places) if to <= last] for i in range(len(self.instructions))]

    def _next(self, i: int, places: dict[int, int]) -> list[int]:
        text = self.instructions[i][1]
        predicated = text.startswith("@")
        opcode = opcode_of(text)
        if opcode == "EXIT":
            return [i + 1] if predicated else []
        if opcode.startswith("BRA.DIV"):
            return [i + 1]  # taken by a warp that has come apart, to make it whole before a shuffle
        target = re.search(r"0x([0-9a-f]+)", text) if opcode == "BRA" or opcode.startswith("BRA.") else None
        if target is None or int(target[1], 16) not in places:
            return [i + 1]
        jump = places[int(target[1], 16)]
        conditional = predicated or re.search(r"\bU?!?P\d", text) is not None
        return [jump, i + 1] if conditional else [jump]

    def ways_from(self, start: int) -> Ways:
        """The shortest ways: rare paths are detours, so the main one."""
        before: dict[int, int] = {}
        reached = [start]
        for i in reached:
            for following in self._following[i]:
                if following not in before:
                    before[following] = i
                    reached.append(following)
        return Ways(start, before)


@dataclass(frozen=True)
class Ways(Mapping[int, list[int]]):
    """For each instruction that can be reached, nearest first, the shortest way there.

    A way begins after `start` and ends with the instruction it leads to, which may be `start` itself.
    """

    start: int
    before: dict[int, int]

    def __getitem__(self, goal: int) -> list[int]:
        way = [goal]
        while self.before[way[-1]] != self.start:
            way.append(self.before[way[-1]])
        return way[::-1]

    def __iter__(self) -> Iterator[int]:
        return iter(self.before)

    def __len__(self) -> int:
        return len(self.before)


# Of parameters and gradients, as C++ has them.
TYPES = [("float", "float"), *((narrow, grad) for narrow in ("bfloat16", "float16") for grad in (narrow, "float"))]


def step_kernels(arch: str, folder: Path, types: Sequence[tuple[str, str]] = TYPES) -> dict[str, Kernel]:
    """The kernels of the step with dithered rounding in 8 bits, for every rule that keeps state, by demangled name.

    Of the kernels over columns those whose gradients are not scaled.
    """
    lines = [
        '#include "cuda/step_columns.h"',
        "OPTIM8_BEGIN",
        "using Dithered = Coding<Rounding::Dithered, true, false>;",
    ]
    of = "const __grid_constant__ StepBatch"
    for rule in (name for name, rule in rules_by_type().items() if rule.moments):
        columns = rule in IN_COLUMNS
        lines.append(f"static_assert({rule}::in_columns == {str(columns).lower()});")
        for param, grad in types:
            lines.append(f"template __global__ void step_rows<{rule}, Dithered, {param}, {grad}>({of}<{rule}>);")
            if columns:
                kernel = f"step_columns<{rule}, Dithered, {param}, {grad}, false>"
                lines.append(f"template __global__ void {kernel}({of}<{rule}>);")
    source = folder / "step_kernels.cu"
    source.write_text("\n".join([*lines, "OPTIM8_END", ""]))
    return kernels_of(source, arch, folder)


def weight_kernels(arch: str, folder: Path, rules: Sequence[str]) -> dict[tuple[str, str], Kernel]:
    """Of each of these rules and each kind of weight (core/weight.h) a kernel that steps whole blocks of bfloat16
    weights of this kind, whose state is dithered in 8 bits, and no others.
    """
    kinds = ("Plain", "Dithered", "Bits24", "Bits32")
    of = "const __grid_constant__ StepBatch"
    source = folder / "weight_kernels.cu"
    source.write_text(
        f"""#include "cuda/step_rows.h"
OPTIM8_BEGIN
template <class Rule, Weight kind>
__global__ void __launch_bounds__(threads_per_block, blocks_at_least<Rule>) step_weights({of}<Rule> batch) {{
    using Dithered = Coding<Rounding::Dithered, true, false>;
    const LaneStates<Rule, Dithered> lane_states;
    bool all = true;
    each_block(batch, [&](const StepRow<Rule>& row, int64_t block, const StepScalars<Rule>& scalars, int) {{
        Block<Rule, bfloat16, bfloat16> at(row, block);
        at.weight = kind;
        all = step_quickly<kind != Weight::Plain, Dithered>(at, scalars, lane_states) && all;
    }});
    if (!all) atomicOr(static_cast<uint32_t*>(batch.row[0].param), 1u);
}}
"""
        + "\n".join(
            f"template __global__ void step_weights<{rule}, Weight::{kind}>({of}<{rule}>);"
            for rule in rules
            for kind in kinds
        )
        + """
OPTIM8_END
"""
    )
    found = {}
    for name, kernel in kernels_of(source, arch, folder).items():
        of_name = re.search(r"step_weights<(?:\w+::)*(\w+), .*?(\d)>", name)
        if of_name is not None:
            found[of_name[1], kinds[int(of_name[2])]] = kernel
    return found


def kernels_of(source: Path, arch: str, folder: Path) -> dict[str, Kernel]:
    """The kernels of a source for an architecture such as "sm_90", by demangled name."""
    tools = tool_folder()
    if tools is None:
        raise RuntimeError("needs cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    cubin = str(folder / f"{source.stem}.{arch}.cubin")
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}

    def output(*command: str) -> str:
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    output("nvcc", *NVCC_FLAGS, f"-arch={arch}", "-cubin", str(source), "-o", cubin)
    usage = output("cuobjdump", "-res-usage", cubin)
    registers = {name: int(n) for name, n in re.findall(r"Function (\S+?):\s+REG:(\d+)", usage)}
    found = {}
    for part in output("cuobjdump", "-sass", cubin).split("Function : ")[1:]:
        mangled = part.split()[0]
        lines = tuple((int(address, 16), text.strip()) for address, text in _LINE.findall(part))
        name = output("c++filt", mangled).strip()
        found[name] = Kernel(name, lines, registers[mangled])
    return found
