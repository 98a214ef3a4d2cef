"""PyTorch's own engines of distribution, with processes on this machine: gloo on CPU, NCCL with --device cuda.

All stages run in one set of processes, which takes most of its time to start; each stage is a test.
"""

from __future__ import annotations

from pathlib import Path

import distributed_worker
import pytest
import torch

# (a scenario of distributed_training.py or of another distributed_*.py, number of processes), in order.
STAGES = [
    ("ddp", 2),
    ("ddp", 3),
    ("fsdp2", 2),
    ("fsdp2", 3),
    ("cpu_offload", 2),
    ("tensor_parallel", 2),
    ("fsdp2_and_tensor_parallel", 2),
    ("norms_over_ranks", 2),
    ("norms_over_ranks", 3),
    ("gradients", 2),
    ("gradient_scaler", 2),
    ("clipping", 3),
    ("zero_redundancy", 2),
    ("fsdp1", 2),
    ("muon_fsdp2", 2),
    ("muon_fsdp2", 3),
    ("muon_bfloat16", 2),
    ("muon_bfloat16", 3),
    ("muon_share", 2),
    ("muon_share", 3),
    ("muon_layouts", 2),
    ("muon_two_dimensions", 2),
    ("muon_cpu_offload", 2),
    ("muon_state_dict", 2),
    ("tensor_parallel_checkpoint", 2),
    ("torch_optim_to_shards", 2),
    ("refusals", 2),
    ("wide_weights", 2),
    ("wide_weights", 3),
    ("paged", 2),
    ("whole_from_rank_0", 2),
    ("gathered_from_rank_0", 2),
    ("into_plain_parameters_from_rank_0", 2),
    ("strange_from_rank_0", 2),
    ("in_place", 2),
    ("kept_over_a_step", 2),
    ("strange_tiles", 2),
    ("copies", 2),
    ("saved_while_stepping", 2),
    ("default_dtype", 2),
    ("counted", 2),
    # What is saved first is loaded by all that come after it.
    ("save_sharded", 2),
    ("from_rank_0", 2),
    ("load_resharded", 1),
    ("save_sharded", 3),
    ("load_resharded", 2),
    ("whole_to_one_process", 1),
    ("save_sharded", 1),
    ("load_resharded", 3),
    ("one_process_to_shards", 3),
]
NAMES = [f"{scenario}-{world}" for scenario, world in STAGES]


@pytest.fixture(scope="module")
def reports(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What the ranks of each stage reported. On GPUs, those stages for which there is a GPU for each process."""
    most = 3 if device.type == "cpu" else torch.cuda.device_count()
    stages = [(name, world, scenario) for name, (scenario, world) in zip(NAMES, STAGES, strict=True) if world <= most]
    if not stages:
        return {}
    folder: Path = tmp_path_factory.mktemp("distributed")
    return distributed_worker.run(stages, device.type, folder)


@pytest.mark.parametrize("name", NAMES)
def test_scenario(name: str, reports: dict[str, list[str]], device: torch.device) -> None:
    if name not in reports:
        assert device.type == "cuda"
        pytest.skip(f"{name}: needs a GPU for each process, here {torch.cuda.device_count()}")
    # Of all ranks: one that fails leaves the others waiting, and theirs is then no cause.
    failures = [f"rank {rank}:\n{report}" for rank, report in enumerate(reports[name]) if report]
    assert not failures, "\n".join(failures)
