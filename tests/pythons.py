"""Runs the tests on every Python of this machine, 3.10 and later, each in an environment of its own.

    make test-pythons                          # all of them; pip may download several GB of torch for each
    make test-pythons ARGS="--short"           # some tests, on the oldest and the newest
    make test-pythons ARGS="--only 3.12 -k lion"

What is not named below goes to pytest. With --short nothing large is downloaded: where pip has no CPU build of torch
for a Python, what needs no torch is checked. Environments stay in build/pythons.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "pythons"
# The package, a step of each rule, the formats of state and of checkpoints.
SHORT = [
    "tests/test_layers.py",
    "tests/install/test_install.py",
    "tests/functional/test_functional_blockwise.py",
    "tests/optim/test_optim_step.py",
    "tests/checkpoint/test_optim_checkpoint.py",
]
ABOUT = (
    "import json, platform, sys, sysconfig, venv; print(json.dumps([platform.python_implementation(), "
    "list(sys.version_info[:3]), bool(sysconfig.get_config_var('Py_GIL_DISABLED')), sysconfig.get_path('include')]))"
)
# Every module compiles without a warning, and the native module of this Python loads and knows what it was built for.
WITHOUT_TORCH = """
import importlib.util, pathlib, sysconfig, warnings
warnings.simplefilter("error")
for folder in ("optim8", "experiments", "tests"):
    for path in sorted(pathlib.Path(folder).rglob("*.py")):
        compile(path.read_text(encoding="utf-8"), path, "exec", dont_inherit=True)
spec = importlib.util.spec_from_file_location("_cpu", "optim8/_cpu" + sysconfig.get_config_var("EXT_SUFFIX"))
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.isa_info()["used"] in module.isa_info()["available"]
assert sorted(module.dynamic_map(True)) == list(module.dynamic_map(True)) and len(module.dynamic_map(False)) == 256
print("compiles and loads; there is no CPU build of torch for it, so no test ran")
"""


def pythons() -> dict[str, Path]:
    """Interpreters that can build the package, by version, oldest first."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    places = [*pyenv.glob("versions/*/bin/python3"), *Path("/usr/bin").glob("python3*")]
    places += [
        Path(path) for minor in range(10, 30) for t in ("", "t") if (path := shutil.which(f"python3.{minor}{t}"))
    ]
    known: dict[tuple[tuple[int, ...], bool], Path] = {}
    for path in places:
        if not re.fullmatch(r"python3(\.\d+t?)?", path.name):
            continue
        run = subprocess.run([path, "-c", ABOUT], capture_output=True, text=True, check=False)
        if run.returncode:
            continue  # a shim of a version that is not chosen, or there is no venv
        implementation, version, free, include = json.loads(run.stdout)
        if implementation == "CPython" and version >= [3, 10] and Path(include, "Python.h").exists():
            known.setdefault((tuple(version), free), path)
    ordered = sorted(known.items(), key=lambda item: item[0])
    return {".".join(map(str, version)) + "t" * free: path for (version, free), path in ordered}


class Environment:
    """A virtual environment of one Python."""

    def __init__(
        self,
        version: str,
        python: Path,
        folder: Path = FOLDER,
        needs: Sequence[str] = ("setuptools", "pybind11", "ninja"),
    ) -> None:
        self.python = folder / version / "bin" / "python"
        # The exact versions are for 3.11 and newer.
        self.constraint = [] if version.startswith("3.10.") else ["--constraint", "constraints.txt"]
        if not self.python.exists():
            subprocess.run([python, "-m", "venv", folder / version], check=True)
        if needs:
            self.install(*needs)

    def run(self, *command: str, **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([self.python, *command], cwd=ROOT, text=True, check=False, **options)  # type: ignore[call-overload, no-any-return]

    def install(self, *what: str) -> None:
        command = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", *self.constraint, *what]
        if self.run(*command).returncode:
            sys.exit(f"test-pythons: pip could not install {' '.join(what)} for {self.python}")

    def has_small_torch(self) -> bool:
        """Whether there is a torch already, or pip has the CPU build of the version that is asked for."""
        find = "import importlib.util, sys; sys.exit(not importlib.util.find_spec('torch'))"
        if self.run("-c", find).returncode == 0:
            return True
        (version,) = re.findall(r"^torch==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
        ask = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--dry-run"]
        return self.run(*ask, f"torch=={version}+cpu", capture_output=True).returncode == 0


def outcomes(chosen: dict[str, Path], short: bool, arguments: list[str]) -> Iterator[tuple[str, int]]:
    for version, python in chosen.items():
        print(f"Python {version}", flush=True)
        environment = Environment(version, python)
        if short and not environment.has_small_torch():
            status = environment.run("setup.py", "--quiet", "build_ext", "--inplace").returncode
            yield version, status or environment.run("-c", WITHOUT_TORCH).returncode
            continue
        environment.install("--no-build-isolation", "--editable", ".[test]" if short else ".[test,experiments]")
        files = SHORT if short else ["tests"]
        of_forms = {"OPTIM8_TEST_FORMS": "1"} if short else {}  # tests/cases.py
        tests = environment.run("-m", "pytest", "--quiet", *files, *arguments, env={**os.environ, **of_forms})
        yield version, tests.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="some tests, on the oldest and the newest Python")
    parser.add_argument("--only", default="", help="those whose version begins so")
    asked, arguments = parser.parse_known_args()
    chosen = {version: path for version, path in pythons().items() if version.startswith(asked.only)}
    if not chosen:
        print(f"test-pythons: there is no Python {asked.only or '3.10 or later'} with headers and venv here")
        return 1
    if asked.short:
        versions = list(chosen)
        chosen = {version: chosen[version] for version in (versions[0], versions[-1])}
    results = dict(outcomes(chosen, asked.short, arguments))
    for version, status in results.items():
        print(f"Python {version}: {'ok' if status == 0 else f'failed with exit status {status}'}")
    return int(any(results.values()))


if __name__ == "__main__":
    sys.exit(main())
