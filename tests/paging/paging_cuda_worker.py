"""State of CUDA parameters in memory of the host, without a GPU: python paging_cuda_worker.py MODULE.

MODULE is optim8._cuda, built over the shim of cuda_on_cpu; support/cuda_stub.py makes torch believe in a GPU. Prints a
JSON object: for each check "", or what went wrong.
"""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import EVERY, Case
from support.cuda_stub import Gpu, OnCuda, Torch, install, plain
from support.harness import DTYPES, bits, hostile, snapshot, state_bits

import optim8
from optim8.paging import Pager
from optim8.step import pending

KIB = 2**10
SHAPES: tuple[tuple[int, ...], ...] = ((600,), (257,), (0,), (5000,), (4, 6, 10, 10), (12_000,))
TIERS: dict[str, tuple[Any, set[str]]] = {
    "all on the host": (Pager(device_budget=0), {"host"}),
    "some on the host": (Pager(device_budget="16KiB"), {"host", "device"}),
    "all on the device": (Pager(device_budget="1GiB", host_budget="16MiB"), {"device"}),
}


def on(device: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(OnCuda) if device == "cuda" else tensor


def data_of(i: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    data = hostile(torch.Size(SHAPES[i]).numel(), dtype, seed=seed, small=-2, large=0).view(SHAPES[i])
    return data.contiguous(memory_format=torch.channels_last) if data.ndim == 4 else data


def params_of(device: str, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [on(device, data_of(i, dtype, i)).requires_grad_() for i in range(len(SHAPES))]


def steps(params: list[torch.Tensor], optimizer: Any, first: int, last: int, device: str = "cuda") -> list[Any]:
    """Steps `first` to `last`; one parameter gets its first gradient in step 2. Gradients stay alive: see Gpu."""
    held = []
    for t in range(first, last):
        for i, p in enumerate(params):
            p.grad = None if i == 3 and t < 2 else on(device, data_of(i, p.dtype, 100 * t + i))
            held.append(p.grad)
        optimizer.step()
    return held


def check_bits(gpu: Gpu, case: Case, optim_bits: int, tiers: str) -> None:
    """Parameters and state are those of resident state, on the stub and on the CPU, after each of four steps."""
    dtype = list(DTYPES.values())[(len(case.name) + optim_bits) % 3]
    pager, expected = TIERS[tiers]
    options: dict[str, Any] = {"optim_bits": optim_bits, "min_8bit_size": 300}
    sets = [("cpu", None), ("cuda", None), ("cuda", pager)]
    made = [(params_of(device, dtype), device, paged) for device, paged in sets]
    optimizers = [case.make(params, **options, paged=paged) for params, _, paged in made]
    for t in range(4):
        for (params, device, _), optimizer in zip(made, optimizers, strict=True):
            steps(params, optimizer, t, t + 1, device)
        cpu, resident, paged = map(snapshot, optimizers)
        assert paged == resident, t
        assert paged == cpu, t
    # Of an empty parameter there is only the count of its steps, on the host.
    assert {place.tier for place in optimizers[2].placement() if 0 not in place.shape} == expected
    for p in made[2][0]:
        entry = optimizers[2].state[p]
        moment = optimizers[2].moments[0].values(entry)
        pinned = any(segment.holds(moment) for segment in optimizers[2].memory.segments)
        assert pinned == (not isinstance(moment, OnCuda) and p.numel() > 0)


def check_counted_on_the_device(gpu: Gpu) -> None:
    results = []
    for paged in (None, Pager(device_budget=0)):
        params = params_of("cuda")
        optimizer = optim8.AdamW8bit(params, capturable=True, min_8bit_size=300, paged=paged)
        steps(params, optimizer, 0, 3)
        assert isinstance(optimizer.state[params[0]]["step"], OnCuda)
        results.append(snapshot(optimizer))
    assert results[0] == results[1]


def all_state(optimizer: Any) -> list[dict[str, bytes]]:
    return [state_bits(optimizer, p) for p in optimizer.param_groups[0]["params"]]


Path = Callable[[Any, list[torch.Tensor], Any], Any]  # optimizer, parameters, an earlier state dict


def of_state_dict(optimizer: Any, params: Any, earlier: Any) -> Any:
    return [{name: bits(value) for name, value in e.items()} for e in optimizer.state_dict()["state"].values()]


def of_save(optimizer: Any, params: Any, earlier: Any) -> Any:
    file = io.BytesIO()
    torch.save({k: dict(e) for k, e in optimizer.state_dict()["state"].items()}, file)
    return file.getvalue()


def of_deepcopy(optimizer: Any, params: Any, earlier: Any) -> Any:
    return all_state(copy.deepcopy(optimizer))


def of_pickle(optimizer: Any, params: Any, earlier: Any) -> Any:
    return all_state(pickle.loads(pickle.dumps(optimizer)))


def of_load(optimizer: Any, params: Any, earlier: Any) -> Any:
    optimizer.load_state_dict(earlier)
    optimizer._gpu.drain()
    return all_state(optimizer)


def of_load_into_another(optimizer: Any, params: Any, earlier: Any) -> Any:
    saved = optimizer.state_dict()  # the tensors themselves, which are stepped on
    held = steps(params, optimizer, 4, 5)
    other = type(optimizer)(params, min_8bit_size=300)
    other.load_state_dict(saved)
    del held
    return all_state(other)


def of_override(optimizer: Any, params: Any, earlier: Any) -> Any:
    override = optim8.override(params[5], optim_bits=32)
    assert optimizer.precision(params[5]) == "32bit"
    result = all_state(optimizer)[5]
    override.remove()
    return result


def of_strides(optimizer: Any, params: Any, earlier: Any) -> Any:
    before, p = params[4].data, params[4]
    p.grad = None
    p.data = on("cuda", data_of(4, p.dtype, 77).contiguous())
    p.grad = on("cuda", data_of(4, p.dtype, 78).contiguous())
    optimizer.step()
    optimizer._gpu.drain()
    del before
    return all_state(optimizer)[4]


class Writer:
    def add_scalar(self, *_: Any) -> None: ...
    def add_histogram(self, *_: Any, **__: Any) -> None: ...


def of_monitor(optimizer: Any, params: Any, earlier: Any) -> Any:
    with optim8.monitor(optimizer, Writer(), every=1, limit=1.0, sample=512) as watch:
        held = steps(params, optimizer, 4, 5)
    del held
    return [(n, m.error, bits(m.codes)) for h in watch.latest.values() for n, m in h.moments.items()]


def of_freed_segments(optimizer: Any, params: Any, earlier: Any) -> Any:
    optimizer.state.clear()
    optimizer.memory.keep_only([])
    return len(optimizer._gpu.queue)


PATHS: dict[str, Path] = {
    name.removeprefix("of_"): value for name, value in list(globals().items()) if name.startswith("of_")
}


def look(gpu: Gpu, path: Path, deferred: bool) -> Any:
    params = params_of("cuda")
    optimizer: Any = optim8.AdamW8bit(params, lr=0.01, min_8bit_size=300, paged=Pager(device_budget=0))
    optimizer.__dict__["_gpu"] = None  # not copied with the optimizer
    gpu.deferred = False
    steps(params, optimizer, 0, 3)
    earlier = copy.deepcopy(optimizer.state_dict())
    type(optimizer)._gpu, gpu.deferred = gpu, deferred
    del optimizer.__dict__["_gpu"]
    before = gpu.done
    held = steps(params, optimizer, 3, 4)
    held += [segment.memory for segment in optimizer.memory.segments]  # for the run in which nobody waits
    assert gpu.done == before + (not deferred), "a step waits"
    result = path(optimizer, params, earlier)
    gpu.drain()
    gpu.deferred = False
    del held
    return result


def check_path(gpu: Gpu, path: Path) -> None:
    """With launches that are late, all is as with launches that are not; without the wait it is not."""
    expected = look(gpu, path, deferred=False)
    assert look(gpu, path, deferred=True) == expected
    wait, pending.wait = pending.wait, lambda: None
    try:
        assert look(gpu, path, deferred=True) != expected, "this check would not notice that nobody waits"
    finally:
        pending.wait = wait


def check_end(gpu: Gpu) -> None:
    """Memory goes back to the allocator, which gives it to others, once kernels no longer use it."""
    params = params_of("cuda")
    optimizer = optim8.AdamW8bit(params, paged=Pager(device_budget=0))
    gpu.deferred = True
    held = steps(params, optimizer, 0, 1)
    assert gpu.queue
    del optimizer
    gc.collect()
    assert not gpu.queue
    gpu.deferred = False
    del held


def check_graph(gpu: Gpu) -> None:
    """Nobody hears of a graph's replays, so its device is waited for as a whole."""
    params = params_of("cuda")
    optimizer = optim8.AdamW8bit(params, capturable=True, paged=Pager(device_budget=0))
    steps(params, optimizer, 0, 1)
    gpu.capturing = True
    steps(params, optimizer, 1, 2)
    gpu.capturing = False
    gpu.queue.append(lambda: None)  # a replay
    gpu.launched += 1
    optimizer.state_dict()
    assert not gpu.queue
    pending._forget()


def check_capture_without_state(gpu: Gpu) -> None:
    """A graph that captured how state is made would make it anew with every replay."""
    params = params_of("cuda")
    optimizer = optim8.AdamW8bit(params, capturable=True)
    before = bits(params[0])
    gpu.capturing = True
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"AdamW8bit: a step that .* needs state"):
            steps(params, optimizer, 2, 3)
        assert not optimizer.state
    gpu.capturing = False
    steps(params, optimizer, 2, 3)
    for p in params:
        optimizer.state[p]["step"] = plain(optimizer.state[p]["step"]).clone()
    gpu.capturing = True
    launched = gpu.launched
    with pytest.raises(RuntimeError, match="needs state that is there already"):
        steps(params, optimizer, 3, 4)
    assert (gpu.launched, bits(params[0]) != before) == (launched, True)
    gpu.capturing = False
    steps(params, optimizer, 3, 4)
    gpu.capturing = True
    steps(params, optimizer, 4, 5)
    assert float(optimizer.state[params[0]]["step"]) == 3


def refused(call: Callable[[], Any], *words: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def check_refusals(gpu: Gpu) -> None:
    params = params_of("cuda")
    small = Pager(device_budget=0, host_budget="80KiB", bucket="64KiB")
    optimizer: Any = optim8.AdamW8bit(params, paged=small)
    refused(lambda: steps(params, optimizer, 0, 1), "AdamW8bit", "cannot use a mapped file", "Raise host_budget")
    assert not optimizer.state
    with tempfile.TemporaryDirectory() as directory:
        keep = {"directory": directory, "keep": True}
        refused(lambda: optim8.AdamW8bit(params, paged=Pager(**keep)), "kept directory", "Pass a Pager without keep")
        kept: Any = optim8.AdamW8bit(params_of("cpu"), paged=Pager(**keep))  # the lock was given back
        refused(lambda: kept.add_param_group({"params": params}), "kept directory")
        assert len(kept.param_groups) == 1
        kept.close()
    for paged in (None, Pager(device_budget=0)):
        for name in ("exp_avg_codes", "exp_avg_sq_root_absmax"):
            p = params_of("cuda")
            other: Any = optim8.AdamW8bit(p, min_8bit_size=300, paged=paged)
            steps(p, other, 0, 1)
            other.state[p[0]][name] = plain(other.state[p[0]][name]).clone()  # memory of the host that is not pinned
            before = snapshot(other)
            refused(other.step, f"state['{name}']", "on cpu")
            assert snapshot(other) == before


def check_budget_of_the_device(gpu: Gpu) -> None:
    """State that is made later counts what is on the device already."""
    params = params_of("cuda")
    optimizer = optim8.AdamW8bit([{"params": params[:1]}], optim_bits=32, paged=Pager(device_budget="5KiB"))
    optimizer.add_param_group({"params": params[1:2]})
    steps(params[:2], optimizer, 0, 1)
    assert [place.tier for place in optimizer.placement()] == ["device", "host"]


CHECKS: dict[str, Callable[[Gpu], None]] = {
    **{
        f"bits of {case} in {optim_bits} bits, {tiers}": (
            lambda gpu, case=case, optim_bits=optim_bits, tiers=tiers: check_bits(gpu, case, optim_bits, tiers)
        )
        for case in EVERY
        for optim_bits in (8, 32)
        for tiers in TIERS
    },
    **{f"waits: {name}": (lambda gpu, path=path: check_path(gpu, path)) for name, path in PATHS.items()},
    "waits: end": check_end,
    "waits: graph": check_graph,
    "counted on the device": check_counted_on_the_device,
    "capture without state": check_capture_without_state,
    "refusals": check_refusals,
    "budget of the device": check_budget_of_the_device,
}


def main() -> None:
    torch.set_num_threads(1)
    gpu, found = install(sys.argv[1]), {}
    for name, check in CHECKS.items():
        try:
            with Torch(gpu):
                check(gpu)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
        gpu.drain()
        gpu.deferred = gpu.capturing = False
    print(json.dumps(found))


if __name__ == "__main__":
    main()
