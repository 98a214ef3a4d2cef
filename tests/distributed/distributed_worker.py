"""Processes that run the scenarios of test_distributed.py, one after the other, each with a group of its own size."""

from __future__ import annotations

import importlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

HERE = Path(__file__).resolve().parent


class Place:
    """Where a scenario runs: its rank, the number of ranks, their device, and a folder that all stages share."""

    def __init__(self, rank: int, world: int, device: torch.device, folder: Path) -> None:
        self.rank, self.world, self.device, self.folder = rank, world, device, folder

    def mesh(self, *shape: int, names: tuple[str, ...] | None = None) -> DeviceMesh:
        return init_device_mesh(self.device.type, shape or (self.world,), mesh_dim_names=names)

    def same_everywhere(self, value: Any) -> bool:
        """Whether all ranks pass an equal value."""
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, value)
        return all(other == gathered[0] for other in gathered)


Scenario = Callable[[Place], None]


def _report(folder: Path, name: str, rank: int) -> Path:
    return folder / f"{name}.{rank}.json"


def _wait_for(reports: Sequence[Path], seconds: float) -> None:
    limit = time.monotonic() + seconds
    while not all(report.exists() for report in reports):
        if time.monotonic() > limit:
            raise TimeoutError(f"no {' and no '.join(str(r) for r in reports if not r.exists())} within {seconds} s")
        time.sleep(0.01)


def _process(rank: int, device_type: str, folder: str, stages: Sequence[tuple[str, int, str]]) -> None:
    sys.path.insert(0, str(HERE))  # the scenarios import the tests' own modules
    torch.set_num_threads(1)
    scenarios: dict[str, Scenario] = {}
    for module in ("training", "matrices", "checkpoints", "loading", "weights", "counting"):
        scenarios |= importlib.import_module(f"distributed_{module}").SCENARIOS
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device(device_type)
    before: list[Path] = []  # what the ranks of the stage before report at its end
    for name, world, scenario in stages:
        # All ranks begin a stage together, so that none that fails or is slow takes the next one with it. Longer than
        # the group's timeout, by which a rank whose peer has failed ends too.
        _wait_for(before, 900)
        before = [_report(Path(folder), name, other) for other in range(world)]
        if rank >= world:
            continue
        said = ""
        try:
            dist.init_process_group(
                "nccl" if device_type == "cuda" else "gloo",
                init_method=f"file://{folder}/{name}.store",
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=300),
            )
            if device_type == "cuda":
                torch.cuda.set_device(device)
            torch.manual_seed(20240229)
            scenarios[scenario](Place(rank, world, device, Path(folder)))
        except BaseException:
            said = traceback.format_exc()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            part = Path(folder, f"{name}.{rank}.part")
            part.write_text(json.dumps(said))
            part.replace(before[rank])


def run(stages: Sequence[tuple[str, int, str]], device_type: str, folder: Path) -> dict[str, list[str]]:
    """Run (name, number of processes, scenario) in order; gives for each name what every rank reported, "" for good."""
    count = max(world for _, world, _ in stages)
    mp.start_processes(_process, (device_type, str(folder), list(stages)), nprocs=count, start_method="spawn")
    return {
        name: [json.loads(_report(folder, name, rank).read_text()) for rank in range(world)]
        for name, world, _ in stages
    }
