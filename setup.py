"""Builds the native modules of optim8 with ninja; everything else about the package stands in pyproject.toml.

`optim8._cpu` is built always, `optim8._cuda` where nvcc and csrc/cuda/*.cu are found. Sources are found by pattern,
so adding a file never touches this one. Objects stay in build/native, so a second build compiles only what changed;
for another Python that is only what includes its headers.

Environment:
  CXX                C++ compiler; default: g++, else c++.
  OPTIM8_CUDA        1 demands the CUDA module, 0 forbids it. Default: where nvcc is found, the torch of the environment
                     decides, whether or not the build is isolated from it: the module is built for a torch that is
                     built for CUDA, GPU or not, and for no other. Without a torch there it is built where there is a
                     GPU. Minutes of compiling, so a build that leaves it out says so, as does `python -m optim8`.
  OPTIM8_CUDA_ARCHS  architectures from 75 on, such as "80;90;120+PTX", or "native" for the GPUs present;
                     default: those of 80;90;100;120 that nvcc knows, the last of them as PTX too, for newer GPUs.
  CUDA_HOME          where nvcc is looked for if it is not on the PATH; after it /usr/local/cuda and the packages
                     nvidia-cuda-nvcc, nvidia-cuda-runtime and nvidia-cuda-cccl of pip.
  OPTIM8_ISAS        instruction sets that the CPU module gets beside scalar code, such as "avx2,avx512"; default: all
                     of the architecture. Most of the time of a build is theirs.
  OPTIM8_SANITIZE    sanitizers for the CPU module, such as "address,undefined"; objects get a folder of their own.
  OPTIM8_WERROR      1 makes warnings of the compilers errors, registers that a kernel spills among them; the targets
                     of the Makefile set it.
"""

from __future__ import annotations

import fcntl
import functools
import glob
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from itertools import product
from pathlib import Path
from typing import Any, NoReturn

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
IS_X86 = platform.machine() in ("x86_64", "AMD64")
IS_ARM = platform.machine() in ("aarch64", "arm64")

# No contraction and no fast-math: every instruction set must give the same bits.
MATH = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
# Sources whose names end so have code for every rule: each is compiled in parts, which compile side by side.
IN_PARTS, PARTS = "_rules", 4
BASE = [*MATH, "-fvisibility=hidden", "-fPIC", "-Wall", "-Wextra", f"-DOPTIM8_PARTS={PARTS}", f"-I{CSRC}"]
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
# Instructions are scheduled before registers are chosen too, which pays where there are 32 of them.
AVX512BW = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
AVX512BW += ["-fschedule-insns", "-fsched-pressure"]
AVX512 = [*AVX512BW, "-mavx512vbmi"]
# Part of the names of objects that include Python's headers, and of modules.
PYTHON = sysconfig.get_config_var("EXT_SUFFIX").removesuffix(".so")
# Compilers for 64-bit Arm take NEON for granted, so a macro tells the source.
NEON = ["-DOPTIM8_NEON=1"]
# From the plainest to the fastest.
ISA_FLAGS = {
    "scalar": [],
    **({"avx2": AVX2, "avx512bw": AVX512BW, "avx512": AVX512} if IS_X86 else {}),
    **({"neon": NEON} if IS_ARM else {}),
}

DEFAULT_ARCHS = (80, 90, 100, 120)
OLDEST_ARCH = 75
OLDEST_NVCC = (12, 1)  # a launch of the step has more than the 4 KB of parameters that were allowed before
GPUS = ("/dev/nvidia[0-9]*", "/dev/dxg")


def fail(message: str) -> NoReturn:
    sys.exit(f"optim8 setup: {message}")


def setting(name: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, "")
    if value not in ("", *allowed):
        fail(f"{name} must be one of {', '.join(allowed)} or unset, got {value!r}.")
    return value


def cxx() -> str:
    return os.environ.get("CXX") or shutil.which("g++") or "c++"


def werror(*flags: str) -> list[str]:
    return list(flags) if setting("OPTIM8_WERROR", ("0", "1")) == "1" else []


def ninja() -> str:
    try:
        from ninja import BIN_DIR
    except ImportError:
        return shutil.which("ninja") or fail("needs ninja to build. `pip install ninja`, or drop --no-build-isolation.")
    return str(Path(BIN_DIR) / "ninja")


def sanitizer_flags(isa: str = "scalar") -> list[str]:
    """Of a source for an instruction set. All of them have one source, so undefined behaviour is looked for in scalar
    code only, which halves the time to compile the others; what they read and write is their own."""
    names = [name for name in os.environ.get("OPTIM8_SANITIZE", "").split(",") if name]
    if isa != "scalar" and names != ["undefined"]:
        names = [name for name in names if name != "undefined"]
    if not names:
        return []
    quick = ["-g1", "-O1", "-fno-schedule-insns"]
    return [f"-fsanitize={','.join(names)}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", *quick]


def isa_flags() -> dict[str, list[str]]:
    """By instruction set. Sanitized modules, which take long to compile, have scalar code and the fastest set."""
    *_, fastest = ISA_FLAGS
    asked = [isa.strip() for isa in os.environ.get("OPTIM8_ISAS", "").split(",") if isa.strip()]
    if unknown := [isa for isa in asked if isa not in ISA_FLAGS]:
        fail(f"OPTIM8_ISAS must be names of {', '.join(ISA_FLAGS)} with commas between, got {', '.join(unknown)}.")
    chosen = asked or ([fastest] if sanitizer_flags() else list(ISA_FLAGS))
    return {isa: flags for isa, flags in ISA_FLAGS.items() if isa == "scalar" or isa in chosen}


def binding_flags() -> list[str]:
    import pybind11

    includes = [sysconfig.get_path("include"), pybind11.get_include()]
    return [flag for path in includes for flag in ("-isystem", path)]


class Plan:
    """The text of one build.ninja."""

    def __init__(self) -> None:
        self.lines = ["ninja_required_version = 1.5"]
        for rule, text in (("compile", "COMPILE"), ("link", "LINK")):
            self.lines += [f"rule {rule}", "  command = $command", f"  description = {text} $out"]
            if rule == "compile":
                self.lines += ["  depfile = $out.d", "  deps = gcc"]

    @staticmethod
    def path(path: Path | str) -> str:
        return re.sub(r"([$ :])", r"$\1", str(path))

    def add(self, rule: str, output: Path, inputs: list[Path], command: list[str]) -> Path:
        self.lines.append(f"build {self.path(output)}: {rule} {' '.join(map(self.path, inputs))}")
        self.lines.append("  command = " + command_text(command).replace("$", "$$"))
        return output

    def compile(self, compiler: str, source: Path, output: Path, flags: list[str]) -> Path:
        depfile = ["-MD", "-MF", f"{output}.d"]
        return self.add("compile", output, [source], [compiler, *flags, *depfile, "-c", str(source), "-o", str(output)])

    def link(self, output: Path, objects: list[Path], flags: list[str]) -> Path:
        command = [cxx(), "-shared", "-o", str(output), *map(str, objects), *flags]
        return self.add("link", output, objects, command)


def sources(*folders: str, pattern: str = "*.cpp") -> list[Path]:
    """Those that stand in these folders of csrc, not in folders inside them."""
    return [source for folder in folders for source in sorted((CSRC / folder).glob(pattern))]


def parts_of(source: Path) -> list[tuple[str, list[str]]]:
    """What the parts of a source have in the names of their objects, and their flags."""
    if not source.stem.endswith(IN_PARTS):
        return [("", [])]
    return [(f".{part}", [f"-DOPTIM8_PART={part}"]) for part in range(PARTS)]


def object_file(folder: Path, source: Path, variant: str = "") -> Path:
    """The path of a source's object: folders below `folder` as below csrc, so that no two sources share one."""
    return folder / source.relative_to(CSRC).with_suffix(f"{variant}.o")


def command_text(command: list[str]) -> str:
    # The compiler itself may be several words, such as `ccache g++`.
    return " ".join([command[0], *map(shlex.quote, command[1:])])


def plan_cpu(plan: Plan, folder: Path, output: Path, version: str) -> None:
    bare = [*BASE, "-fopenmp", *werror("-Werror")]
    flags = [*bare, *sanitizer_flags()]
    isas = f"-DOPTIM8_ISAS(X)={' '.join(f'X({isa})' for isa in isa_flags())}"
    objects = []
    if not sources("bind/cpu"):
        fail(f"found no csrc/bind/cpu/*.cpp under {ROOT}. Build from a complete source tree.")
    for source in sources("tensors", "bind", "bind/cpu"):
        extra = [*binding_flags(), f'-DOPTIM8_VERSION="{version}"']
        objects.append(plan.compile(cxx(), source, object_file(folder, source, PYTHON), [*flags, *extra]))
    for source in sources("cpu", "cpu/step"):
        objects.append(plan.compile(cxx(), source, object_file(folder, source), [*flags, isas]))
    # The longest first, so that no compiler is left alone at the end.
    for source in sorted(sources("cpu/kernels"), key=lambda source: not source.stem.endswith(IN_PARTS)):
        for (part, of_part), (isa, of_set) in product(parts_of(source), isa_flags().items()):
            of_isa = [*bare, *of_set, *sanitizer_flags(isa), *of_part, f"-DOPTIM8_ISA={isa}"]
            objects.append(plan.compile(cxx(), source, object_file(folder, source, f"{part}.{isa}"), of_isa))
    # Without symbols, which take a part of a wheel; what is sanitized keeps them for its reports.
    plan.link(output, objects, ["-fopenmp", *(sanitizer_flags() or ["-s"])])


def package_folders(name: str) -> list[Path]:
    """Where a package of the environment lies, without importing it.

    An isolated build does not see the environment that it builds for, but runs its Python: pip hides the packages
    with PYTHONPATH.
    """
    find = (
        f"import importlib.util as u; s = u.find_spec({name!r}); "
        "print(*(s and s.submodule_search_locations or []), sep='\\n')"
    )
    open_to_all = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    folders = []
    for environment in (None, open_to_all):
        run = subprocess.run([sys.executable, "-c", find], env=environment, capture_output=True, text=True, check=False)
        folders += [Path(line) for line in run.stdout.splitlines() if run.returncode == 0]
    return [folder for folder in folders if folder.is_dir()]


@functools.cache
def find_nvcc() -> str | None:
    homes = [Path(home) for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    on_path = shutil.which("nvcc") or next(
        (path for home in homes if (path := shutil.which(str(home / "bin/nvcc")))), None
    )
    if on_path:
        return on_path
    # The packages for CUDA 13 and newer; those for CUDA 12 have no nvcc.
    packaged = [path for folder in package_folders("nvidia") for path in sorted(folder.glob("cu[0-9]*/bin/nvcc"))]
    return str(packaged[-1]) if packaged else None


def torch_version() -> dict[str, Any] | None:
    """The names in torch/version.py, `__version__` and `cuda` among them, without the seconds that importing torch
    takes; None where there is no torch."""
    for folder in package_folders("torch"):
        if (folder / "version.py").is_file():
            return runpy.run_path(str(folder / "version.py"))
    return None


@functools.cache
def cuda_wanted() -> bool:
    choice = setting("OPTIM8_CUDA", ("0", "1"))
    kernels, nvcc = sources("cuda", pattern="*.cu"), find_nvcc()
    if choice == "1" and not (kernels and nvcc):
        missing = (
            "nvcc is neither on the PATH nor under CUDA_HOME nor among the packages of pip"
            if kernels
            else "there is no csrc/cuda/*.cu"
        )
        fail(f"OPTIM8_CUDA=1 demands the CUDA module, but {missing}. Install the CUDA toolkit or unset OPTIM8_CUDA.")
    if choice or not (kernels and nvcc):
        return choice == "1"
    torch = torch_version()
    if torch is None:
        wanted, reason = any(map(glob.glob, GPUS)), "there is neither torch nor a GPU here"
    else:
        wanted, reason = bool(torch.get("cuda")), f"torch {torch.get('__version__')} is not built for CUDA"
    if not wanted:
        print(f"optim8 setup: leaves optim8._cuda out, as {reason}; OPTIM8_CUDA=1 builds it.")
    return wanted


def toolkit_file(nvcc: str, *patterns: str) -> Path:
    """The folder of a toolkit file. nvcc on the PATH may be a wrapper; what it would run names the toolkit's root."""
    with tempfile.NamedTemporaryFile(suffix=".cu") as source:
        run = subprocess.run([nvcc, "--dryrun", "-E", source.name], capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.*)$", run.stderr, re.MULTILINE)
    if not top:
        fail(f"`{nvcc} --dryrun` names no toolkit root (TOP=): {run.stderr.strip() or run.stdout.strip()}")
    root = Path(top.group(1).strip()).resolve()
    for pattern in patterns:
        for found in sorted(root.glob(pattern)):
            return found.parent
    fail(f"the CUDA toolkit in {root} has no {' or '.join(patterns)}. Install the CUDA runtime's development files.")


def nvcc_version(nvcc: str) -> tuple[int, int]:
    run = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    release = re.search(r"release (\d+)\.(\d+)", run.stdout)
    if not release:
        fail(f"`{nvcc} --version` names no release: {run.stderr.strip() or run.stdout.strip()}")
    return int(release[1]), int(release[2])


def default_archs(nvcc: str) -> list[str]:
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    archs = [str(arch) for arch in DEFAULT_ARCHS if f"sm_{arch}" in known]
    dropped = [str(arch) for arch in DEFAULT_ARCHS if str(arch) not in archs]
    if not archs:
        fail(f"{nvcc} knows none of the architectures {', '.join(dropped)}. Name others in OPTIM8_CUDA_ARCHS.")
    if dropped:
        print(
            f"optim8 setup: {nvcc} does not know architectures {', '.join(dropped)}; building without them. Their GPUs "
            f"take the PTX of {archs[-1]}."
        )
    return [*archs[:-1], f"{archs[-1]}+PTX"]


def archs_of(nvcc: str) -> list[str]:
    """Architectures such as "90" and "120+PTX", or ["native"]."""
    asked = os.environ.get("OPTIM8_CUDA_ARCHS", "")
    if asked == "native":
        return [asked]
    archs = [arch.strip() for arch in asked.split(";") if arch.strip()]
    for arch in archs:
        number = re.fullmatch(r"(\d+)[af]?(\+PTX)?", arch)
        if not number:
            fail(f'OPTIM8_CUDA_ARCHS must look like "80;90;120+PTX" or "native", got {arch!r} in {asked!r}.')
        if int(number[1]) < OLDEST_ARCH:
            fail(
                f"OPTIM8_CUDA_ARCHS must name architectures from {OLDEST_ARCH} (Turing) on, got {arch!r} in {asked!r}."
            )
    return archs or default_archs(nvcc)


def arch_flags(archs: list[str]) -> list[str]:
    if archs == ["native"]:
        return ["-arch=native"]
    flags = []
    for arch in archs:
        name = arch.removesuffix("+PTX")
        code = f"[sm_{name},compute_{name}]" if arch.endswith("+PTX") else f"sm_{name}"
        flags += ["-gencode", f"arch=compute_{name},code={code}"]
    return flags


def plan_cuda(plan: Plan, folder: Path, output: Path, version: str) -> None:
    nvcc = find_nvcc()
    if (version := nvcc_version(nvcc)) < OLDEST_NVCC:
        fail(
            f"the CUDA module needs nvcc {'.'.join(map(str, OLDEST_NVCC))} or newer, got {'.'.join(map(str, version))} "
            f"({nvcc}). Put a newer one on the PATH, or set OPTIM8_CUDA=0."
        )
    include = toolkit_file(nvcc, "include/cuda_runtime.h", "targets/*/include/cuda_runtime.h")
    library = toolkit_file(
        nvcc, "lib64/libcudart_static.a", "lib/libcudart_static.a", "targets/*/lib/libcudart_static.a"
    )
    # Spills and local memory are warnings: with OPTIM8_WERROR a kernel that outgrows its registers does not build.
    gates = ["-Xptxas", "--warn-on-spills,--warn-on-local-memory-usage", *werror("-Werror", "all-warnings")]
    host = ["-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off,-Wall,-Wextra"]
    size = ["-Xfatbin", "-compress-all", "-cudart", "static"]
    archs = archs_of(nvcc)
    flags = [
        "-std=c++17",
        "-O3",
        "-fmad=false",
        f"-DOPTIM8_PARTS={PARTS}",
        f"-I{CSRC}",
        *gates,
        *host,
        *size,
        *arch_flags(archs),
    ]
    facts = [f'-DOPTIM8_VERSION="{version}"', f'-DOPTIM8_CUDA_ARCHS="{";".join(archs)}"']
    objects = []
    for source in sources("tensors", "bind/cuda"):
        extra = [*werror("-Werror"), *binding_flags(), "-isystem", str(include), *facts]
        objects.append(plan.compile(cxx(), source, object_file(folder, source, PYTHON), [*BASE, *extra]))
    for source in sources("cuda", pattern="*.cu"):
        for part, of_part in parts_of(source):
            extra = [*of_part, "-ccbin", cxx()]
            objects.append(plan.compile(nvcc, source, object_file(folder, source, f"{part}.cu"), [*flags, *extra]))
    plan.link(output, objects, [f"-L{library}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"])


class FreshBuild(build):
    """setuptools' build, without what an earlier build left: a module that was removed would be packed again."""

    def run(self) -> None:
        library = Path(self.build_lib).resolve()
        if ROOT / "build" in library.parents:
            shutil.rmtree(library / "optim8", ignore_errors=True)
        super().run()


class NinjaBuild(build_ext):
    """setuptools' build_ext, with ninja in the place of its compiler calls."""

    def run(self) -> None:
        if not sys.platform.startswith("linux"):
            fail(f"builds on Linux, got {sys.platform}.")
        if self.inplace and not cuda_wanted():
            for stale in (ROOT / "optim8").glob("_cuda*.so"):
                stale.unlink()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rpartition(".")[2]
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        sanitize = "-" + os.environ["OPTIM8_SANITIZE"].replace(",", "-") if os.environ.get("OPTIM8_SANITIZE") else ""
        folder = ROOT / "build" / f"native{sanitize}" / name
        folder.mkdir(parents=True, exist_ok=True)
        output = folder / f"{name}{suffix}"
        plan = Plan()
        {"_cpu": plan_cpu, "_cuda": plan_cuda}[name](plan, folder, output, self.distribution.get_version())
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two builds of one tree take turns
            (folder / "build.ninja").write_text("\n".join(plan.lines) + "\n")
            jobs = ["-j", str(self.parallel)] if self.parallel else []
            if subprocess.run([ninja(), "-C", str(folder), *jobs], check=False).returncode:
                strict = " If it is only a warning, OPTIM8_WERROR=0 lets it pass." if werror("strict") else ""
                fail(f"{ext.name} did not compile; the compiler's message stands above.{strict}")
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(output), str(target))


names = ["optim8._cpu", *(["optim8._cuda"] if cuda_wanted() else [])]
setup(
    license="Apache-2.0",
    license_files=["LICENSE"],
    ext_modules=[Extension(name, sources=[]) for name in names],
    cmdclass={"build": FreshBuild, "build_ext": NinjaBuild},
)
