"""Builds tests/arm for 64-bit Arm and runs it in an emulator of the processor, on a machine of any kind.

The compiler is zig's clang, the emulator unicorn; both are packages of pip, in the extra `arm`. The program has no
libraries and makes no system calls, so there is memory, a stack, and calls of functions by their names.
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "tests" / "arm"
FOLDER = ROOT / "build" / "arm"
PACKAGES = ("ziglang", "unicorn", "elftools")
# With one state and with two, and with norms: all would take minutes to compile.
RULES = ("adamw", "lion", "lars")
ISAS = {"scalar": [], "neon": ["-DOPTIM8_NEON"]}
FLAGS = [
    *("-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),  # as in setup.py
    *("-fno-exceptions", "-fno-rtti", "-Wall", "-Wextra", "-Werror"),
    "-DOPTIM8_PART=0",  # the only one
]
_STACK, _END, _PAGE = 1 << 20, 0x7FFF0000, 0x1000


def packages_missing() -> list[str]:
    """The packages of the extra `arm` that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def _few_rules(folder: Path) -> Path:
    """A folder whose core/rules/all.h lists RULES, and the last rule of the list."""
    listed = (ROOT / "csrc/core/rules/all.h").read_text(encoding="utf-8")
    kept = re.sub(r"    X\((\w+), \w+\) \\\n", lambda line: line[0] if line[1] in RULES else "", listed)
    _write(folder / "few/core/rules/all.h", kept)
    return folder / "few"


def _write(path: Path, text: str) -> None:
    """Leaves alone what is as it should be, so that nothing is compiled again for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def _ninja() -> str:
    try:
        from ninja import BIN_DIR
    except ImportError:
        return shutil.which("ninja") or "ninja"
    return str(Path(BIN_DIR) / "ninja")


@dataclass(frozen=True)
class Target:
    """What the program is built for: name of its folder, compiler, kernels and how far they are optimized, flags to
    compile and to link with."""

    name: str
    compiler: str
    isas: tuple[str, ...]
    level: str
    flags: tuple[str, ...] = ()
    link: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return FOLDER / self.name

    def compile(self, *first: Path) -> str:
        """The command without source, object, and flags of one source; headers in the folders `first` go before all."""
        folders = (*first, _few_rules(self.folder), SOURCES, ROOT / "csrc")
        return " ".join([self.compiler, *FLAGS, *self.flags, *(f"-iquote {folder}" for folder in folders)])

    def objects(self) -> dict[Path, tuple[Path, list[str]]]:
        """Object: source and flags."""
        kernels = {
            self.folder / f"{source.stem}.{isa}.o": (source, [self.level, f"-DOPTIM8_ISA={isa}", *ISAS[isa]])
            for source in sorted((ROOT / "csrc/cpu/kernels").glob("*.cpp"))
            for isa in self.isas
        }
        # Nothing may make of the loop in memcpy a call of memcpy.
        program = {
            self.folder / f"{source.stem}.o": (source, ["-O1", *(["-fno-builtin"] if source.stem == "runtime" else [])])
            for source in sorted(SOURCES.glob("*.cpp"))
        }
        return kernels | program

    def build(self, result: str) -> Path:
        """The path of the program; compiles what changed.

        Raises:
            RuntimeError: it does not compile; holds the compiler's messages.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = ["rule compile", f"  command = {self.compile()} $flags -MD -MF $out.d -c $in -o $out"]
        lines += ["  depfile = $out.d", "  deps = gcc"]
        lines += ["rule link", f"  command = {self.compiler} $in {' '.join(self.link)} -o $out"]
        for output, (source, flags) in self.objects().items():
            lines += [f"build {output}: compile {source}", f"  flags = {' '.join(flags)}"]
        lines.append(f"build {self.folder / result}: link {' '.join(map(str, self.objects()))}")
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # processes take turns
            _write(self.folder / "build.ninja", "\n".join(lines) + "\n")
            run(f"{_ninja()} -C {self.folder}")
        return self.folder / result


def run(command: str) -> None:
    """Runs a compiler.

    Raises:
        RuntimeError: it fails; holds its messages.
    """
    cache = str(FOLDER / "zig")
    environment = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
    done = subprocess.run(shlex.split(command), env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)


# Without the instruction sets of x86: the tests of the package compare those with scalar code.
_ISAS_HERE = tuple(ISAS) if platform.machine() in ("aarch64", "arm64") else ("scalar",)
HERE = Target("here", os.environ.get("CXX") or "g++", _ISAS_HERE, "-O1", ("-fPIC",), ("-shared",))
ARM = Target(
    "arm",
    f"{sys.executable} -m ziglang c++ -target aarch64-linux-musl",
    tuple(ISAS),
    "-O3",
    link=("-nostdlib", "-static", "-Wl,--entry=run_case"),
)


class Library:
    """The program on this machine."""

    def __init__(self, program: Path) -> None:
        self._library = ctypes.CDLL(str(program))

    def call(self, function: str, *arguments: int) -> int:
        called = self._library[function]
        called.restype = ctypes.c_int64
        return int(called(*map(ctypes.c_int64, arguments)))

    def bytes_at(self, name: str, count: int) -> bytes:
        return bytes((ctypes.c_ubyte * count).in_dll(self._library, name))


class Machine:
    """A processor with the program in its memory."""

    def __init__(self, program: Path) -> None:
        from elftools.elf.elffile import ELFFile
        from unicorn import UC_ARCH_ARM64, UC_MODE_ARM, Uc

        self._machine = Uc(UC_ARCH_ARM64, UC_MODE_ARM)
        with program.open("rb") as file:
            elf = ELFFile(file)
            loads = [segment for segment in elf.iter_segments() if segment["p_type"] == "PT_LOAD"]
            first = min(segment["p_vaddr"] for segment in loads) // _PAGE * _PAGE
            last = max(segment["p_vaddr"] + segment["p_memsz"] for segment in loads)
            self._machine.mem_map(first, -(-(last - first) // _PAGE) * _PAGE)
            for segment in loads:
                self._machine.mem_write(segment["p_vaddr"], segment.data())
            table = elf.get_section_by_name(".symtab")
            self._addresses = {symbol.name: symbol["st_value"] for symbol in table.iter_symbols() if symbol.name}
        self._machine.mem_map(_END - _STACK, _STACK + _PAGE)

    def call(self, function: str, *arguments: int) -> int:
        """Calls a function of integers.

        Raises:
            unicorn.UcError: the program touched memory that it has not, or an instruction that there is not.
        """
        from unicorn import arm64_const as arm

        for i, argument in enumerate(arguments):
            self._machine.reg_write(getattr(arm, f"UC_ARM64_REG_X{i}"), argument)
        self._machine.reg_write(arm.UC_ARM64_REG_SP, _END)
        self._machine.reg_write(arm.UC_ARM64_REG_LR, _END)
        self._machine.emu_start(self._addresses[function], _END)
        return int(self._machine.reg_read(arm.UC_ARM64_REG_X0))

    def bytes_at(self, name: str, count: int) -> bytes:
        """The first bytes of a variable."""
        return bytes(self._machine.mem_read(self._addresses[name], count))

    def text(self, function: str, *arguments: int) -> str:
        """The text that a function gives."""
        address, found = self.call(function, *arguments), b""
        while b"\0" not in found:
            found += bytes(self._machine.mem_read(address + len(found), 16))
        return found.split(b"\0")[0].decode()

    def instructions(self, function: str, *arguments: int) -> int:
        """How many instructions a call executes."""
        from unicorn import UC_HOOK_BLOCK

        total = 0

        def count(_machine: object, _address: int, size: int, _data: object) -> None:
            nonlocal total
            total += size // 4

        hook = self._machine.hook_add(UC_HOOK_BLOCK, count)
        self._machine.ctl_flush_tb()  # what was translated before calls no hook
        self.call(function, *arguments)
        self._machine.hook_del(hook)
        return total
