"""Writes state dicts, pickles, a kept directory and sharded state, each with the parameters and where two more steps
lead: `python write.py FOLDER`, with the optim8 of the version in question."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

import optim8


def make(cls: Any, **options: Any) -> tuple[list[torch.nn.Parameter], Any]:
    torch.manual_seed(0)
    values = [
        torch.randn(5, 70),
        torch.randn(300).bfloat16(),
        torch.randn(2, 8, 5, 6).to(memory_format=torch.channels_last),
        torch.randn(7),
    ]
    params = [torch.nn.Parameter(value) for value in values]
    return params, cls(params, lr=1e-2, min_8bit_size=100, **options)


def steps(params: list[torch.nn.Parameter], optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        for i, p in enumerate(params):
            grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i)).to(p.dtype)
            p.grad = torch.empty_like(p).copy_(grad)
        optimizer.step()
    for p in params:
        p.grad = None


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(20, 30)


def net_steps(model: torch.nn.Module, optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        batch = torch.randn(8, 20, generator=torch.Generator().manual_seed(step))
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def copies(params: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in params]


def packed(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Without the rest of the arenas in which the tensors lie."""
    state = {key: {name: t.clone() for name, t in entry.items()} for key, entry in state_dict["state"].items()}
    return {**state_dict, "state": state}


def write(folder: Path) -> None:
    dicts = {}
    for cls in (optim8.Adam8bit, optim8.AdamW8bit, optim8.Lion8bit):
        params, optimizer = make(cls)
        steps(params, optimizer, 0, 3)
        before, saved = copies(params), packed(optimizer.state_dict())
        steps(params, optimizer, 3, 5)
        dicts[cls.__name__] = {"params": before, "state_dict": saved, "after": copies(params)}
    torch.save(dicts, folder / "state_dicts.pt")

    after = {}
    for cls in (optim8.AdamW8bit, optim8.PagedAdamW8bit):
        params, optimizer = make(cls)
        steps(params, optimizer, 0, 3)
        torch.save((params, optimizer), folder / f"{cls.__name__}.pickle.pt")
        steps(params, optimizer, 3, 5)
        after[cls.__name__] = copies(params)
    torch.save(after, folder / "pickles_after.pt")

    params, optimizer = make(optim8.AdamW8bit, paged=optim8.paging.Pager(directory=folder / "kept", keep=True))
    steps(params, optimizer, 0, 3)
    before = copies(params)
    optimizer.close()
    with tempfile.TemporaryDirectory() as elsewhere:
        copy = shutil.copytree(folder / "kept", Path(elsewhere) / "kept")
        again, optimizer = make(optim8.AdamW8bit, paged=optim8.paging.Pager(directory=copy, keep=True, resume=True))
        with torch.no_grad():
            for p, value in zip(again, before):
                p.copy_(value)
        steps(again, optimizer, 3, 5)
        optimizer.close()
    torch.save({"params": before, "after": copies(again)}, folder / "kept_after.pt")

    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = net()
    fully_shard(model)
    optimizer = optim8.AdamW8bit(model.parameters(), lr=1e-2, min_8bit_size=100)
    net_steps(model, optimizer, 0, 3)
    whole = packed(get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True)))
    before = [p.full_tensor().clone() for p in model.parameters()]
    dcp.save({"optim": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder / "dcp")
    net_steps(model, optimizer, 3, 5)
    after_ = [p.full_tensor().detach().clone() for p in model.parameters()]
    torch.save({"params": before, "state_dict": whole, "after": after_}, folder / "sharded.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    write(Path(sys.argv[1]))
