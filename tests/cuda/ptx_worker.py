"""Optimizers and the functional API on tensors that seem to be on GPUs: python ptx_worker.py MODULE.

MODULE is optim8._cuda as ptx/link.py links it: the objects for GPUs, whose kernels run on the CPU from their PTX.
Prints a JSON object: for each check "", or what went wrong.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from cases import EVERY, Case
from ptx import link
from support.cuda_stub import CUDA, OnCuda, Torch, install, plain
from support.functional_reference import every_result
from support.harness import DTYPES, hostile, snapshot

import optim8
from optim8 import _native

SHAPES = (600, 257, 1, 2048)
STREAMS = {0: 7, 1: 9}


class OnSecond(torch.Tensor):
    """A tensor that says it is on the second GPU."""

    device = property(lambda self: torch.device("cuda", 1))  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]


class Launch(NamedTuple):
    """As ptx/runtime.cpp records it."""

    kernel: str
    blocks: int
    threads: int
    parameter_bytes: int
    shared_bytes: int
    stream: int
    device: int


def is_columns(launch: Launch) -> bool:
    return "12step_columns" in launch.kernel


class Runtime:
    """What ptx/runtime.cpp offers tests."""

    def __init__(self, path: str) -> None:
        self.library = ctypes.CDLL(path)
        self.library.fake_cuda_launch.restype = ctypes.c_char_p

    @property
    def launches(self) -> list[Launch]:
        found = []
        for i in range(self.library.fake_cuda_launches()):
            kernel, *numbers = self.library.fake_cuda_launch(i).decode().split()
            found.append(Launch(kernel, *(int(number, 0) for number in numbers)))
        return found

    def fail(self, after: int, error: int) -> None:
        """The launch after that many others gives this error."""
        self.library.fake_cuda_fail(after, error)

    @contextlib.contextmanager
    def device(self, index: int) -> Iterator[None]:
        """Stands for torch.cuda.device."""
        self.library.fake_cuda_set_device(index)
        yield
        self.library.fake_cuda_set_device(0)


class Posing(Torch):
    """Takes "cuda" as code that is written for GPUs says it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.cuda, torch.Tensor.cpu):
            copied = plain(args[0].detach()).clone()
            return copied.as_subclass(OnCuda) if func is torch.Tensor.cuda else copied
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        named = {"cuda": CUDA, "cpu": torch.device("cpu")}
        args = tuple(named.get(value, value) if isinstance(value, str) else value for value in args)
        kwargs = {k: named.get(v, v) if isinstance(v, str) else v for k, v in (kwargs or {}).items()}
        return super().__torch_function__(func, types, args, kwargs)


def on(device: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(OnCuda) if device == "cuda" else tensor


def params_of(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    return [
        on(device, hostile(size, dtype, seed=i, small=-2, large=0)).requires_grad_() for i, size in enumerate(SHAPES)
    ]


def step(params: list[torch.Tensor], optimizer: Any, t: int, device: str = "cuda") -> None:
    for i, p in enumerate(params):
        p.grad = on(device, hostile(p.numel(), p.dtype, seed=100 * t + i, small=-3, large=0))
    optimizer.step()


def state_of(case: Case, optimizer: Any) -> dict[str, Any]:
    """Parameters and state, but for what counts steps, which may be a number or a tensor."""
    counts = ("step", "capturable", *case.running)
    return {name: value for name, value in snapshot(optimizer).items() if not name.endswith(counts)}


def check_bits(case: Case, options: dict[str, Any]) -> None:
    """Parameters and state are those of the CPU, after each of three steps."""
    dtype = list(DTYPES.values())[len(case.name) % 3]
    on_cpu = {name: value for name, value in options.items() if name != "capturable"}
    made = [(params_of(device, dtype), device) for device in ("cpu", "cuda")]
    optimizers = [case.make(params, **own) for (params, _), own in zip(made, (on_cpu, options), strict=True)]
    for t in range(3):
        for (params, device), optimizer in zip(made, optimizers, strict=True):
            step(params, optimizer, t, device)
        expected, found = (state_of(case, optimizer) for optimizer in optimizers)
        assert found == expected, t


def check_columns(runtime: Runtime, gives_columns: bool, name: str, dtype: torch.dtype) -> None:
    """Tensors large enough for the kernel over columns, of a GPU of two multiprocessors; one of them has a rest."""
    made = [
        ([on(device, hostile(n, dtype, seed=n, small=-2, large=0)) for n in (50_000, 1, 30_208)], device)
        for device in ("cpu", "cuda")
    ]
    optimizers = [getattr(optim8, name)([p.requires_grad_() for p in params]) for params, _ in made]
    first = len(runtime.launches)
    for t in range(3):
        for (params, device), optimizer in zip(made, optimizers, strict=True):
            step(params, optimizer, t, device)
        assert snapshot(optimizers[0]) == snapshot(optimizers[1]), t
    if gives_columns:
        assert sum(is_columns(launch) for launch in runtime.launches[first:]) == 3


def check_functional(dtype: torch.dtype) -> None:
    x = torch.randn(24, 100, generator=torch.Generator().manual_seed(3)).to(dtype)
    expected = every_result(x)
    for i, (mine, theirs) in enumerate(zip(every_result(on("cuda", x)), expected, strict=True)):
        assert torch.equal(plain(mine).flatten(), theirs.flatten()), i


def check_report(name: str) -> None:
    """What `make gpu-report` compares on a GPU, in small."""
    from gpu import check  # which looks at tensors, so that the stub must be there

    compare = check.Comparison()
    check.COMPARISONS[name](compare, True)
    assert compare.count > 0
    assert compare.differing == []


def check_probe(module: Any) -> None:
    found = module.probe(0)
    assert found["binary"] == found["ptx"]
    assert str(found["ptx"]) in module.architectures


def check_launches(runtime: Runtime) -> None:
    """Of all checks before: a launch has what its kernel is compiled for, in machine code too, and torch's stream of
    the device."""
    assert len(runtime.launches) >= 3 * len(EVERY) * len(FORMS)
    in_machine_code = link.parameter_bytes()
    for launch in runtime.launches:
        assert in_machine_code[launch.kernel] == {launch.parameter_bytes}, launch
        assert launch.threads == (512 if is_columns(launch) else 128)
        assert (launch.shared_bytes > 0) == is_columns(launch)
        assert launch.parameter_bytes <= 32764
        assert launch.stream == STREAMS[launch.device]
    assert max(launch.parameter_bytes for launch in runtime.launches) > 4096


def arguments_on(kind: type[torch.Tensor], size: int) -> list[Any]:
    code = torch.tensor(_native.cpu().dynamic_map(True))
    out, absmax = torch.empty(size, dtype=torch.uint8), torch.empty(-(-size // 256))
    values = torch.linspace(-1, 1, size)
    code, values, out, absmax = (t.as_subclass(kind) for t in (code, values, out, absmax))
    return [values, code, 256, out, absmax, 1]


def check_second_device(module: Any, runtime: Runtime) -> None:
    for kind, device in ((OnSecond, 1), (OnCuda, 0)):
        first = len(runtime.launches)
        module.quantize_blockwise(*arguments_on(kind, 1000))
        launches = runtime.launches[first:]
        assert [launch.device for launch in launches] == [device, device]
        assert [launch.blocks for launch in launches] == [1, 1]
    mixed = [*arguments_on(OnCuda, 1000)[:3], *arguments_on(OnSecond, 1000)[3:]]
    with pytest.raises(ValueError, match="quantize_blockwise: out must be on"):
        module.quantize_blockwise(*mixed)


def check_failed_launch(module: Any, runtime: Runtime) -> None:
    for after in (0, 1):
        runtime.fail(after, 700)
        with pytest.raises(RuntimeError, match=r"quantize_blockwise: CUDA says .*CUDA_LAUNCH_BLOCKING=1 shows"):
            module.quantize_blockwise(*arguments_on(OnCuda, 1000))


def check_failed_step(runtime: Runtime) -> None:
    """A step whose launch fails is not counted; made again it is the step that it was to be."""
    made = [(params_of(device, torch.float32), device) for device in ("cpu", "cuda")]
    optimizers: list[Any] = [optim8.AdamW8bit(params, min_8bit_size=0) for params, _ in made]
    for t in range(3):
        for (params, device), optimizer in zip(made, optimizers, strict=True):
            if t == 1 and device == "cuda":
                before = snapshot(optimizer)
                runtime.fail(0, 700)
                with pytest.raises(RuntimeError, match="optimizer step: CUDA says"):
                    step(params, optimizer, t, device)
                assert snapshot(optimizer) == before
            step(params, optimizer, t, device)
    assert snapshot(optimizers[0]) == snapshot(optimizers[1])


def check_kernel_at_fault(module: Any) -> None:
    """Memory that is not aligned as its type is a fault of the kernel that reads it."""
    values = torch.frombuffer(bytearray(4001), dtype=torch.float32, offset=1, count=1000)
    with pytest.raises(RuntimeError, match=r"is not a multiple of 4: ld\.global"):
        module.quantize_blockwise(values.as_subclass(OnCuda), *arguments_on(OnCuda, 1000)[1:])


REPORTED = ("steps", "large", "huge", "functions", "matrices", "roots", "quotients")
FORMS: dict[str, dict[str, Any]] = {
    "8 bits": {"optim_bits": 8},
    "16 bits": {"optim_bits": 16},
    "32 bits": {"optim_bits": 32},
    "8 bits, counted on the device": {"optim_bits": 8, "capturable": True},
}


def checks(module: Any, runtime: Runtime) -> dict[str, Callable[[], None]]:
    listed: dict[str, Callable[[], None]] = {
        f"bits of {case} in {name}": (lambda case=case, options=options: check_bits(case, options))
        for case in EVERY
        for name, options in FORMS.items()
    }
    for name, dtype in DTYPES.items():
        listed[f"functional, {name}"] = lambda dtype=dtype: check_functional(dtype)
    gives_columns = module.probe(0)["ptx"] in link.COLUMNS
    for name in ("AdamW8bit", "Adam8bit", "Lion8bit"):
        for dtype in (torch.float32, torch.bfloat16):
            listed[f"columns of {name}, {dtype}"] = lambda name=name, dtype=dtype: check_columns(
                runtime, gives_columns, name, dtype
            )
    for name in REPORTED:
        listed[f"report, {name}"] = lambda name=name: check_report(name)
    return {
        **listed,
        "probe": lambda: check_probe(module),
        "second device": lambda: check_second_device(module, runtime),
        "failed launch": lambda: check_failed_launch(module, runtime),
        "failed step": lambda: check_failed_step(runtime),
        "kernel at fault": lambda: check_kernel_at_fault(module),
        "launches": lambda: check_launches(runtime),
    }


def main() -> None:
    torch.set_num_threads(1)
    gpu, runtime, found = install(sys.argv[1]), Runtime(sys.argv[1]), {}
    # As it is: it takes tensors on GPUs, and launches are done when it returns.
    module, cpu = gpu.module, _native.cpu()
    _native.module_for = lambda device, who: module if device.type == "cuda" else cpu  # type: ignore[assignment, return-value]
    torch.cuda.set_sync_debug_mode = lambda mode: None
    torch.cuda.device = runtime.device  # type: ignore[assignment, misc]
    torch.cuda.current_stream = lambda device=0: type("Stream", (), {"cuda_stream": STREAMS[device or 0]})()
    for name, work in checks(module, runtime).items():
        try:
            with Posing(gpu):
                work()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
