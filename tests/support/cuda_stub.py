"""A stub of a GPU for a process of its own, which must import this before optim8 looks at a tensor.

Tensors of a class of this file say that they are on cuda:0; a torch function mode makes one wherever code requests a
CUDA tensor. Launches wait in a queue, as in a stream, until somebody waits for an event.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from optim8 import _native
from optim8.state import allocation

# The exchange table tells where a tensor really is; without it native code asks for attributes, as with older torch.
if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
    del torch.Tensor.__dlpack_c_exchange_api__

CUDA = torch.device("cuda", 0)


class OnCuda(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        twin = self.detach().as_subclass(torch.Tensor).clone().as_subclass(OnCuda)
        memo[id(self)] = twin.requires_grad_(self.requires_grad)
        return memo[id(self)]  # type: ignore[no-any-return]


class Torch(TorchFunctionMode):
    """Makes OnCuda tensors for the device cuda:0, and moves to it and from it by copying."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.nan_to_num:  # the monitor's look at what a kernel has written: a stream works in order
            self.gpu.drain()
        kwargs = {key: value for key, value in (kwargs or {}).items() if key != "pin_memory"}
        devices = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.device)]
        args = tuple(torch.device("cpu") if isinstance(value, torch.device) else value for value in args)
        kwargs = {k: torch.device("cpu") if isinstance(v, torch.device) else v for k, v in kwargs.items()}
        out = func(*args, **kwargs)
        if devices and isinstance(out, torch.Tensor):
            there = OnCuda if devices[0].type == "cuda" else torch.Tensor
            out = out if type(out) is there else out.clone().as_subclass(there)
        if isinstance(out, torch.Tensor) and self.gpu.deferred:
            self.gpu.held.append(out)
        return out


class Gpu:
    """The stub of a device: one stream, whose launches run when somebody waits."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.queue: list[Callable[[], None]] = []
        self.held: list[torch.Tensor] = []  # memory of a stream goes to nobody else before its launches have run
        self.launched = self.done = 0
        self.deferred = self.capturing = False
        self.cuda_stream = 7

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.module, name)
        if not callable(value):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            self.drain()  # a stream works in order
            return value(*map(plain, args), **{k: plain(v) for k, v in kwargs.items()})

        return call

    def step(self, rows: int, count: int, device: int, *scalars: Any, counted: bool = False) -> None:
        # Rows and their scalars travel in a kernel's parameters: the caller may overwrite them at once.
        copied_rows = ctypes.create_string_buffer(ctypes.string_at(rows, count * self.module.row_size))
        copied_scalars = []
        for row in range(count):
            place = ctypes.c_void_p.from_buffer(copied_rows, row * self.module.row_size + self.module.scalars_offset)
            if place.value is not None:
                copied_scalars.append(
                    ctypes.create_string_buffer(ctypes.string_at(place.value, 4 * self.module.scalars_size))
                )
                place.value = ctypes.addressof(copied_scalars[-1])
        plain_scalars = tuple(map(plain, scalars))

        def launch() -> None:
            assert len(copied_scalars) in (0, count)  # they live as long as the launch
            self.module.step(ctypes.addressof(copied_rows), count, device, *plain_scalars, counted=counted)

        self.queue.append(launch)
        self.launched += 1
        if not self.deferred:
            self.run_to(self.launched)

    def run_to(self, mark: int) -> None:
        while self.done < mark:
            self.queue.pop(0)()
            self.done += 1
        if not self.queue and not self.deferred:
            self.held.clear()

    def drain(self) -> None:
        self.run_to(self.launched)


def plain(value: Any) -> Any:
    """A tensor as the CPU's own; everything else as it is."""
    return value.as_subclass(torch.Tensor) if isinstance(value, OnCuda) else value


def install(path: str) -> Gpu:
    """Loads optim8._cuda from `path` and puts the stub in the places of torch.cuda and optim8._native that matter."""
    spec = importlib.util.spec_from_file_location("_cuda", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    gpu = Gpu(module)

    class Event:
        mark = 0

        def record(self, stream: Gpu) -> None:
            self.mark = stream.launched

        def synchronize(self) -> None:
            gpu.run_to(self.mark)

    def cut(flat: torch.Tensor, *places: Any, **how: Any) -> Iterator[torch.Tensor]:
        tensors = native_cut(plain(flat), *places, **how)
        return (t.as_subclass(OnCuda) for t in tensors) if isinstance(flat, OnCuda) else tensors

    native_cut, allocation.cut = allocation.cut, cut
    torch.cuda.Event = Event  # type: ignore[assignment, misc]
    torch.cuda.current_stream = lambda device=None: gpu  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda device=None: gpu.drain()
    torch.cuda.is_current_stream_capturing = lambda: gpu.capturing
    torch.cuda.current_device = lambda: 0
    torch.cuda.mem_get_info = lambda device=None: (2**40, 2**40)
    _native.module_for = lambda device, who: gpu if device.type == "cuda" else _native.cpu()  # type: ignore[assignment, return-value]
    return gpu
