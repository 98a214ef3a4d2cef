"""The installed package: of one version, honest in `python -m optim8`, and complete as a source distribution."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import optim8
from optim8 import _native

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(optim8.__file__).parent


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    merged = {**os.environ, **environment}
    return subprocess.run([*map(str, command)], cwd=cwd, env=merged, capture_output=True, text=True, check=False)


def built_for_tests(path: Path) -> bool:
    return path.suffix == ".py" or path.name == "py.typed"


def test_the_compiled_module_is_of_the_installed_version() -> None:
    assert _native.cpu().version == importlib.metadata.version("optim8")


@pytest.mark.skipif("OPTIM8_TESTED_PACKAGE" not in os.environ, reason="no particular build is to be tested")
def test_the_tests_run_against_the_build_that_was_asked_for() -> None:
    expected = Path(os.environ["OPTIM8_TESTED_PACKAGE"]).resolve()
    assert expected in Path(_native.cpu().__file__).resolve().parents


class TestInfo:
    """`python -m optim8`."""

    @pytest.fixture
    def bare(self, tmp_path: Path) -> Path:
        """A folder with the package's Python files alone, as after an incomplete build."""
        shutil.copytree(PACKAGE, tmp_path / "optim8", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        return tmp_path

    def test_prints_what_is_there(self, tmp_path: Path) -> None:
        result = run(sys.executable, "-m", "optim8", cwd=tmp_path, PYTHONPATH=str(PACKAGE.parent), OPTIM8_CPU_ISA="")
        assert result.returncode == 0, result.stderr
        isa = _native.cpu().isa_info()
        for expected in (
            importlib.metadata.version("optim8"),
            torch.__version__,
            f"compiled {' '.join(isa['compiled'])}",
            "GPU",
        ):
            assert expected in result.stdout

    @pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512bw", "avx512", "neon"])
    def test_honours_a_forced_instruction_set(self, tmp_path: Path, isa: str) -> None:
        result = run(sys.executable, "-m", "optim8", cwd=tmp_path, PYTHONPATH=str(PACKAGE.parent), OPTIM8_CPU_ISA=isa)
        if isa in _native.cpu().isa_info()["available"]:
            assert (result.returncode, f"used {isa}" in result.stdout) == (0, True), result.stdout + result.stderr
        else:
            assert (result.returncode, isa in result.stdout + result.stderr) == (1, True)

    def test_refuses_an_unknown_instruction_set(self, tmp_path: Path) -> None:
        result = run(sys.executable, "-m", "optim8", cwd=tmp_path, PYTHONPATH=str(PACKAGE.parent), OPTIM8_CPU_ISA="mmx")
        assert result.returncode == 1
        assert "OPTIM8_CPU_ISA must name" in result.stdout + result.stderr

    def test_says_what_to_do_about_a_missing_module(self, bare: Path) -> None:
        # An editable install finds submodules in the source tree even for a package that was imported from elsewhere.
        script = """if True:
            import runpy, sys
            sys.meta_path[:] = [f for f in sys.meta_path if "Editable" not in getattr(f, "__name__", "")]
            runpy.run_module("optim8", run_name="__main__")
        """
        result = run(sys.executable, "-c", script, cwd=bare, PYTHONPATH=str(bare))
        assert result.returncode == 1
        assert "pip install" in result.stdout
        assert "Traceback" not in result.stderr

    def test_refuses_an_unknown_command(self, tmp_path: Path) -> None:
        result = run(sys.executable, "-m", "optim8", "nonsense", cwd=tmp_path, PYTHONPATH=str(PACKAGE.parent))
        assert result.returncode == 2
        assert "nonsense" in result.stderr


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution. Made from a copy, since setuptools writes into the tree it packs."""
    folder = tmp_path_factory.mktemp("sdist")
    skip = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "source", ignore=skip)
    result = run(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", folder, cwd=folder / "source")
    assert result.returncode == 0, result.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        # Of Python 3.12, and of later patches of those before; Debian 12 has 3.11.2.
        packed.extractall(folder / "unpacked", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return folder / "unpacked" / archive.name.removesuffix(".tar.gz")


def test_sdist_holds_all_sources(sdist: Path) -> None:
    tops = ("csrc", "optim8", "tests", "experiments", "setup.py", "pyproject.toml", "Makefile", "LICENSE", "README.md")
    files = [path for top in tops for path in [ROOT / top, *(ROOT / top).rglob("*")] if path.is_file()]
    generated = ("__pycache__", ".so", ".pyc")
    names = {str(path.relative_to(ROOT)) for path in files if not str(path).endswith(generated)}
    # What runs and caches leave behind is no source.
    expected = {name for name in names if not any(part == "runs" or part.startswith(".") for part in Path(name).parts)}
    actual = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    assert expected - actual == set()
    assert [name for name in actual if name.endswith(generated)] == []


@pytest.mark.slow
def test_wheel_from_sdist_works(sdist: Path, tmp_path: Path) -> None:
    """Compiles everything anew, but for one instruction set alone: all of them take as long as the first build."""
    command = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", tmp_path]
    options = {"OPTIM8_CUDA": "0", "OPTIM8_SANITIZE": ""}
    unknown = run(*command, cwd=sdist, **options, OPTIM8_ISAS="mmx")
    assert unknown.returncode != 0
    assert "OPTIM8_ISAS must be names of scalar" in unknown.stderr
    result = run(*command, cwd=sdist, **options, OPTIM8_ISAS="scalar")
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(tmp_path / "site")
    packaged = {path.relative_to(sdist) for path in (sdist / "optim8").rglob("*") if built_for_tests(path)}
    installed = {
        path.relative_to(tmp_path / "site") for path in (tmp_path / "site").rglob("*") if built_for_tests(path)
    }
    assert installed == packaged
    info = run(sys.executable, "-m", "optim8", cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert info.returncode == 0, info.stdout + info.stderr
    assert "compiled scalar;" in info.stdout
