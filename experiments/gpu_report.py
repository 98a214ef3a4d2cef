"""What only a machine with a GPU can show: `python experiments/gpu_report.py PART`, or all parts one after the other.

Parts: build (installs the project here, without network), test (the whole suite on cuda), check (CPU and CUDA bit for
bit, then compute-sanitizer), measure (times beside device copy and the peers). Each part adds to
experiments/results/gpu-<name of the GPU>.json. OPTIM8_PEERS names a folder of unpacked packages to measure against.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, ROOT, provenance, write_json

PART_SECONDS = 8 * 60


def result_path() -> Path:
    return RESULTS / f"gpu-{re.sub(r'[^a-z0-9]+', '-', torch.cuda.get_device_name().lower()).strip('-')}.json"


def save(part: str, content: dict[str, Any]) -> None:
    path = result_path()
    known = json.loads(path.read_text()) if path.exists() else {}
    known[part] = {**provenance({"part": part}), **content}
    write_json(path, known)
    print(f"{part}: written to {path.relative_to(ROOT)}")


def run(command: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in the project's root with its output shown and kept; ends it where a part would take too long."""
    print("$", " ".join(command), flush=True)
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        lines = []
        deadline = time.monotonic() + PART_SECONDS
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
            if time.monotonic() > deadline:
                process.kill()
                lines.append(f"ended after {PART_SECONDS} s\n")
                break
    return subprocess.CompletedProcess(list(command), process.returncode, "".join(lines))


def build() -> bool:
    start = time.perf_counter()
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"]
    done = run([*pip, "--editable", "."], OPTIM8_CUDA="1", OPTIM8_CUDA_ARCHS="native")
    seen = run([sys.executable, "-m", "optim8"])
    save("build", {"ok": done.returncode == 0, "seconds": time.perf_counter() - start, "installed": seen.stdout})
    return done.returncode == 0


def test() -> bool:
    """The suite on cuda, without what builds and installs the project anew."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--device", "cuda", "tests"]
    done = run([*command, "--ignore-glob=*test_install*", "--ignore-glob=*test_cuda_*"])
    lines = done.stdout.splitlines()
    failed = [line for line in lines if re.match(r"(FAILED|ERROR) ", line)]
    content = {"ok": done.returncode == 0, "seconds": time.perf_counter() - start, "failed": failed}
    save("test", {**content, "summary": lines[-1] if lines else ""})
    return done.returncode == 0


def sanitizer() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    return shutil.which("compute-sanitizer") or next(
        (str(path) for home in homes if home and (path := Path(home) / "bin/compute-sanitizer").exists()), None
    )


def check() -> bool:
    import gpu_check

    start = time.perf_counter()
    findings = gpu_check.compare_everything()
    tools: dict[str, Any] = {}
    tool = sanitizer()
    for name in ("memcheck", "racecheck") if tool else ():
        script = [sys.executable, str(ROOT / "experiments/gpu_check.py")]
        done = run([str(tool), "--tool", name, "--error-exitcode", "9", *script])
        tools[name] = {"ok": done.returncode == 0, "output": done.stdout[-2000:]}
    ok = not findings["differing"] and all(entry["ok"] for entry in tools.values())
    seconds = time.perf_counter() - start
    save("check", {"ok": ok, "seconds": seconds, **findings, "sanitizer": tools or "compute-sanitizer is not here"})
    return ok


def measure() -> bool:
    import gpu_measure

    save("measure", gpu_measure.measure_everything())
    return True


PARTS: dict[str, Callable[[], bool]] = {"build": build, "test": test, "check": check, "measure": measure}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=list(PARTS), help="one part; all of them where it is left out")
    part = parser.parse_args().part
    if not torch.cuda.is_available():
        print("gpu_report: needs a CUDA device that torch sees, and sees none.", file=sys.stderr)
        return 4
    if part is not None:
        return 0 if PARTS[part]() else 1
    # Each in a process of its own: what `build` installs must be seen by the parts after it.
    return max(run([sys.executable, str(Path(__file__).resolve()), name]).returncode for name in PARTS)


if __name__ == "__main__":
    sys.exit(main())
