"""The tables in the machine code, which nvcc computes as it compiles, are those that g++ computes for the CPU."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "cuda" / "cuda_on_cpu"))
import build  # noqa: E402

pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None or build.compiler() is None, reason="needs nvcc and a C++ compiler"
)

TABLES = (
    *("signed_tables", "unsigned_tables", "positive_tables"),
    *("signed_dither", "positive_dither", "signed_lines", "positive_lines"),
)
USE = "__global__ void use(const void** tables) {{\n{}}}\n"
WRITE = "int main() {{\n{}}}\n"


def source(text: str, line: str) -> str:
    lines = "".join(line.format(i=i, name=name) for i, name in enumerate(TABLES))
    return f'#include "cuda/tables.h"\n#include <cstdio>\nusing namespace optim8;\n{text.format(lines)}'


def symbols(elf: bytes) -> dict[str, bytes]:
    """The contents of the objects of a 64-bit ELF file, by symbol."""
    (sections_at,) = struct.unpack_from("<Q", elf, 40)
    entry_size, count = struct.unpack_from("<HH", elf, 58)
    # name, type, flags, address, offset, size, link, info, alignment, size of an entry
    sections = [struct.unpack_from("<IIQQQQIIQQ", elf, sections_at + i * entry_size) for i in range(count)]
    found = {}
    for kind, offset, size, link in ((s[1], s[4], s[5], s[6]) for s in sections):
        if kind != 2:  # SHT_SYMTAB
            continue
        names = sections[link][4]
        for at in range(offset, offset + size, 24):
            name, info, _, section, value, length = struct.unpack_from("<IBBHQQ", elf, at)
            if info & 15 == 1 and 0 < section < count:  # STT_OBJECT, in a section of the file
                text = elf[names + name : elf.index(b"\0", names + name)].decode()
                start = sections[section][4] + value
                found[text] = elf[start : start + length]
    return found


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_nvcc_computes_what_gcc_computes(arch: str, tmp_path: Path) -> None:
    (tmp_path / "tables.cu").write_text(source(USE, "    tables[{i}] = &{name};\n"))
    (tmp_path / "tables.cpp").write_text(source(WRITE, "    std::fwrite(&{name}, sizeof {name}, 1, stdout);\n"))
    include = f"-I{ROOT / 'csrc'}"
    cubin = tmp_path / "tables.cubin"
    nvcc = ["nvcc", "-std=c++17", "-O3", "-fmad=false", include, f"-arch={arch}", "-cubin", tmp_path / "tables.cu"]
    subprocess.run([*nvcc, "-o", cubin], check=True)
    shim = [f"-I{build.HERE / 'shim'}", include]
    program, scheduler = tmp_path / "tables", build.HERE / "shim/scheduler.cpp"
    subprocess.run(
        [build.compiler(), *build.FLAGS, *shim, tmp_path / "tables.cpp", scheduler, "-o", program], check=True
    )
    expected = subprocess.run([program], capture_output=True, check=True).stdout
    compiled = symbols(cubin.read_bytes())
    for name in TABLES:
        (table,) = [data for symbol, data in compiled.items() if f"{len(name)}{name}" in symbol]
        assert len(table) >= 256, name
        assert table == expected[: len(table)], name
        expected = expected[len(table) :]
    assert expected == b""
