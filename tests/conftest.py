"""Options, seeds and fixtures of the whole suite."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from optim8 import _native

settings.register_profile(
    "bounded",
    deadline=None,
    derandomize=True,
    max_examples=25,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("bounded")

# --doctest-modules imports every file here; that one makes the process that imports it take its CPU for a GPU.
collect_ignore = ["cuda/fake_cuda"]


# Files that take long for how few tests they have. They come first, so that no process is left with one at the end.
LONG = [
    *("test_arm", "test_cuda_on_cpu", "test_cuda_module", "test_distributed", "test_experiments"),
    "test_experiments_gpu",
]


def pytest_configure(config: pytest.Config) -> None:
    """Where several processes run tests, each gets its share of the threads."""
    torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the tensors of the tests live: cpu (default) or cuda")
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too (so does any -m)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    if config.getoption("--slow") or config.getoption("-m"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


def processor() -> str:
    """What a result may depend on: the model, and the instructions that optim8 and torch use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    described = dict(line.replace("\t", "").split(": ", 1) for line in lines if ": " in line)
    flags = set(described.get("flags", "").split())
    vnni = ", ".join(sorted(flag for flag in flags if "vnni" in flag or flag.startswith("amx"))) or "none"
    module = _native.cpu_or_none()
    isa = module.isa_info()["used"] if module is not None else "not built"
    name = described.get("model name", platform.machine())
    family = f"family {described.get('cpu family')}, model {described.get('model')}"
    used = f"optim8 uses {isa}, torch {torch.__version__} {torch.backends.cpu.get_cpu_capability()}"
    return f"{name} ({family}); {used}; int8 instructions: {vnni}; {torch.get_num_threads()} threads"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"processor: {processor()}")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device of the tests' tensors; a run that asks for one that is not there fails instead of skipping."""
    chosen = torch.device(request.config.getoption("--device"))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        pytest.exit("--device cuda: torch sees no CUDA device here", returncode=4)
    return chosen


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20240229)
