"""A step over paged state gives the bits of a step over resident state, wherever the state is and however it is cut."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, EVERY, Case, exported_names
from support.harness import DTYPES, hostile, hostile_parameters, parameter, set_grad, snapshot, torch_threads
from support.pairs import pairwise

import optim8
from optim8 import _native
from optim8.paging import Pager
from optim8.paging.store import Store
from optim8.paging.streaming import Stream

KIB = 2**10
# Around the block; over several buckets of 64 KiB; with strides of its own; scalar; empty.
SHAPES: tuple[tuple[int, ...], ...] = ((255,), (100_003,), (0,), (257,), (2, 3, 70, 90), (), (65_536,), (4096,))

PAGERS: dict[str, Callable[[Path], Any]] = {
    "True": lambda _: True,
    "all on disk": lambda d: Pager(directory=d),
    "all on disk, small buckets": lambda d: Pager(directory=d, bucket="64KiB"),
    "all on disk under a limit": lambda d: Pager(directory=d, host_budget="64KiB", bucket=64 * KIB),
    "half on disk": lambda d: Pager(directory=d, host_budget=300 * KIB, bucket="64KiB"),
    "all in memory": lambda d: Pager(directory=d, host_budget="1GiB"),
}


def params_of(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    return hostile_parameters(SHAPES, dtype)


def steps(params: list[torch.nn.Parameter], optimizer: Any, first: int, last: int, wide: bool = False) -> None:
    """Steps `first` to `last`; some gradients are missing, and one parameter gets its first in step 2."""
    for t in range(first, last):
        for i, p in enumerate(params):
            p.grad = None
            if (t + i) % 5 == 4 or (i == 6 and t < 2):
                continue
            grad = torch.empty_like(p, dtype=torch.float32 if wide else p.dtype)
            grad.copy_(hostile(p.numel(), grad.dtype, seed=100 * t + i).view(p.shape))
            if i == 1:
                grad.view(-1)[77:80] = torch.tensor([float("nan"), float("inf"), -float("inf")])
            set_grad(p, grad)
        optimizer.step()


@pairwise(case=EVERY, pager=PAGERS, optim_bits=[8, 16, 32], dtype=DTYPES, threads=[1, 3])
def test_bits_are_those_of_a_resident_step(
    case: Case, pager: str, optim_bits: int, dtype: str, threads: int, tmp_path: Path
) -> None:
    """8-bit, 32-bit and mixed state; state and parameters have the same bits after each of four steps."""
    resident, paged = params_of(DTYPES[dtype]), params_of(DTYPES[dtype])
    options = {"optim_bits": optim_bits, "min_8bit_size": 256}
    if dtype != "float32":
        options["master_bits"] = (16, 24, 32)[list(PAGERS).index(pager) % 3]
    a, b = case.make(resident, **options), case.make(paged, **options, paged=PAGERS[pager](tmp_path))
    wide = dtype != "float32" and hasattr(resident[0], "grad_dtype")
    with torch_threads(threads):
        for t in range(4):
            for params, optimizer in ((resident, a), (paged, b)):
                steps(params, optimizer, t, t + 1, wide=t == 3 and wide)
            assert snapshot(b) == snapshot(a), t
    assert all(type(value) is torch.Tensor for entry in b.state.values() for value in entry.values())


def test_every_optimizer_has_a_paged_twin() -> None:
    for case in EVERY:
        twin = getattr(optim8, f"Paged{case}")
        assert twin.__mro__[1] is case.cls
        p = parameter(torch.ones(9), torch.ones(9))
        options = {**case.hypers[0], **case.always}
        optimizer = twin([p], **options)
        optimizer.step()
        assert [place.tier for place in optimizer.placement()] == ["disk"]
        with pytest.raises(ValueError, match=f"Paged{case} is always paged, got paged=False. Use {case}."):
            twin([p], **options, paged=False)
    assert {f"Paged{name}" for name in CASES} == {name for name in dir(optim8) if name.startswith("Paged")}
    assert exported_names() == set(CASES)


def test_buckets_cover_every_block_once_and_hold_what_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large tensor is cut by blocks, small ones share a bucket, spans are the state's pages and nothing else."""
    cut: list[Any] = []
    step = Stream.step

    def spied(stream: Stream, rows: Any, *arguments: Any) -> None:
        # The rows last as long as the step.
        cut[:] = [_native.cpu().Buckets(rows, [s.span for s in optimizer.memory.segments], 64 * KIB)]
        cut.append(_native.cpu().Buckets(rows, [], 64 * KIB))
        step(stream, rows, *arguments)

    monkeypatch.setattr(Stream, "step", spied)
    params = params_of(torch.float32)
    optimizer = optim8.AdamW8bit(params, min_8bit_size=256, paged=Pager(bucket="64KiB"))
    steps(params, optimizer, 0, 3)
    (segment, *_) = optimizer.memory.segments
    spans = [s.span for s in optimizer.memory.segments]
    buckets, nothing_paged = cut
    in_buckets = [buckets[i] for i in range(len(buckets))]
    assert len(buckets) > 5
    state = sum(
        value.nbytes
        for p in params
        if p.grad is not None and p.numel()
        for key, value in optimizer.state[p].items()
        if key != "step"
    )
    whole_blocks = sum(b.bytes for b in in_buckets)
    assert state <= whole_blocks < state + len(params) * 2 * 4 * 256
    assert all(0 < b.bytes <= 64 * KIB for b in in_buckets)
    for b in in_buckets:
        assert b.spans == sorted(b.spans)
        for (begin, end), after in zip(b.spans, [*b.spans[1:], (2**63, 0)], strict=True):
            assert begin % 4096 == end % 4096 == 0
            assert begin < end < after[0]
            assert any(low <= begin and end <= high for low, high in spans)
    assert len(nothing_paged) == 1
    assert nothing_paged[0].spans == []
    assert segment.tier == "disk"


def steps_replaced_state_where_it_is(size: int, pager: Pager) -> bool:
    """Someone moves one moment of a paged parameter into memory of his own, then all of its state."""
    results = []
    for paged in (None, pager):
        p = parameter(hostile(size, torch.float32, seed=3, small=-2, large=0))
        optimizer = optim8.AdamW8bit([p], lr=0.01, paged=paged)
        for t in range(4):
            p.grad = hostile(size, torch.float32, seed=t)
            optimizer.step()
            if t == 1:
                optimizer.state[p]["exp_avg_codes"] = optimizer.state[p]["exp_avg_codes"].clone()
            if t == 2:
                optimizer.state[p] = {key: value.clone() for key, value in optimizer.state[p].items()}
        results.append(snapshot(optimizer))
    return bool(results[0] == results[1])


def test_state_that_was_replaced_is_stepped_where_it_is_and_not_let_go_of(tmp_path: Path) -> None:
    """The pages around it are not a file's."""
    assert steps_replaced_state_where_it_is(50_000, Pager(directory=tmp_path, host_budget="64KiB", bucket="64KiB"))


def test_placement(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Linear(200, 50_000, bias=False))
    pager = Pager(directory=tmp_path, host_budget="1MiB", bucket="64KiB")
    optimizer = optim8.AdamW8bit(model.named_parameters(), paged=pager)
    assert [place.tier for place in optimizer.placement()] == ["none"] * 3
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model[0].bias.grad = None
    optimizer.step()
    weight, bias, large = optimizer.placement()
    assert (weight.name, weight.shape, weight.precision, weight.tier) == ("0.weight", (200, 300), "8bit", "host")
    assert weight.bytes == sum(t.nbytes for t in optimizer.state[model[0].weight].values())
    assert (bias.tier, bias.bytes, bias.precision) == ("none", 0, "32bit")
    assert (large.tier, large.where, large.group, large.index) == ("disk", str(tmp_path), 0, 2)
    assert optimizer.placement().bytes_by_tier() == {"host": weight.bytes, "disk": large.bytes}
    table = str(optimizer.placement()).splitlines()
    assert table[0].split() == ["parameter", "shape", "state", "tier", "where", "MiB"]
    assert table[4].split()[:5] == ["1.weight", "50000x200", "8bit", "disk", str(tmp_path)]
    assert [line.split() for line in table[5:]] == [["total", "host", "0.12"], ["total", "disk", "19.37"]]
    resident = optim8.AdamW8bit(model.parameters())
    resident.step()
    assert [place.tier for place in resident.placement()] == ["host", "none", "host"]


def test_a_file_has_no_name_and_goes_with_its_optimizer(tmp_path: Path) -> None:
    p = parameter(torch.ones(100_000), torch.ones(100_000))
    optimizer = optim8.AdamW8bit([p], paged=Pager(directory=tmp_path))
    optimizer.step()
    assert mapped_from(tmp_path)
    assert list(tmp_path.iterdir()) == []
    codes = optimizer.state[p]["exp_avg_codes"]
    del optimizer
    gc.collect()
    assert codes.max() > 127, "a tensor that someone holds keeps its memory"
    del codes
    gc.collect()
    assert not mapped_from(tmp_path)


def mapped_from(directory: Path) -> list[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in lines if str(directory) in line]


def test_rows_on_a_gpu_are_stepped_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """State that the pager leaves on the device is not forgotten; a stub stands for the table and the module."""
    calls: list[Any] = []

    class Rows:
        device, count_on_device, address, has_norms = 0, False, 4096, False

        def __len__(self) -> int:
            return 2

        def count(self) -> None:
            calls.append("counted")

    class Table:
        params: tuple[torch.Tensor, ...] = ()

        def elsewhere(self) -> list[Rows]:
            return [Rows()]

        def on_cpu(self) -> None:
            return None

    class Module:
        def step(self, *arguments: Any) -> None:
            calls.append(arguments)

    monkeypatch.setattr(_native, "module_for", lambda device, who: Module())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    Store("AdamW8bit", "adamw", Pager(directory=tmp_path)).run_step(Table(), "AdamW8bit")
    assert calls == [(4096, 2, 0, None, None, None), "counted"]
