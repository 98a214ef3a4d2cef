"""Builds the programs of this folder: csrc/cuda's unmodified sources by g++ over the shim, beside csrc/cpu's."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
SANITIZERS = {"plain": [], "memory": ["address,undefined"], "threads": ["thread"]}
PIC = ["-fPIC", "-fvisibility=hidden"]
# The last rule of the list is there too. compare_step.cpp names some of them.
FORMS = ("adamw", "lion", "sgd_plain", "lamb")
PARTS = 4  # of the sources that have code for every rule (core/rule_parts.h); they compile side by side
FLAGS = [
    *("-std=c++17", "-Og", "-g1", "-fno-strict-aliasing"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),  # unroll is nvcc's
    f"-DOPTIM8_PARTS={PARTS}",
]


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++")


def _ninja() -> str:
    try:
        from ninja import BIN_DIR
    except ImportError:
        return shutil.which("ninja") or "ninja"
    return str(Path(BIN_DIR) / "ninja")


Object = tuple[Path, Path, list[str]]  # source, object, flags


def _in_parts(sources: Iterable[Path], folder: Path, kind: str, flags: list[str]) -> list[Object]:
    """Those that take longest come first."""
    listed: list[Object] = []
    for source in sorted(sources, key=lambda source: (not source.stem.endswith("_rules"), source)):
        if source.stem.endswith("_rules"):
            for part in range(PARTS):
                listed.append((source, folder / f"{source.stem}.{part}.{kind}.o", [*flags, f"-DOPTIM8_PART={part}"]))
        else:
            listed.append((source, folder / f"{source.stem}.{kind}.o", flags))
    return listed


def link(result: Path, objects: Sequence[Object], flags: Sequence[str], given: Iterable[Path] = ()) -> Path:
    """Compiles objects where their sources changed, and links them with others that are `given`."""
    folder = result.parent
    folder.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{path}" for path in (HERE / "shim", HERE, ROOT / "csrc")]
    lines = [
        "rule compile",
        f"  command = {compiler()} {' '.join([*FLAGS, *includes])} $flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler()} {' '.join(flags)} $in -o $out",
    ]
    for source, output, own in objects:
        lines += [f"build {output}: compile {source}", f"  flags = {' '.join(own)}"]
    linked = [*(output for _, output, _ in objects), *given]
    lines.append(f"build {result}: link {' '.join(map(str, linked))}")
    command = [_ninja(), "-C", str(folder), "-f", f"{result.stem}.ninja"]
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests that run at a time take turns
        (folder / f"{result.stem}.ninja").write_text("\n".join(lines) + "\n")
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(run.stdout + run.stderr)
    return result


def _few_rules(folder: Path) -> Path:
    """A folder whose core/rules/all.h lists few rules: with two states, with one, without, with norms. With sanitizers
    each takes long to compile; the others are the interpreter's of PTX."""
    listed = (ROOT / "csrc/core/rules/all.h").read_text()
    kept = re.sub(r"    X\((\w+), \w+\) \\\n", lambda line: line[0] if line[1] in FORMS else "", listed)
    path = folder / "few/core/rules/all.h"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != kept:
        path.write_text(kept)
    return folder / "few"


def module() -> Path:
    """The path of optim8._cuda built over the shim, taking tensors of the CPU.

    Raises:
        RuntimeError: it does not compile; holds the compiler's messages.
    """
    import pybind11

    folder = ROOT / "build" / "cuda_on_cpu" / "plain"
    bindings = [sysconfig.get_path("include"), pybind11.get_include()]
    bound = [*PIC, *(f"-isystem {path}" for path in bindings)]
    bound += ["-DOPTIM8_DEVICE_TYPE=dlpack::cpu", "-DOPTIM8_VERSION='\"shim\"'", "-DOPTIM8_CUDA_ARCHS='\"90\"'"]
    objects = _in_parts((ROOT / "csrc/cuda").glob("*.cu"), folder, "cuda", [*PIC, "-x", "c++"])
    objects.append((HERE / "shim/scheduler.cpp", folder / "scheduler.o", PIC))
    for source in (*sorted((ROOT / "csrc/bind/cuda").glob("*.cpp")), *sorted((ROOT / "csrc/tensors").glob("*.cpp"))):
        objects.append((source, folder / f"{source.stem}.module.o", bound))
    return link(folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}", objects, ["-shared"])


def objects(name: str, sanitizer: str) -> list[Object]:
    """What a program is made of."""
    folder = ROOT / "build" / "cuda_on_cpu" / sanitizer
    # Without sanitizers the kernels are those of the module.
    checked = PIC
    if SANITIZERS[sanitizer]:
        few = f"-iquote {_few_rules(folder)}"
        checked = [*sanitize_flags(sanitizer), "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", few]
    listed: list[Object] = []
    if name == "compare":
        listed += _in_parts((ROOT / "csrc/cuda").glob("*.cu"), folder, "cuda", [*checked, "-x", "c++"])
        scalar = [*checked, "-DOPTIM8_ISA=scalar"]
        listed += _in_parts((ROOT / "csrc/cpu/kernels").glob("*.cpp"), folder, "cpu", scalar)
    # The scheduler tells sanitizers of its fibers; it must not itself be watched.
    listed.append((HERE / "shim/scheduler.cpp", folder / "scheduler.o", PIC))
    for source in sorted(HERE.glob(f"{name}*.cpp")):
        listed.append((source, folder / f"{source.stem}.o", checked))
    return listed


def sanitize_flags(sanitizer: str) -> list[str]:
    return [f"-fsanitize={names}" for names in SANITIZERS[sanitizer]]


def program(name: str, sanitizer: str) -> Path:
    """The path of a built program.

    Args:
        name: "compare" or "planted".
        sanitizer: a key of SANITIZERS.

    Raises:
        RuntimeError: it does not compile; holds the compiler's messages.
    """
    folder = ROOT / "build" / "cuda_on_cpu" / sanitizer
    return link(folder / name, objects(name, sanitizer), sanitize_flags(sanitizer))
