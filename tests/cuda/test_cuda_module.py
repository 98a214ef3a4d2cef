"""The module optim8._cuda itself, built over the shim of cuda_on_cpu: arguments in, results and errors out."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from support.functional_reference import every_result

from optim8 import __main__, _native
from optim8.step import pending, run

sys.path.insert(0, str(Path(__file__).resolve().parent / "cuda_on_cpu"))
import build

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("_cuda", build.module())
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(autouse=True)
def devices(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """torch.cuda on a machine with two GPUs, the first of which is current. `entered`: what was made current and left;
    `capturing`: the device whose current stream a graph captures."""
    seen = SimpleNamespace(entered=[], current=0, capturing=None)

    class Device:
        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            seen.entered.append(self.index)
            self.before, seen.current = seen.current, self.index

        def __exit__(self, *_: object) -> None:
            seen.entered.append("left")
            seen.current = self.before

    for name, fake in {
        "device": Device,
        "current_device": lambda: seen.current,
        "current_stream": lambda device: SimpleNamespace(cuda_stream=0),
        "is_current_stream_capturing": lambda: seen.current == seen.capturing,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_functional_api_gives_what_it_gives_on_the_cpu(
    module: ModuleType, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(24, 100).to(dtype)
    expected = every_result(x)
    monkeypatch.setattr(_native, "module_for", lambda device, who: module)
    for i, (mine, theirs) in enumerate(zip(every_result(x), expected, strict=True)):
        assert torch.equal(mine.flatten(), theirs.flatten()), i


def test_the_maps_are_those_of_the_cpu(module: ModuleType) -> None:
    for signed in (True, False):
        assert module.dynamic_map(signed) == _native.cpu().dynamic_map(signed)
        assert module.zero_code(signed) == _native.cpu().zero_code(signed)
    assert module.step_block == _native.cpu().step_block


@pytest.mark.parametrize(
    "change, message",
    [
        ({"absmax": torch.empty(3)}, "absmax must have 4 entries"),
        ({"out": torch.empty(1000)}, "out must be uint8"),
        ({"code": torch.empty(16)}, "code must have 256 entries"),
        ({"A": torch.empty(1000, dtype=torch.float64)}, "A must be float32, bfloat16 or float16"),
        ({"A": torch.empty(2000)[::2]}, "A must be contiguous"),
        ({"blocksize": 0}, "blocksize must be from 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused(module: ModuleType, change: dict[str, object], message: str) -> None:
    arguments = {
        "A": torch.zeros(1000),
        "code": torch.tensor(module.dynamic_map(True)),
        "blocksize": 256,
        "out": torch.empty(1000, dtype=torch.uint8),
        "absmax": torch.empty(4),
        "threads": 1,
    }
    module.quantize_blockwise(**arguments)
    with pytest.raises(ValueError, match=message):
        module.quantize_blockwise(**{**arguments, **change})


def empty_step(module: ModuleType, device: int) -> None:
    module.step(0, 0, device, None, None, None)


def test_torch_makes_the_device_of_a_step_current(module: ModuleType, devices: SimpleNamespace) -> None:
    """It knows whether a device is in use; cudaSetDevice would make a context on one that is not."""
    empty_step(module, 0)
    assert devices.entered == []
    empty_step(module, 1)
    assert devices.entered == [1, "left"]


def test_a_call_that_fails_leaves_the_device(
    module: ModuleType, devices: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_ON_CPU_ERROR", "700")
    with pytest.raises(RuntimeError):
        module.probe(1)
    assert devices.entered == [1, "left"]

    def no_stream(device: int) -> None:
        raise RuntimeError("no stream")

    monkeypatch.setattr(torch.cuda, "current_stream", no_stream)
    with pytest.raises(RuntimeError, match="no stream"):
        empty_step(module, 1)
    assert devices.entered == [1, "left"], "was not entered again"


@pytest.mark.parametrize(
    "error, advice",
    [
        (35, "update the driver, or reinstall with an older toolkit"),
        (209, "reinstall with OPTIM8_CUDA_ARCHS naming its architecture"),
        (222, "only PTX for this GPU: update the driver"),
        (700, "CUDA_LAUNCH_BLOCKING=1 shows the call"),
    ],
)
def test_errors_say_what_to_do(module: ModuleType, error: int, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(256)
    arguments = (x, torch.tensor(module.dynamic_map(True)), 256, torch.empty(256, dtype=torch.uint8), torch.empty(1), 1)
    monkeypatch.setenv("CUDA_ON_CPU_ERROR", str(error))
    with pytest.raises(RuntimeError, match=r"quantize_blockwise: CUDA says cudaError.*" + advice):
        module.quantize_blockwise(*arguments)


def test_a_launch_that_an_old_driver_refuses_says_so(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_ON_CPU_ERROR", "1")  # cudaErrorInvalidValue
    monkeypatch.setenv("CUDA_ON_CPU_DRIVER", "12000")
    with pytest.raises(RuntimeError, match=r"needs a driver for CUDA 12\.1 or newer"):
        module.quantize_4bit(torch.zeros(64), "nf4", 64, torch.empty(32, dtype=torch.uint8), torch.empty(1), 1)


class TestInfo:
    """The line of `python -m optim8` about the module."""

    @pytest.fixture(autouse=True)
    def two_gpus(self, module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(_native._modules, "_cuda", module)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def test_says_what_is_built_and_what_runs(self) -> None:
        assert __main__.describe_cuda() == (
            "built by CUDA 13.0 for 90; runs here as sm_90; driver for CUDA 13.0",
            None,
        )

    @pytest.mark.parametrize(
        "name, value, advice",
        [
            ("CUDA_ON_CPU_ERROR", "209", "reinstall with OPTIM8_CUDA_ARCHS"),
            ("CUDA_ON_CPU_DRIVER", "12000", "got one for CUDA 12.0. Update the driver"),
        ],
    )
    def test_looks_before_it_says_so(self, name: str, value: str, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(name, value)
        line, remedy = __main__.describe_cuda()
        assert line == "not usable"
        assert remedy is not None
        assert advice in remedy

    def test_without_a_gpu_it_is_not_tried(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_ON_CPU_ERROR", "35")
        line, remedy = __main__.describe_cuda()
        assert line == "built by CUDA 13.0 for 90; not tried, as torch sees no GPU"
        assert remedy is None


def test_whether_a_graph_captures_is_asked_of_the_device_of_the_rows(devices: SimpleNamespace) -> None:
    devices.capturing = 1
    assert [pending.is_captured(device) for device in (0, 1)] == [False, True]
    assert devices.current == 0

    class OnSecond:
        is_cuda = True

        def get_device(self) -> int:
            return 1

    with pytest.raises(RuntimeError, match="a step that a CUDA graph captures needs state that is there already"):
        run.check_not_capturing("AdamW8bit", [OnSecond()])  # type: ignore[list-item]
