"""What nvcc makes of the step kernel, read from its machine code: 128-bit accesses, no local memory, few registers."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "experiments"))
import gpu_budget
from shared import sass

from optim8.rules import Rule

pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None or sass.tool_folder() is None, reason="needs nvcc, cuobjdump and nvdisasm"
)

TYPES = ["float, float", "optim8::base::bfloat16, optim8::base::bfloat16"]
# 65536 registers of a multiprocessor for 16 warps of 32 threads: enough loads in flight to fill the memory.
MOST_REGISTERS = 128
# Three states take more: 12 warps.
MOST_REGISTERS_OF_THREE = 168
RULES = sass.rules_by_type()
STATEFUL = {name: rule for name, rule in RULES.items() if rule.moments}
# Of a parameter, 8 to a lane, by the number of states, and what a square root and a low byte add: little above what the
# rules have today, so that a path that becomes longer is seen. gpu_budget says what limits each.
MOST_INSTRUCTIONS = {1: 49, 2: 79, 3: 101}
OF_ROOT, OF_LOW_BYTE = 9, 7
# Of the kernel over columns, in float32 and in 16 bits.
MOST_IN_COLUMNS = {"Adam": (60, 63), "AdamW": (58, 63), "Lion": (32, 36)}
# What weights that are wider than their bfloat16 parameters, or dithered, add.
MOST_OF_WEIGHTS = 6
# The square roots of a formula that are not those of its states as they are kept.
MORE_ROOTS = {"Adadelta": 2, "RMSpropCentered": 1, "RMSpropCenteredMomentum": 1}


def most_instructions(name: str, rule: Rule) -> int:
    roots = sum(moment.root for moment in rule.moments) + MORE_ROOTS.get(name, 0)
    low_bytes = sum(moment.wide for moment in rule.moments)
    return MOST_INSTRUCTIONS[len(rule.moments)] + OF_ROOT * roots + OF_LOW_BYTE * low_bytes


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, sass.Kernel]:
    """Of the types that differ most: float16 is as bfloat16. Building the module looks at all for local memory."""
    return sass.step_kernels("sm_90", tmp_path_factory.mktemp("sass"), [("float", "float"), ("bfloat16", "bfloat16")])


def step_kernel(kernels: dict[str, sass.Kernel], rule: str, types: str, kind: str = "rows") -> sass.Kernel:
    pattern = re.compile(rf"step_{kind}<(\w+::)*{rule}, {sass.DITHERED}, {types}[,>]")
    (found,) = [kernel for name, kernel in kernels.items() if pattern.search(name)]
    return found


def ends_at(path: list[str], opcode: str) -> list[list[str]]:
    """A way that goes round, in parts that each begin behind the last of neighbours with this opcode and end there."""
    places = [i for i, of in enumerate(path) if of.startswith(opcode)]
    last = [i for i, following in zip(places, [*places[1:], len(path) + places[0]], strict=True) if following - i > 8]
    twice = [*path, *path]
    return [twice[i + 1 : following] for i, following in zip(last, [*last[1:], len(path) + last[0]], strict=True)]


@pytest.mark.parametrize("rule", STATEFUL)
def test_float32_is_read_and_written_by_packets_of_128_bits(kernels: dict[str, sass.Kernel], rule: str) -> None:
    kernel = step_kernel(kernels, rule, "float, float")
    states = len(RULES[rule].moments)
    reads = 1 if RULES[rule].gives_direction else 2  # what is put in the place of the parameter does not depend on it
    # 8 values a lane are two packets: of param and grad in both 8-bit forms, and with each state in 32 bits.
    assert kernel.count(r"LDG\..*\.128") == 2 * reads * 2 + 2 * (reads + states)
    assert kernel.count(r"STG\..*\.128") == 2 * 2 * 1 + 2 * (1 + states)
    path = gpu_budget.main_path(kernel, states)
    assert sum(bool(re.match(r"LDG\..*\.128", opcode)) for opcode in path) == 2 * reads
    assert sum(bool(re.match(r"STG\..*\.128", opcode)) for opcode in path) == 2


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("rule", STATEFUL)
def test_the_main_path_stays_short(kernels: dict[str, sass.Kernel], rule: str, types: str) -> None:
    states = len(RULES[rule].moments)
    path = gpu_budget.main_path(step_kernel(kernels, rule, types), states)
    assert len(path) / 8 <= most_instructions(rule, RULES[rule])
    assert not any(opcode.startswith("CALL") for opcode in path)


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("rule", STATEFUL)
def test_a_block_is_loaded_before_anything_is_looked_up(kernels: dict[str, sass.Kernel], rule: str, types: str) -> None:
    """So that none of its loads waits for the tables, whose entries are loads too."""
    path = gpu_budget.main_path(step_kernel(kernels, rule, types), len(RULES[rule].moments))
    loaded = [i for i, opcode in enumerate(path) if opcode.startswith("LDG") and "CONSTANT" not in opcode]
    looked_up = [i for i, opcode in enumerate(path) if opcode.startswith("LDG") and "CONSTANT" in opcode]
    assert max(loaded) < min(looked_up)


def test_wide_weights_take_little_more_than_their_parameters(tmp_path: Path) -> None:
    kernels = sass.weight_kernels("sm_90", tmp_path, sass.IN_COLUMNS)
    for rule in sass.IN_COLUMNS:
        lengths = {
            kind: len(gpu_budget.main_path(kernel, len(RULES[rule].moments))) / 8
            for (of_rule, kind), kernel in kernels.items()
            if of_rule == rule
        }
        assert len(lengths) == 4
        assert all(length <= lengths["Plain"] + MOST_OF_WEIGHTS for length in lengths.values()), (rule, lengths)


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("rule", sass.IN_COLUMNS)
def test_a_turn_over_columns_stays_short(kernels: dict[str, sass.Kernel], rule: str, types: str) -> None:
    path = gpu_budget.turn_path(step_kernel(kernels, rule, types, "columns"), len(RULES[rule].moments))
    assert len(path) / 16 <= MOST_IN_COLUMNS[rule][types != "float, float"]
    assert not any(opcode.startswith("CALL") for opcode in path)


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("rule", sass.IN_COLUMNS)
def test_columns_load_a_block_before_they_look_anything_up(
    kernels: dict[str, sass.Kernel], rule: str, types: str
) -> None:
    """Each block is loaded while the one before is encoded; between its loads and its first code there is no other."""
    states, narrow = len(RULES[rule].moments), types != "float, float"
    loads = (2 if narrow else 4) + states * (2 if narrow else 3)  # param, grad; codes and absmax
    path = gpu_budget.turn_path(step_kernel(kernels, rule, types, "columns"), states)
    for block in ends_at(path, "REDUX"):
        loaded = [i for i, opcode in enumerate(block) if opcode.startswith("LDG")]
        decoded = [i for i, opcode in enumerate(block) if opcode == "LDS"]
        assert (len(loaded), len(decoded)) == (loads, 8 * states)
        assert max(loaded) < min(decoded)


def test_no_kernel_has_local_or_needless_shared_memory(kernels: dict[str, sass.Kernel]) -> None:
    for kernel in kernels.values():
        columns = "step_columns<" in kernel.name
        assert kernel.count(r"(LDL|STL)\b") == 0, kernel.name
        assert kernel.count(r"BAR\b") == (1 if columns else 0), kernel.name
        assert columns or kernel.count(r"(LDS|STS)\b") == 0, kernel.name


def test_registers_stay_under_the_bound(kernels: dict[str, sass.Kernel]) -> None:
    for name, kernel in kernels.items():
        found = re.search(r"step_\w+<(?:\w+::)*(\w+),", name)
        three = found is not None and len(RULES[found[1]].moments) == 3
        assert kernel.registers <= (MOST_REGISTERS_OF_THREE if three else MOST_REGISTERS), name


def test_dequantization_does_not_divide_for_each_value(tmp_path: Path) -> None:
    """A lane's eight values take one or two absmax; a division for each of them would be most of its instructions."""
    found = [
        kernel
        for name, kernel in sass.kernels_of(sass.ROOT / "csrc/cuda/blockwise.cu", "sm_90", tmp_path).items()
        if "dequantize_tiles" in name
    ]
    assert len(found) == 3
    for kernel in found:
        opcodes, ways = kernel.opcodes(), kernel.ways_from(0)
        last = max(i for i in ways if re.match(r"STG.*\.128", opcodes[i]))
        assert len(ways[last]) / 8 <= 16, kernel.name


def test_local_memory_would_be_seen() -> None:
    kernel = sass.Kernel("spilling", ((0, "STL.64 [R1+0x8], R2"), (16, "@P0 EXIT"), (32, "EXIT")), 255)
    assert kernel.count(r"(LDL|STL|LDS|STS|BAR)\b") == 1
