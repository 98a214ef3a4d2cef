"""The kernels for 64-bit Arm, scalar and NEON, run in an emulator: the same bits as on this machine."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "experiments"))
import arm_instructions  # noqa: E402
from shared import arm  # noqa: E402

pytestmark = [
    pytest.mark.skipif(bool(arm.packages_missing()), reason="needs the extra `arm`: ziglang, unicorn, pyelftools"),
    pytest.mark.skipif(shutil.which(arm.HERE.compiler.split()[0]) is None, reason="needs a C++ compiler"),
]

CASES = re.findall(r"^    X\((\w+)\)", (arm.SOURCES / "program.h").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def machine() -> arm.Machine:
    return arm.Machine(arm.ARM.build("program"))


@pytest.fixture(scope="module")
def here() -> arm.Library:
    return arm.Library(arm.HERE.build("program.so"))


def output(program: arm.Machine | arm.Library, isa: str, case: str) -> bytes:
    return program.bytes_at("output", program.call("run_case", list(arm.ISAS).index(isa), CASES.index(case)))


def difference(actual: bytes, expected: bytes) -> str | None:
    """Where two outputs differ, in words."""
    if actual == expected:
        return None
    if len(actual) != len(expected):
        return f"{len(actual)} bytes, not {len(expected)}"
    at = [i for i, (a, b) in enumerate(zip(actual, expected)) if a != b]
    return f"{len(at)} of {len(actual)} bytes differ, the first is {at[0]}: {actual[at[0]]}, not {expected[at[0]]}"


def test_the_program_has_these_cases_and_instruction_sets(machine: arm.Machine) -> None:
    assert [machine.text("case_name", i) for i in range(machine.call("case_count"))] == CASES
    assert [machine.text("set_name", i) for i in range(machine.call("set_count"))] == list(arm.ISAS)


@pytest.mark.parametrize("case", CASES)
def test_every_instruction_set_gives_the_same_bits(machine: arm.Machine, here: arm.Library, case: str) -> None:
    expected = output(here, "scalar", case)
    assert len(set(expected)) > 100, "the case says little"
    differences = {isa: difference(output(machine, isa, case), expected) for isa in arm.ARM.isas}
    differences |= {f"{isa} here": difference(output(here, isa, case), expected) for isa in arm.HERE.isas}
    assert not any(differences.values()), differences


# What Arm has an instruction for that means another thing.
@pytest.mark.parametrize(
    "right, wrong",
    [
        ("return select(a > b, a, b);", "return vmaxq_f32(a.v, b.v);"),
        ("vfmaq_f32(c.v, a.v, b.v)", "vaddq_f32(c.v, vmulq_f32(a.v, b.v))"),
    ],
)
def test_a_wrong_operation_is_noticed(machine: arm.Machine, tmp_path: Path, right: str, wrong: str) -> None:
    header = "cpu/kernels/simd_neon.h"
    source = (ROOT / "csrc" / header).read_text()
    assert source.count(right) == 1
    (tmp_path / header).parent.mkdir(parents=True)
    (tmp_path / header).write_text(source.replace(right, wrong))
    target = arm.ARM
    objects = target.objects()
    (spoiled,) = (path for path in objects if path.name == "number.neon.o")
    of_number, flags = objects.pop(spoiled)
    arm.run(f"{target.compile(tmp_path)} {' '.join(flags)} -c {of_number} -o {tmp_path / 'number.o'}")
    link = " ".join([*map(str, objects), str(tmp_path / "number.o"), *target.link])
    arm.run(f"{target.compiler} {link} -o {tmp_path / 'program'}")
    wrong_machine = arm.Machine(tmp_path / "program")
    assert difference(output(wrong_machine, "neon", "number"), output(machine, "scalar", "number"))


def test_neon_takes_far_fewer_instructions(machine: arm.Machine) -> None:
    counts = arm_instructions.count(machine)
    ratios = {name: counts["neon"][name] / counts["scalar"][name] for name in arm_instructions.KERNELS}
    assert all(0 < ratio <= arm_instructions.MOST for ratio in ratios.values()), ratios


def test_instructions_are_counted_again_for_what_ran_before(machine: arm.Machine) -> None:
    first, again = (machine.instructions("dequantize_counted", 0) for _ in range(2))
    assert first == again >= machine.call("counted_values")
