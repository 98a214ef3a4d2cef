"""The profiler's phases, kinds and peaks, and that nothing of it stays behind."""

from __future__ import annotations

import contextlib
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import child_environment
from torch import nn

import optim8
from optim8.memory.profiling import profiler, sources

MIB = 2**20
ROWS, WIDE, NARROW = 512, 1024, 256


def training(device: torch.device) -> tuple[nn.Module, Any, torch.Tensor]:
    model = nn.Sequential(nn.Linear(NARROW, WIDE), nn.GELU(), nn.Linear(WIDE, NARROW)).to(device)
    return model, optim8.AdamW8bit(model.parameters()), torch.randn(ROWS, NARROW, device=device)


def step(model: nn.Module, optimizer: Any, data: torch.Tensor, **zero: Any) -> None:
    model(data).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(**zero)


def phases(prof: optim8.memory.Profile) -> list[tuple[int, str]]:
    """Step and phase of every record but those between phases."""
    return [(record.step, record.phase) for record in prof.records if record.phase != "between"]


def test_kinds_are_exact(device: torch.device) -> None:
    model, optimizer, data = training(device)
    planned = optim8.memory.plan(model, optimizer)
    with optim8.memory.profile(model, optimizer) as prof:
        for _ in range(3):
            step(model, optimizer, data)
    expected = [(i, phase) for i in range(3) for phase in ("forward", "backward", "step")]
    assert phases(prof) == expected
    for record in prof.records:
        assert sum(record.kinds.values()) == record.end <= record.peak
        assert record.kinds["parameters"] == planned.bytes["parameters"]
    by_phase = {(record.step, record.phase): record for record in prof.records if record.phase != "between"}
    for i in range(3):
        forward, backward, stepped = (by_phase[i, phase] for phase in ("forward", "backward", "step"))
        # What GELU saves, what the last layer saves, and the output; the loss and its gradient are a little more.
        kept = 4 * ROWS * (2 * WIDE + NARROW)
        assert forward.kinds["gradients"] == 0
        assert kept <= forward.kinds["activations"] <= kept + 4 * ROWS * NARROW + 4096
        assert backward.kinds["gradients"] == stepped.kinds["gradients"] == planned.bytes["gradients"]
        assert backward.kinds["activations"] < 4096
        state = sum(count for kind, count in stepped.kinds.items() if kind.startswith("state"))
        assert state == planned.state_bytes
        assert backward.peak > backward.end + 4 * ROWS * WIDE  # the gradient of what GELU saved
    assert prof.peak == max(record.peak for record in prof.records)


# In a process of its own every tensor of these sizes is mapped alone and given back when it dies, so what the kernel
# counts (VmRSS, and VmHWM for the peak) must be what the allocator reports. Pages of files are left out of both: they
# are libraries, which the kernel drops and reads back as it likes.
WORKER = """
import json, re, torch, optim8
from pathlib import Path
from optim8.memory.profiling import sources

class OwnMemory(sources.ResidentSource):
    def __init__(self):
        super().__init__()
        self.files = []

    def mark(self):
        status = Path("/proc/self/status").read_text()
        self.files.append(1024 * int(re.search(r"RssFile:\\s*(\\d+)", status)[1]))
        super().mark()

    def readings(self, last):
        marked, self.files = self.files, []
        return [(now - of, most - of) for (now, most), of in zip(super().readings(last), marked)]

sources.ResidentSource = OwnMemory
torch.manual_seed(0)
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(1024, 4096), torch.nn.GELU(), torch.nn.Linear(4096, 1024))
optimizer = optim8.AdamW8bit(model.parameters())
data = torch.randn(2048, 1024)
def train():
    for _ in range(2):
        model(data).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
train()
with optim8.memory.profile(model, optimizer, source="rss"):  # reads what that needs of libraries
    train()
found = {}
for source in ("allocations", "rss"):
    with optim8.memory.profile(model, optimizer, source=source) as prof:
        train()
    first = prof.records[0].end
    found[source] = [(r.step, r.phase, r.peak - first, r.end - first) for r in prof.records]
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_peaks_are_those_that_the_kernel_counts() -> None:
    environment = child_environment(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    done = subprocess.run([sys.executable, "-c", WORKER], capture_output=True, text=True, env=environment)
    if "cannot be used" in done.stderr:
        pytest.skip("this system does not let a process reset its peak memory")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    known = 4 * 1024 * 4096 * 2  # parameters, in both levels from the start
    for ours, kernel in zip(found["allocations"], found["rss"], strict=True):
        assert ours[:2] == kernel[:2]
        assert known + ours[2] == pytest.approx(known + kernel[2], rel=0.01)
    assert max(row[2] for row in found["allocations"]) > 100 * MIB


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peaks_are_those_of_the_cuda_allocator() -> None:
    device = torch.device("cuda")
    model, optimizer, data = training(device)
    step(model, optimizer, data)
    torch.cuda.reset_peak_memory_stats()
    step(model, optimizer, data)
    expected = torch.cuda.max_memory_allocated()
    with optim8.memory.profile(model, optimizer) as prof:
        step(model, optimizer, data)
    assert prof.source == "cuda"
    assert prof.peak == pytest.approx(expected, rel=0.01)


def test_the_cuda_counters_are_read_at_every_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    counters = {"now": 100, "most": 250}

    def stats(_: torch.device) -> dict[str, Any]:
        return {"allocated_bytes": {"all": {"current": counters["now"], "peak": counters["most"]}}}

    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", stats)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: counters.update(most=counters["now"]))
    source = sources.source_for(None, torch.device("cuda", 0))
    source.start(40, [])
    for now, most in ((300, 700), (120, 320)):
        counters.update(now=now, most=most)
        source.mark()
    assert list(source.readings(last=True)) == [(100, 250), (300, 700), (120, 320)]
    assert counters["most"] == 120


def accumulation(model: nn.Module, optimizer: Any, data: torch.Tensor) -> None:
    for part in data.chunk(3):
        model(part).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


def closure(model: nn.Module, optimizer: Any, data: torch.Tensor) -> None:
    def evaluate() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(data).square().mean()
        loss.backward()
        return loss

    optimizer.step(evaluate)


def evaluation(model: nn.Module, optimizer: Any, data: torch.Tensor) -> None:
    step(model, optimizer, data, set_to_none=False)
    with torch.no_grad():
        model(data)


def twice(model: nn.Module, optimizer: Any, data: torch.Tensor) -> None:
    """Two losses from one output, with two backward passes."""
    output = model(data)
    output.mean().backward(retain_graph=True)
    output.square().mean().backward()
    optimizer.step()


LOOPS: list[tuple[Callable[..., None], list[str]]] = [
    (step, ["forward", "backward", "step"]),
    (accumulation, ["forward", "backward"] * 3 + ["step"]),
    (closure, ["step", "forward", "backward", "step"]),
    (evaluation, ["forward", "backward", "step"]),
    (twice, ["forward", "backward", "step"]),
]


@pytest.mark.parametrize("loop, expected", LOOPS, ids=[loop.__name__ for loop, _ in LOOPS])
@pytest.mark.parametrize("source", ["allocations", "rss"])
def test_loops_of_any_kind(source: str, loop: Callable[..., None], expected: list[str]) -> None:
    model, optimizer, data = training(torch.device("cpu"))
    with optim8.memory.profile(model, optimizer, source=source) as prof:
        loop(model, optimizer, data)
        loop(model, optimizer, data)
    steps = [[phase for at, phase in phases(prof) if at == i] for i in range(2)]
    if loop is evaluation:
        assert steps[1] == ["forward", *expected]  # the evaluation comes after the first step
        assert phases(prof)[-1] == (2, "forward")
    else:
        assert steps == [expected, expected]
    gradients = 4 * sum(p.numel() for p in model.parameters())
    assert {r.kinds["gradients"] for r in prof.records if r.phase == "step" and r.step == 1} <= {0, gradients}


class Dictionary(nn.Module):
    """Returns what Hugging Face models return: a mapping, with the loss in it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(NARROW, NARROW)

    def forward(self, data: torch.Tensor) -> dict[str, Any]:
        result = self.layer(data)
        return {"loss": result.square().mean(), "hidden": (result, [result * 2]), "count": 3}


def test_outputs_in_containers_and_other_optimizers() -> None:
    model = Dictionary()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with optim8.memory.profile(model, optimizer) as prof:
        model(torch.randn(9, NARROW))["loss"].backward()
        optimizer.step()
    assert phases(prof) == [(0, "forward"), (0, "backward"), (0, "step")]
    assert prof.records[-1].kinds["state (host)"] == 4 * sum(p.numel() for p in model.parameters())


def test_modules_that_change_in_a_block_are_seen() -> None:
    model = nn.Sequential(nn.Linear(NARROW, NARROW), nn.Sequential(nn.Linear(NARROW, NARROW), nn.ReLU()))
    model[1].add_module("tied", model[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = torch.randn(9, NARROW)

    def parameters() -> int:
        return sum(p.nbytes for p in model.parameters())

    expected = [parameters()]
    with optim8.memory.profile(model, optimizer) as prof:
        step(model, optimizer, data)
        model[1][1] = nn.Linear(NARROW, WIDE)  # as many modules as before
        expected.append(parameters())
        model[1].tied = nn.Linear(WIDE, NARROW)
        step(model, optimizer, data)
        model[0].bias = None
        expected.append(parameters())
        step(model, optimizer, data)
        del model[1][2]
        expected.append(parameters())
        step(model, optimizer, data)
    ends = [record.kinds["parameters"] for record in prof.records if record.phase == "step"]
    assert ends[0] == expected[0]
    assert ends[1] > expected[1]  # with the last layer, which was changed too
    assert ends[2] == ends[1] - 4 * NARROW
    assert ends[3] == expected[3] < ends[2]


def test_state_in_a_file_is_not_in_ram() -> None:
    model, _, data = training(torch.device("cpu"))
    optimizer = optim8.PagedAdamW8bit(model.parameters())
    with optim8.memory.profile(model, optimizer) as prof:
        step(model, optimizer, data)
        step(model, optimizer, data)
    record = [record for record in prof.records if record.phase == "step"][-1]
    assert record.kinds["state (disk)"] == optim8.memory.plan(model, optimizer).state_bytes
    assert "state (host)" not in record.kinds
    assert abs(record.end - record.kinds["parameters"] - record.kinds["gradients"]) < 4096


@pytest.mark.parametrize("source", ["allocations", "rss"])
@pytest.mark.parametrize("fails", ["forward", "backward", "step", "outside", None])
def test_nothing_stays_behind(source: str, fails: str | None) -> None:
    model, optimizer, data = training(torch.device("cpu"))
    files = set(Path("/proc/self/fd").iterdir()) if source == "rss" else set()
    seen: list[torch.Tensor] = []

    class Fails(Exception):
        pass

    def fail(*_: Any) -> None:
        raise Fails

    if fails == "forward":
        model[1].register_forward_hook(fail)
    if fails == "backward":
        model[0].weight.register_hook(fail)
    hook = optimizer.register_step_post_hook(fail) if fails == "step" else None
    try:
        with optim8.memory.profile(model, optimizer, source=source) as prof:
            seen.append(model(data))
            seen[0].mean().backward()
            optimizer.step()
            if fails == "outside":
                raise Fails
    except Fails:
        assert fails
    else:
        assert fails is None
    if hook:
        hook.remove()
    assert prof.records
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert all(not output._backward_hooks for output in seen)
    assert not torch._C._autograd._profiler_enabled()
    assert source != "rss" or set(Path("/proc/self/fd").iterdir()) == files
    count = len(prof.records)
    if fails != "forward":
        model(data).mean()
    assert len(prof.records) == count


def test_long_blocks_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    def recorded(most: int) -> dict[str, Any]:
        monkeypatch.setattr(profiler, "_FLUSH", most)
        model, optimizer, data = training(torch.device("cpu"))
        with optim8.memory.profile(model, optimizer) as prof:
            for _ in range(5):
                step(model, optimizer, data)
        return prof.as_dict()

    assert recorded(10**9) == recorded(7)


@pytest.mark.parametrize("profiled_before", [False, True])
def test_gradients_from_before_the_block_may_go(profiled_before: bool) -> None:
    """The allocator reports their end where an earlier block has seen them begin, and else does not."""
    gc.collect()  # memory of earlier tests is not to end within the block: it would count as other
    model, optimizer, data = training(torch.device("cpu"))
    with optim8.memory.profile(model, optimizer) if profiled_before else contextlib.nullcontext():
        model(data).mean().backward()
        optimizer.step()
    with optim8.memory.profile(model, optimizer) as prof:
        for _ in range(2):
            optimizer.zero_grad()
            model(data).mean().backward()
            optimizer.step()
    one, two = ([r for r in prof.records if r.step == i and r.phase != "between"] for i in range(2))
    assert [r.peak for r in one] == [r.peak for r in two]
    assert [r.kinds for r in one] == [r.kinds for r in two]
    assert abs(one[0].kinds["other"]) < 4096


def test_tables_pictures_and_files(tmp_path: Path) -> None:
    model, optimizer, data = training(torch.device("cpu"))
    with optim8.memory.profile(model, optimizer) as prof:
        for _ in range(10):
            step(model, optimizer, data)
    text = prof.table()
    for word in ("forward", "backward", "step", "peak", "parameters at end", "state (host)", "10 steps", "MiB"):
        assert word in text
    prof.to_json(tmp_path / "memory.json")
    content = json.loads((tmp_path / "memory.json").read_text())
    assert content["peak"] == prof.peak
    assert len(content["records"]) == len(prof.records)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory.json"]
    with pytest.raises(FileNotFoundError):
        prof.to_json(tmp_path / "none" / "memory.json")
    pytest.importorskip("matplotlib")
    prof.plot(tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes()[:4] == b"\x89PNG"
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    prof.to_tensorboard(tmp_path / "logs")
    points = EventAccumulator(str(tmp_path / "logs")).Reload().Scalars("memory MiB forward/peak")
    assert [point.step for point in points] == list(range(10))
    highest = max(record.peak for record in prof.records if record.phase == "forward")
    assert max(point.value for point in points) == pytest.approx(highest / MIB)


def test_what_cannot_be_profiled_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, optimizer, data = training(torch.device("cpu"))
    with pytest.raises(
        TypeError, match=r"needs a torch\.nn\.Module and a torch\.optim\.Optimizer, got Sequential and list"
    ):
        optim8.memory.profile(model, list(model.parameters()))
    with pytest.raises(ValueError, match=r"source must be 'cuda'.*got 'cuda' for a model on cpu"):
        optim8.memory.profile(model, optimizer, source="cuda")
    prof = optim8.memory.profile(model, optimizer)
    with pytest.raises(RuntimeError, match="nothing is recorded yet"):
        prof.table()
    with torch.autograd.profiler.profile(), pytest.raises(RuntimeError, match="running already"), prof:
        pass
    with prof:
        step(model, optimizer, data)
    with pytest.raises(RuntimeError, match="one block only"), prof:
        pass
    monkeypatch.setattr(sources.ResidentSource, "_CLEAR", tmp_path / "none" / "clear_refs")
    with pytest.raises(RuntimeError, match="cannot be used"), optim8.memory.profile(model, optimizer, source="rss"):
        pass
    assert not model._forward_hooks
