"""One Pager for many optimizers, as where each parameter has one of its own that steps in the backward pass."""

from __future__ import annotations

import errno
import gc
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from support.harness import bits

import optim8
from optim8.paging import Pager
from optim8.paging.sharing import bytes_in, sharers

KIB = 2**10
COUNT, SIZE = 300, 5000


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(SIZE, generator=generator)) for _ in range(COUNT)]


def loss(params: list[torch.nn.Parameter], t: int) -> torch.Tensor:
    return torch.stack([((p - t) * (p - t)).sum() for p in params]).sum()


def test_all_that_say_paged_true_share_the_memory_of_a_step() -> None:
    """Each would keep four buckets of 16 MiB where its state is not in the page cache."""
    params = [torch.nn.Parameter(torch.zeros(5000)) for _ in range(2)]
    optimizers: list[Any] = [optim8.PagedAdamW8bit([params[0]]), optim8.AdamW8bit([params[1]], paged=True)]
    assert optimizers[0].memory.pager is optimizers[1].memory.pager
    assert {optimizer.memory for optimizer in optimizers} <= set(sharers(optimizers[0].memory.pager))


@pytest.mark.parametrize("budget", [None, 512 * KIB])
def test_an_optimizer_for_each_parameter(budget: int | None, tmp_path: Path) -> None:
    """They step in hooks of the backward pass, and give the bits of one optimizer; all stay within the one budget."""
    pager = Pager(directory=tmp_path, host_budget=budget, bucket=128 * KIB)
    params, own = parameters(), parameters()
    optimizers = {p: optim8.AdamW8bit([p], lr=1e-2, paged=pager) for p in params}
    whole = optim8.AdamW8bit(own, lr=1e-2)

    def hook(param: torch.Tensor) -> None:
        optimizers[param].step()  # type: ignore[index]
        optimizers[param].zero_grad()  # type: ignore[index]

    for p in params:
        p.register_post_accumulate_grad_hook(hook)
    for t in range(3):
        loss(params, t).backward()
        whole.zero_grad()
        loss(own, t).backward()
        whole.step()
    assert [bits(p) for p in params] == [bits(p) for p in own]
    tiers: dict[str, int] = {}
    for optimizer in optimizers.values():
        for tier, size in optimizer.placement().bytes_by_tier().items():
            tiers[tier] = tiers.get(tier, 0) + size
    assert sum(tiers.values()) > 2 * COUNT * SIZE
    in_host = bytes_in(sharers(pager), "host")
    assert tiers.get("host", 0) <= in_host <= (budget or 128 * KIB) - 128 * KIB
    assert ("host" in tiers) == (budget is not None)
    assert all(optimizer.memory._stream._memory is None for optimizer in optimizers.values())  # type: ignore[attr-defined]
    assert list(tmp_path.iterdir()) == []  # files have no names


def test_what_an_optimizer_had_of_the_budget_is_free_again(tmp_path: Path) -> None:
    pager = Pager(directory=tmp_path, host_budget=192 * KIB, bucket=64 * KIB)

    def made() -> Any:
        p = torch.nn.Parameter(torch.zeros(50_000))
        optimizer = optim8.AdamW8bit([p], paged=pager)
        p.grad = torch.ones_like(p)
        optimizer.step()
        (place,) = optimizer.placement()
        return optimizer, place.tier

    first, tier = made()
    assert tier == "host"
    second, tier = made()
    assert tier == "disk"
    equal = Pager(directory=tmp_path, host_budget=192 * KIB, bucket=64 * KIB)
    assert equal == pager
    assert len(sharers(equal)) == 0  # another budget
    del first
    gc.collect()
    assert made()[1] == "host"
    assert second.placement()[0].tier == "disk"


def test_a_kept_directory_is_for_one(tmp_path: Path) -> None:
    pager = Pager(directory=tmp_path / "kept", keep=True)
    first = optim8.AdamW8bit([torch.nn.Parameter(torch.zeros(5000))], paged=pager)
    with pytest.raises(BlockingIOError, match=r"has the state in .*kept\. Close it"):
        optim8.AdamW8bit([torch.nn.Parameter(torch.zeros(5000))], paged=pager)
    first.close()


def test_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    p = torch.nn.Parameter(torch.zeros(5000))
    optimizer = optim8.AdamW8bit([p], paged=Pager(directory=tmp_path))
    p.grad = torch.ones_like(p)

    def mkstemp(**_: Any) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(tempfile, "mkstemp", mkstemp)
    with pytest.raises(OSError, match=r"Too many open files\. Raise the limit \(ulimit -n\), or give one optimizer"):
        optimizer.step()
