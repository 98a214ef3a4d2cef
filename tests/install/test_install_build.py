"""setup.py itself, on a package of a few lines: what it compiles how often, what it rebuilds, what it refuses."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# In the names of objects that include Python's headers.
PYTHON = sysconfig.get_config_var("EXT_SUFFIX").removesuffix(".so")
ISAS = ["scalar", *{"x86_64": ["avx2", "avx512bw", "avx512"], "aarch64": ["neon"]}.get(platform.machine(), [])]
LOOP_OBJECTS = sorted(f"_cpu/cpu/kernels/loop.{isa}.o" for isa in ISAS)
CPU_OBJECTS = sorted(["_cpu/bind/cpu/module.o", "_cpu/cpu/dispatch.o", *LOOP_OBJECTS])

BINDING = """
#include <Python.h>
int scalar_number();
static PyObject* number(PyObject*, PyObject*) { return PyLong_FromLong(scalar_number()); }
static PyMethodDef methods[] = {{"number", number, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__cpu() {
    PyObject* m = PyModule_Create(&module);
    PyModule_AddStringConstant(m, "version", OPTIM8_VERSION);
    return m;
}
"""
# One function per instruction set, which refuses to compile with fewer or with other flags than that set needs.
LOOP = """
#include "core/number.h"
#define JOINED(a, b) a##_##b
#define JOIN(a, b) JOINED(a, b)
#define LEVEL_scalar 0
#define LEVEL_avx2 1
#define LEVEL_avx512bw 2
#define LEVEL_avx512 3
#define LEVEL_neon -1
#define LEVEL JOIN(LEVEL, OPTIM8_ISA)
#if LEVEL >= 1
static_assert(__AVX2__ && __FMA__ && __F16C__ && __BMI2__);
#elif defined(__AVX2__)
#error the scalar build must run on any machine
#endif
#if LEVEL >= 2
static_assert(__AVX512F__ && __AVX512BW__ && __AVX512DQ__ && __AVX512VL__);
#elif defined(__AVX512F__)
#error only the builds for AVX-512 may use it
#endif
#if LEVEL == 3
static_assert(__AVX512VBMI__);
#elif defined(__AVX512VBMI__)
#error only the build for VBMI may use it
#endif
#if (LEVEL == -1) != defined(OPTIM8_NEON)
#error the build for NEON, and no other, has its macro
#endif
#if defined(__FAST_MATH__)
#error fast-math changes results
#endif
int JOIN(OPTIM8_ISA, number)();
int JOIN(OPTIM8_ISA, number)() { return core_number; }
"""
CUDA_BINDING = BINDING.replace("_cpu", "_cuda").replace("scalar_number", "device_count_status")
KERNEL = """
#include "core/number.h"
__global__ void fill(int* values) { values[threadIdx.x] = core_number; }
int device_count_status() {
    int count = 0;
    return cudaGetDeviceCount(&count);
}
void launch(int* values) { fill<<<1, 32>>>(values); }
"""
SPILLING_KERNEL = """
__global__ void spill(int* values) {
    int counts[64] = {};
    for (int i = 0; i < 64; ++i) counts[values[i] & 63] += i;
    for (int i = 0; i < 64; ++i) values[i] = counts[i];
}
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    sources = {
        "csrc/core/number.h": "constexpr int core_number = 7;",
        "csrc/cpu/kernels/loop.cpp": LOOP,
        "csrc/cpu/dispatch.cpp": "#ifdef __AVX2__\n#error the dispatcher must run on any machine\n#endif",
        "csrc/bind/cpu/module.cpp": BINDING,
        "optim8/__init__.py": "",
        "optim8/py.typed": "",
    }
    for name, text in sources.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def setup(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    merged = {**os.environ, "OPTIM8_CUDA": "0", "OPTIM8_SANITIZE": "", **environment}
    command = [sys.executable, "setup.py", *(arguments or ("--quiet", "build_ext", "--inplace"))]
    return subprocess.run(command, cwd=tree, env=merged, capture_output=True, text=True, check=False)


def compiled(result: subprocess.CompletedProcess[str]) -> list[str]:
    """The objects that a build compiled, as "module/path"."""
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    return sorted("/".join(native_object(line.split()[-1])) for line in lines if " COMPILE " in line)


def native_object(path: str) -> tuple[str, ...]:
    """Parts of an object's path behind build/native*: the module, then folders as below csrc, without which Python the
    object is for."""
    parts = Path(path.replace(PYTHON, "")).parts
    return parts[next(i for i, part in enumerate(parts) if part.startswith("native")) + 1 :]


def test_each_source_once_per_instruction_set_and_only_what_changed(tree: Path) -> None:
    assert compiled(setup(tree)) == CPU_OBJECTS
    assert compiled(setup(tree)) == []

    (tree / "csrc/core/number.h").write_text("constexpr int core_number = 8;")
    assert compiled(setup(tree)) == LOOP_OBJECTS

    (tree / "csrc/cpu/kernels/more.cpp").write_text("int OPTIM8_ISA;")
    assert compiled(setup(tree)) == sorted(f"_cpu/cpu/kernels/more.{isa}.o" for isa in ISAS)

    pyproject = tree / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace('\nversion = "', '\nversion = "77.'))
    assert compiled(setup(tree)) == ["_cpu/bind/cpu/module.o"]

    script = "from optim8 import _cpu; print(_cpu.number(), _cpu.version)"
    printed = subprocess.run(
        [sys.executable, "-c", script], cwd=tree, capture_output=True, text=True, check=True
    ).stdout
    assert printed.startswith("8 77.")


@pytest.mark.parametrize("name", ["aarch64", "arm64"])
def test_arm_has_scalar_code_and_neon(tree: Path, tmp_path: Path, name: str) -> None:
    """Where Python says that the machine is one; what the compiler is for does not matter here."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other/sitecustomize.py").write_text(f"import platform; platform.machine = lambda: {name!r}")
    dispatch = tree / "csrc/cpu/dispatch.cpp"
    sum_of_sets = "enum { scalar = 1, neon, avx2 };\n#define PLUS(set) + set\nstatic_assert(0 OPTIM8_ISAS(PLUS) == 3);"
    dispatch.write_text(sum_of_sets)
    loops = [f"_cpu/cpu/kernels/loop.{isa}.o" for isa in ("neon", "scalar")]
    built = compiled(setup(tree, PYTHONPATH=str(tmp_path / "other")))
    assert built == ["_cpu/bind/cpu/module.o", "_cpu/cpu/dispatch.o", *loops]


def test_a_sanitized_build_does_not_mix_with_the_normal_one(tree: Path) -> None:
    everything = compiled(setup(tree))
    sanitized = ("--quiet", "build", "--build-lib", "build/sanitized")
    of_sanitized = [name for name in everything if not any(f".{isa}." in name for isa in ISAS[1:-1])]
    assert compiled(setup(tree, *sanitized, OPTIM8_SANITIZE="address,undefined")) == of_sanitized
    assert compiled(setup(tree)) == []
    (normal,) = (tree / "optim8").glob("_cpu*.so")
    (checked,) = (tree / "build/sanitized/optim8").glob("_cpu*.so")
    assert (b"__asan_init" in checked.read_bytes(), b"__asan_init" in normal.read_bytes()) == (True, False)


def test_a_build_packs_nothing_that_was_removed(tree: Path) -> None:
    (tree / "optim8/old.py").write_text("")
    assert setup(tree, "--quiet", "build", "--build-lib", "build/lib").returncode == 0
    (tree / "optim8/old.py").unlink()
    assert setup(tree, "--quiet", "build", "--build-lib", "build/lib").returncode == 0
    packed = sorted(path.name for path in (tree / "build/lib/optim8").iterdir() if path.suffix != ".so")
    assert packed == ["__init__.py", "py.typed"]


def test_a_cuda_module_of_an_earlier_build_does_not_stay(tree: Path) -> None:
    stale = tree / "optim8" / "_cuda.cpython-311-x86_64-linux-gnu.so"
    stale.write_text("")
    assert setup(tree).returncode == 0
    assert not stale.exists()


def test_a_warning_is_an_error_where_it_is_asked_for(tree: Path) -> None:
    (tree / "csrc/cpu/dispatch.cpp").write_text("static int unused() { return 0; }")
    result = setup(tree, OPTIM8_WERROR="1")
    assert result.returncode != 0
    assert "OPTIM8_WERROR=0" in result.stderr
    assert setup(tree, OPTIM8_WERROR="").returncode == 0


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"OPTIM8_CUDA": "yes"}, "OPTIM8_CUDA must be one of 0, 1 or unset, got 'yes'"),
        ({"OPTIM8_CUDA": "1"}, "OPTIM8_CUDA=1 demands the CUDA module, but there is no csrc/cuda/*.cu"),
        ({"OPTIM8_WERROR": "on"}, "OPTIM8_WERROR must be one of 0, 1 or unset, got 'on'"),
        ({"CXX": "no-such-compiler"}, "optim8._cpu did not compile"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_honoured_is_refused(tree: Path, environment: dict[str, str], message: str) -> None:
    result = setup(tree, **environment)
    assert result.returncode != 0
    assert message in result.stderr


def test_a_tree_without_native_sources_is_refused(tree: Path) -> None:
    (tree / "csrc/bind/cpu/module.cpp").unlink()
    result = setup(tree)
    assert result.returncode != 0
    assert "csrc/bind/cpu/*.cpp" in result.stderr


def torch_of(folder: Path, cuda: str | None) -> None:
    """A torch that tells what it is built for, and cannot be imported."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch/__init__.py").write_text("raise ImportError('a build must not import torch')")
    (folder / "torch/version.py").write_text(f"__version__ = '9.9'\ncuda = {cuda!r}\n")


class TestWhetherCudaIsBuilt:
    """With nvcc on the PATH and nothing asked for."""

    @pytest.fixture
    def environment(self, tree: Path) -> Path:
        """A virtual environment whose packages an isolated build does not see: it has its own, by PYTHONPATH."""
        (tree / "csrc/cuda").mkdir()
        (tree / "csrc/cuda/fill.cu").write_text(KERNEL)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", tree / "venv"], check=True)
        files = {
            "sitecustomize.py": "import sys; sys.path[:] = [path for path in sys.path if 'site-packages' not in path]",
            "setuptools/__init__.py": "def Extension(name, sources): return name\n"
            "def setup(ext_modules, **_): print(*ext_modules)",
            "setuptools/command/build.py": "class build: pass",
            "setuptools/command/build_ext.py": "class build_ext: pass",
            "nvcc": "",
        }
        for name, text in files.items():
            path = tree / "isolated" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)
        return tree

    @staticmethod
    def modules(tree: Path, choice: str = "") -> tuple[list[str], str]:
        """Which modules are built, and what is said."""
        shown = str(tree / "isolated")
        path = os.pathsep.join([shown, os.environ["PATH"]])
        environment = {**os.environ, "OPTIM8_CUDA": choice, "PATH": path, "PYTHONPATH": shown}
        command = [tree / "venv/bin/python", "setup.py"]
        run = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        *said, names = run.stdout.splitlines()
        return names.split(), " ".join(said)

    @pytest.mark.parametrize("isolated", [False, True])
    @pytest.mark.parametrize("cuda", ["13.0", None])
    def test_the_torch_of_the_environment_decides(self, environment: Path, cuda: str | None, isolated: bool) -> None:
        (packages,) = (environment / "venv").glob("lib/python*/site-packages")
        torch_of(packages if isolated else environment / "isolated", cuda)
        assert self.modules(environment, "0") == (["optim8._cpu"], "")
        assert self.modules(environment, "1") == (["optim8._cpu", "optim8._cuda"], "")
        if cuda:
            assert self.modules(environment) == (["optim8._cpu", "optim8._cuda"], "")
            return
        built, said = self.modules(environment)
        assert built == ["optim8._cpu"]
        assert "torch 9.9 is not built for CUDA; OPTIM8_CUDA=1 builds it" in said

    def test_without_torch_a_gpu_decides(self, environment: Path) -> None:
        gpu = Path("/dev/nvidia0").exists() or Path("/dev/dxg").exists()
        built, said = self.modules(environment)
        assert ("optim8._cuda" in built) == gpu
        assert ("neither torch nor a GPU" in said) != gpu


class TestCuda:
    pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")

    @pytest.fixture
    def cuda_tree(self, tree: Path) -> Path:
        (tree / "csrc/cuda").mkdir()
        (tree / "csrc/cuda/fill.cu").write_text(KERNEL)
        (tree / "csrc/bind/cuda").mkdir()
        (tree / "csrc/bind/cuda/module.cpp").write_text(CUDA_BINDING)
        return tree

    def test_the_module_compiles_and_imports_without_driver(self, cuda_tree: Path) -> None:
        result = setup(cuda_tree, OPTIM8_CUDA="1", OPTIM8_CUDA_ARCHS="80+PTX")
        assert compiled(result) == sorted([*CPU_OBJECTS, "_cuda/bind/cuda/module.o", "_cuda/cuda/fill.cu.o"])
        assert compiled(setup(cuda_tree, OPTIM8_CUDA="1", OPTIM8_CUDA_ARCHS="80+PTX")) == []
        script = "from optim8 import _cuda; print(_cuda.number())"
        subprocess.run([sys.executable, "-c", script], cwd=cuda_tree, capture_output=True, check=True)

    def test_a_kernel_that_needs_local_memory_is_refused(self, cuda_tree: Path) -> None:
        (cuda_tree / "csrc/cuda/fill.cu").write_text(SPILLING_KERNEL)
        said = "Local memory used for function"
        result = setup(cuda_tree, OPTIM8_CUDA="1", OPTIM8_CUDA_ARCHS="80", OPTIM8_WERROR="1")
        assert result.returncode != 0
        assert said in result.stdout + result.stderr
        result = setup(cuda_tree, OPTIM8_CUDA="1", OPTIM8_CUDA_ARCHS="80", OPTIM8_WERROR="0")
        assert result.returncode == 0, "a user's build goes on"
        assert said in result.stdout + result.stderr

    @pytest.mark.parametrize(
        "archs, message", [("80;sm_90", "got 'sm_90' in '80;sm_90'"), ("70;80", "from 75 (Turing) on, got '70'")]
    )
    def test_an_architecture_that_cannot_be_is_refused(self, cuda_tree: Path, archs: str, message: str) -> None:
        result = setup(cuda_tree, OPTIM8_CUDA="1", OPTIM8_CUDA_ARCHS=archs)
        assert result.returncode != 0
        assert message in result.stderr


class TestNvcc:
    """With a program in nvcc's place: it answers questions, and writes what it is asked to compile for."""

    @pytest.fixture
    def toolkit(self, tree: Path) -> Path:
        (tree / "csrc/cuda").mkdir()
        (tree / "csrc/cuda/fill.cu").write_text("")
        (tree / "csrc/bind/cuda").mkdir()
        (tree / "csrc/bind/cuda/module.cpp").write_text(BINDING.replace("_cpu", "_cuda"))
        return tree

    @staticmethod
    def nvcc(at: Path, release: str, codes: str) -> None:
        home = at.parents[1]
        for name in ("include/cuda_runtime.h", "lib/libcudart_static.a"):
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_text("")
        at.parent.mkdir(parents=True, exist_ok=True)
        at.write_text(
            f"""#!/bin/sh
case "$*" in
    --version) echo "Cuda compilation tools, release {release}, V{release}.0" ;;
    --list-gpu-code) printf '%s\\n' {codes} ;;
    *--dryrun*) echo '#$ TOP={home}' >&2 ;;
    *) echo "COMPILES FOR $*"; exit 1 ;;
esac
"""
        )
        at.chmod(0o755)

    def build(self, tree: Path, **environment: str) -> str:
        result = setup(tree, OPTIM8_CUDA="1", **environment)
        assert result.returncode != 0  # it compiles nothing
        return result.stdout + result.stderr

    @pytest.mark.parametrize("codes, newest", [("sm_80 sm_90", "90"), ("sm_75 sm_80 sm_90 sm_100 sm_120", "120")])
    def test_the_newest_architecture_that_it_knows_is_there_as_ptx_too(
        self, toolkit: Path, codes: str, newest: str
    ) -> None:
        self.nvcc(toolkit / "cuda/bin/nvcc", "12.4", codes)
        path = f"{toolkit / 'cuda/bin'}{os.pathsep}{os.environ['PATH']}"
        said = self.build(toolkit, PATH=path, OPTIM8_CUDA_ARCHS="")
        assert f"arch=compute_{newest},code=[sm_{newest},compute_{newest}]" in said.replace("'", "")
        assert "arch=compute_80,code=sm_80" in said
        assert ("take the PTX of 90" in said) == (newest == "90")

    def test_one_that_cannot_take_a_launch_of_the_step_is_refused(self, toolkit: Path) -> None:
        self.nvcc(toolkit / "cuda/bin/nvcc", "12.0", "sm_80")
        path = f"{toolkit / 'cuda/bin'}{os.pathsep}{os.environ['PATH']}"
        said = self.build(toolkit, PATH=path)
        assert "needs nvcc 12.1 or newer, got 12.0" in said

    @pytest.mark.parametrize("isolated", [False, True])
    def test_that_of_pips_packages_is_found(self, toolkit: Path, isolated: bool) -> None:
        """The packages lie where the environment has them; an isolated build has a PYTHONPATH of its own."""
        nvcc = toolkit / "packages/nvidia/cu13/bin/nvcc"
        self.nvcc(nvcc, "13.0", "sm_80")
        # Whatever toolkit this machine has is out of sight.
        script = (
            "import runpy, shutil; shutil.which = lambda *_, **__: None; "
            "print(runpy.run_path('setup.py', run_name='setup')['find_nvcc']())"
        )
        stubs = {
            "setuptools/__init__.py": "def Extension(name, sources): return name\ndef setup(**_): pass",
            "setuptools/command/build.py": "class build: pass",
            "setuptools/command/build_ext.py": "class build_ext: pass",
        }
        for name, text in stubs.items():
            (toolkit / "isolated" / name).parent.mkdir(parents=True, exist_ok=True)
            (toolkit / "isolated" / name).write_text(text)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", toolkit / "venv"], check=True)
        (packages,) = (toolkit / "venv").glob("lib/python*/site-packages")
        (packages / "packages.pth").write_text(str(toolkit / "packages") if isolated else "")
        shown = [toolkit / "isolated", *([] if isolated else [toolkit / "packages"])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, shown))}
        command = [toolkit / "venv/bin/python", "-c", script]
        run = subprocess.run(command, cwd=toolkit, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        assert run.stdout.splitlines()[-1] == str(nvcc)
