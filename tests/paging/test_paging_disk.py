"""Steps that copy state, past the page cache or from it: their bits, when they do it, and what a failing disk does."""

from __future__ import annotations

import errno
import gc
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, Case
from support.harness import ALL, DTYPES, hostile, parameter, snapshot, torch_threads
from test_paging_step import params_of, steps, steps_replaced_state_where_it_is

import optim8
from optim8.paging import Pager, files, tiers
from optim8.paging.streaming import CACHED, DIRECT, MAPPED, Stream

MIB = 2**20


@pytest.fixture
def past_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every step goes past the page cache, whatever that holds."""
    probe = tmp_path / "probe"
    probe.write_bytes(bytes(tiers.PAGE))
    handle = files._past_cache(probe)
    if handle is None:
        pytest.skip("temporary files are on a file system without O_DIRECT: set TMPDIR")
    os.close(handle)
    probe.unlink()
    monkeypatch.setattr(Stream, "_goes_past_cache", lambda *_: True)


@pytest.fixture(params=[1, 4], ids=["1 thread", "4 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch_threads(request.param):
        yield


@pytest.fixture(params=[DIRECT, CACHED])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The way of every step under a limit."""
    if request.param == DIRECT:
        request.getfixturevalue("past_cache")
    else:
        monkeypatch.setattr(Stream, "_goes_past_cache", lambda *_: False)
    return str(request.param)


# Some or many buckets in memory; tensors that are cut and tensors that share a bucket, and pages.
PAGERS: dict[str, dict[str, Any]] = {
    "no limit": {"bucket": "128KiB"},
    "a limit": {"bucket": "512KiB", "host_budget": "512KiB"},
    "half in memory": {"bucket": "512KiB", "host_budget": "700KiB"},
    "kept": {"bucket": "64KiB", "keep": True},
    "one bucket": {},
}


WAYS = [*((pager, 8) for pager in PAGERS), ("a limit", 32), ("kept", 32)]


@pytest.mark.parametrize("pager, optim_bits", WAYS)
@ALL
@pytest.mark.usefixtures("past_cache", "threads")
def test_bits_are_those_of_a_resident_step(case: Case, optim_bits: int, pager: str, tmp_path: Path) -> None:
    steps_like_a_resident_one(case, optim_bits, pager, DIRECT, tmp_path)


@pytest.mark.parametrize("pager, optim_bits", [("a limit", 8), ("half in memory", 8), ("a limit", 32)])
@ALL
@pytest.mark.usefixtures("threads")
def test_bits_of_state_copied_from_the_page_cache_are_so_too(
    case: Case, optim_bits: int, pager: str, tmp_path: Path
) -> None:
    steps_like_a_resident_one(case, optim_bits, pager, CACHED, tmp_path)


def steps_like_a_resident_one(case: Case, optim_bits: int, pager: str, way: str, tmp_path: Path) -> None:
    """State and parameters after each of four steps; gradients are missing, one parameter comes late. State is read
    through the mapping after every step, so what it holds is not the file's of an earlier step."""
    dtype = list(DTYPES.values())[(len(case.name) + optim_bits) % 3]
    resident, paged = params_of(dtype), params_of(dtype)
    options = {"optim_bits": optim_bits, "min_8bit_size": 256}
    a = case.make(resident, **options)
    b = case.make(
        paged,
        **options,
        paged=Pager(directory=tmp_path / "kept" if "keep" in PAGERS[pager] else tmp_path, **PAGERS[pager]),
    )
    ways = set()
    for t in range(4):
        for params, optimizer in ((resident, a), (paged, b)):
            steps(params, optimizer, t, t + 1)
        assert snapshot(b) == snapshot(a), t
        ways.add(b.memory._stream.way)
    # Where nothing of a step is on the disk, there is nothing to copy.
    assert way in ways
    assert ways == {way} or (pager == "half in memory" and ways == {way, MAPPED})
    b.close()


@pytest.mark.usefixtures("threads")
def test_many_tensors_in_any_order_share_pages(way: str, tmp_path: Path) -> None:
    """Groups that were made in another order than their state, and neighbours of which only some are stepped."""
    results = []
    for paged in (None, Pager(directory=tmp_path, bucket="256KiB", host_budget="1MiB")):
        sizes = [1 + 997 * i % 5003 for i in range(300)] + [300_000, 7, 500_001]
        params = [parameter(hostile(n, torch.float32, seed=n, small=-2, large=0)) for n in sizes]
        optimizer = optim8.AdamW8bit(params, min_8bit_size=1000, paged=paged)
        for t in range(4):
            for i, p in enumerate(params):
                p.grad = hostile(p.numel(), torch.float32, seed=i + t) if (i * 7 + t) % 3 else None
            optimizer.step()
        optimizer.param_groups[0]["params"].reverse()
        optimizer.step()
        results.append(snapshot(optimizer))
        assert paged is None or optimizer.memory._stream.way == way
    assert results[0] == results[1]


@pytest.mark.usefixtures("way")
def test_state_that_was_replaced_is_stepped_where_it_is(tmp_path: Path) -> None:
    assert steps_replaced_state_where_it_is(200_000, Pager(directory=tmp_path, bucket="256KiB", host_budget="256KiB"))


SHARES: tuple[tuple[list[float], list[bool]], ...] = (
    ([1.0] * 4, [False] * 4),
    ([0.0] * 30, [False, *[True] * 8, False, *[True] * 16, False, *[True] * 3]),
    ([0.0, 1.0, 1.0, 0.0, 1.0, 0.5], [False] * 6),
    ([0.6, 0.7, 0.6, 0.6, 0.7, 0.6, 0.6], [False, False, False, True, False, False, True]),
)


@pytest.mark.parametrize("shares, expected", SHARES)
def test_the_page_cache_gets_a_chance_first_and_again_after_a_while(shares: list[float], expected: list[bool]) -> None:
    stream = Stream("AdamW8bit", Pager())
    assert [stream._goes_past_cache(share) for share in shares] == expected


def test_a_step_takes_the_way_that_the_page_cache_asks_for(tmp_path: Path) -> None:
    """In a file that is in the page cache, in one that was dropped, once through the cache and then past it."""
    p = parameter(torch.ones(2**22), torch.ones(2**22))
    optimizer = optim8.AdamW8bit([p], paged=Pager(directory=tmp_path, host_budget="1MiB", bucket="1MiB"))
    ways = []
    for cold in (False, False, True, True, True, False):
        for segment in optimizer.memory.segments if cold else ():
            os.fsync(segment.handle)
            os.posix_fadvise(segment.handle, 0, 0, os.POSIX_FADV_DONTNEED)
        optimizer.step()
        ways.append(optimizer.memory._stream.way)
    # The last one finds in the page cache what was not dropped after the step before: nothing, that went past it, but
    # the page where steps are counted.
    spans = [segment.span for segment in optimizer.memory.segments]
    assert optim8._native.cpu().share_in_memory(spans) < 0.2
    assert ways == [CACHED, CACHED, CACHED, DIRECT, DIRECT, DIRECT]


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="what was read from the disk is told by Linux's /proc")
@pytest.mark.usefixtures("past_cache")
def test_a_step_past_the_page_cache_reads_its_state_once(tmp_path: Path) -> None:
    def read_from_disk() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))

    p = parameter(torch.ones(2**24), torch.ones(2**24))
    optimizer = optim8.AdamW8bit([p], paged=Pager(directory=tmp_path, host_budget="4MiB", bucket="1MiB"))
    optimizer.step()
    (segment,) = (segment for segment in optimizer.memory.segments if segment.tier == tiers.DISK)
    os.fsync(segment.handle)
    os.posix_fadvise(segment.handle, 0, 0, os.POSIX_FADV_DONTNEED)
    before = read_from_disk()
    optimizer.step()
    assert 0.9 < (read_from_disk() - before) / segment.memory.numel() < 1.1


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="what is mapped is told by Linux's /proc")
def test_pages_that_were_looked_at_are_let_go_of_by_the_next_step(way: str, tmp_path: Path) -> None:
    def resident_kib(address: int) -> int:
        lines = iter(Path("/proc/self/smaps").read_text().splitlines())
        for line in lines:
            begin, dash, end = line.split()[0].partition("-")
            if dash and int(begin, 16) <= address < int(end, 16):
                return next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))
        raise LookupError(address)

    p = parameter(torch.ones(2**22), torch.ones(2**22))
    optimizer = optim8.AdamW8bit([p], paged=Pager(directory=tmp_path, host_budget="1MiB", bucket="1MiB"))
    optimizer.step()
    codes = optimizer.state[p]["exp_avg_codes"]
    codes.max()
    assert resident_kib(codes.data_ptr()) >= codes.nbytes // 1024
    optimizer.step()
    assert optimizer.memory._stream.way == way
    assert resident_kib(codes.data_ptr()) < 256


@pytest.fixture
def small_files() -> Iterator[Any]:
    """Sets the size from which on a file cannot be written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("fault", ["write", "read"])
def test_a_disk_that_fails_in_a_step_is_an_error_and_the_run_returns_to_its_checkpoint(
    fault: str, small_files: Any, tmp_path: Path
) -> None:
    p, twin = (parameter(torch.ones(2**21), torch.ones(2**21)) for _ in range(2))
    reference = optim8.AdamW8bit([twin])
    keep: dict[str, Any] = {"directory": tmp_path / "kept", "keep": True, "bucket": "1MiB", "host_budget": "2MiB"}
    optimizer = optim8.AdamW8bit([p], paged=Pager(**keep))
    optimizer.step()
    reference.step()
    optimizer.note_checkpoint("runs/last.pt")
    path = tmp_path / "kept" / "state-0.bin"
    size = path.stat().st_size
    if fault == "write":
        small_files(size // 2)
    else:
        os.truncate(path, size // 2)
    with pytest.raises(OSError, match=r"AdamW8bit: the disk failed when state was .* half old and half new") as error:
        optimizer.step()
    small_files(resource.RLIM_INFINITY)
    os.truncate(path, size)
    assert error.value.errno == (errno.EFBIG if fault == "write" else errno.EIO)
    assert ("written: File too large" if fault == "write" else "read: Input/output error") in str(error.value)
    with pytest.raises(RuntimeError, match=r"interrupted|earlier step ended in the middle"):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"interrupted, so the state .* half old and half new"):
        optimizer.note_checkpoint("runs/last.pt")
    optimizer.close()
    with pytest.raises(RuntimeError, match=r"ended while it was stepping, after step 1.*'runs/last.pt' of step 1"):
        optim8.AdamW8bit([p], paged=Pager(**keep, resume=True, changed_params=True))
    with torch.no_grad():
        p.copy_(twin)
    optimizer = optim8.AdamW8bit([p], paged=Pager(**keep, resume=True))
    optimizer.step()
    reference.step()
    assert snapshot(optimizer) == snapshot(reference)


@pytest.mark.usefixtures("way")
def test_no_step_follows_one_that_a_disk_ended_also_where_nothing_is_kept(small_files: Any, tmp_path: Path) -> None:
    p = parameter(torch.ones(2**21), torch.ones(2**21))
    optimizer = optim8.AdamW8bit([p], paged=Pager(directory=tmp_path, bucket="1MiB", host_budget="1MiB"))
    optimizer.step()
    small_files(MIB)
    with pytest.raises(OSError, match="load a checkpoint of both"):
        optimizer.step()
    small_files(resource.RLIM_INFINITY)
    before = p.detach().clone()
    with pytest.raises(
        RuntimeError, match=r"AdamW8bit: an earlier step ended in the middle\. Parameters and state are"
    ):
        optimizer.step()
    assert torch.equal(p, before)


@pytest.mark.usefixtures("way", "threads")
def test_a_disk_that_fails_beside_state_in_memory_ends_the_step_too(small_files: Any, tmp_path: Path) -> None:
    params = [parameter(torch.ones(n), torch.ones(n)) for n in (2**18, 2**21)]
    optimizer = optim8.AdamW8bit(params, paged=Pager(directory=tmp_path, bucket="1MiB", host_budget="2MiB"))
    optimizer.step()
    assert [place.tier for place in optimizer.placement()] == ["host", "disk"]
    small_files(MIB)
    with pytest.raises(OSError, match="load a checkpoint of both"):
        optimizer.step()


@pytest.mark.usefixtures("way")
def test_no_step_follows_one_that_memory_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    p = parameter(torch.ones(100_000), torch.ones(100_000))
    optimizer = optim8.AdamW8bit([p], paged=Pager(directory=tmp_path, host_budget="1MiB", bucket="1MiB"))
    optimizer.step()

    def no_memory() -> bool:
        raise MemoryError

    monkeypatch.setattr(Stream, "_step_in_copies", lambda *_: no_memory)
    with pytest.raises(MemoryError, match=r"AdamW8bit: no memory in the middle of a step\. .*load a checkpoint"):
        optimizer.step()
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="an earlier step ended in the middle"):
        optimizer.step()


@pytest.mark.parametrize("bucket, budget", [("64KiB", "128KiB"), ("64KiB", "256KiB"), ("128KiB", "128KiB")])
@pytest.mark.usefixtures("threads")
def test_small_budgets_are_enough_to_copy(way: str, bucket: str, budget: str, tmp_path: Path) -> None:
    p = parameter(torch.ones(300_000), torch.ones(300_000))
    optimizer = optim8.AdamW8bit([p], paged=Pager(directory=tmp_path, host_budget=budget, bucket=bucket))
    for _ in range(2):
        optimizer.step()
        assert optimizer.memory._stream.way == way


BOUND = """
import os, sys, threading
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
import torch, optim8
from optim8.paging import Pager
torch.set_num_threads(2)
torch.ones(2**20).exp()
p = torch.nn.Parameter(torch.ones(2**22))
p.grad = torch.ones(2**22)
optimizer = optim8.AdamW8bit([p], paged=Pager(directory=sys.argv[1], host_budget="1MiB", bucket="1MiB"))
optimizer.step()
known, new, stepping = set(os.listdir("/proc/self/task")), set(), True

def watch():
    while stepping:
        for task in set(os.listdir("/proc/self/task")) - known:
            try:
                new.add(len(os.sched_getaffinity(int(task))))
            except ProcessLookupError:
                pass

watcher = threading.Thread(target=watch)
watcher.start()
known.add(str(watcher.native_id))
for _ in range(1000):
    optimizer.step()
    if 2 in new:
        break
stepping = False
watcher.join()
print(len(os.sched_getaffinity(0)), max(new, default=None))
"""


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two processors, on Linux"
)
def test_threads_of_a_step_use_all_processors_also_where_openmp_binds_its_own(tmp_path: Path) -> None:
    for bound, expected in (("false", "2 2"), ("true", "1 2")):
        environment = {**os.environ, "OMP_PROC_BIND": bound, "OMP_NUM_THREADS": "2"}
        command = [sys.executable, "-c", BOUND, str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert (done.stdout.strip(), done.stderr) == (expected, ""), bound


@pytest.mark.usefixtures("way")
def test_without_room_for_its_memory_a_step_stays_in_the_mapping(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_room(_: int) -> None:
        raise MemoryError

    results = []
    for paged in (None, Pager(directory=tmp_path, host_budget="1MiB", bucket="1MiB")):
        p = parameter(torch.ones(100_000), torch.ones(100_000))
        optimizer = CASES["AdamW8bit"].make([p], paged=paged)
        if paged is not None:
            monkeypatch.setattr(optim8._native.cpu(), "DirectMemory", no_room)
        optimizer.step()
        results.append(snapshot(optimizer))
        assert paged is None or optimizer.memory._stream.way == MAPPED
    assert results[0] == results[1]


def test_an_optimizer_closes_the_files_of_its_state(tmp_path: Path) -> None:
    def handles() -> int:
        links = [path for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        return sum(str(tmp_path) in str(path.readlink()) for path in links)

    p = parameter(torch.ones(100_000), torch.ones(100_000))
    for pager in (Pager(directory=tmp_path), Pager(directory=tmp_path / "kept", keep=True)):
        optimizer = optim8.AdamW8bit([p], paged=pager)
        optimizer.step()
        assert handles() > 0
        del optimizer
        gc.collect()
        assert handles() == 0
