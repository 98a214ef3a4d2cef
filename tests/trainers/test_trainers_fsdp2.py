"""accelerate's FSDP2: it shards the model after the optimizer exists, and swaps the parameters in its groups.

The test needs accelerate (`pip install optim8[trainers]`) and is skipped without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.harness import bits

import optim8


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: torch.device) -> Iterator[Any]:
    """One process under FSDP2, on a CPU too, where accelerate itself would not shard."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # else accelerate sets it
    for name, value in {**one, **threads, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}.items():
        monkeypatch.setenv(name, value)
    backend = "gloo" if device.type == "cpu" else "nccl"
    dist.init_process_group(backend, store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    plugin = accelerate.FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap")
    it = accelerate.Accelerator(cpu=device.type == "cpu", fsdp_plugin=plugin)
    it.state.distributed_type, it.state.fsdp_plugin = accelerate.DistributedType.FSDP, plugin
    assert it.is_fsdp2
    yield it
    dist.destroy_process_group()
    accelerate.state.AcceleratorState._reset_state(True)


def network(device: torch.device) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(96, 96), torch.nn.GELU(), torch.nn.Linear(96, 96)).to(device)


def loss(model: torch.nn.Module, t: int, device: torch.device) -> torch.Tensor:
    return model(torch.randn(4, 96, generator=torch.Generator().manual_seed(t)).to(device)).square().mean()


def whole(model: torch.nn.Module) -> list[bytes]:
    return [bits(p.full_tensor() if hasattr(p, "full_tensor") else p) for p in model.parameters()]  # type: ignore[operator]


@pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
@pytest.mark.parametrize("cls", [optim8.AdamW8bit, optim8.PagedAdamW8bit])
def test_parameters_are_swapped(cls: Any, kind: str, accelerator: Any, tmp_path: Path, device: torch.device) -> None:
    """Bits of a plain loop, overrides that follow the module, and a run that is resumed by accelerate's functions."""
    from accelerate import utils

    plugin = accelerator.state.fsdp_plugin
    plugin.set_state_dict_type(kind)
    model, twin = network(device), network(device)
    optimizer, own = cls(model.parameters(), lr=1e-2), cls(twin.parameters(), lr=1e-2)
    for target in (model, twin):
        optim8.override("0.weight", module=target, weight_decay=0.5, optim_bits=32)
    before = list(model.parameters())
    model, wrapped = accelerator.prepare(model, optimizer)
    swapped = optimizer.param_groups[0]["params"]
    assert not any(p is q for p in before for q in swapped)
    assert {type(p).__name__ for p in swapped} == {"DTensor"}

    def step(t: int) -> None:
        accelerator.backward(loss(model, t, device))
        wrapped.step()
        wrapped.zero_grad()

    for t in range(3):
        if t == 2:
            utils.save_fsdp_model(plugin, accelerator, model, str(tmp_path))
            utils.save_fsdp_optimizer(plugin, accelerator, wrapped, model, str(tmp_path))
        step(t)
        own.zero_grad()
        loss(twin, t, device).backward()
        own.step()
    assert whole(model) == whole(twin)
    assert [optimizer.precision(p) for p in swapped] == ["32bit", "32bit", "8bit", "32bit"]
    assert set(optimizer.state) == set(swapped)
    step(3)
    utils.load_fsdp_model(plugin, accelerator, model, str(tmp_path))
    utils.load_fsdp_optimizer(plugin, accelerator, wrapped, model, str(tmp_path))
    step(2)
    assert whole(model) == whole(twin)
    assert optimizer.placement().bytes_by_tier() == own.placement().bytes_by_tier()
