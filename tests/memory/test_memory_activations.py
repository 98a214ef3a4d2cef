"""Planned activations are those that a training takes, and a trace leaves the module as it was."""

from __future__ import annotations

import copy
import gc
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_harness import MODELS
from torch import nn
from torch.utils.checkpoint import checkpoint

import optim8

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "experiments"))
from lm.model import GPT, Shape

GOAL = 0.05  # of the memory of the whole training
RANDOM_STATE = 5056  # bytes of the generator's state, which a checkpoint keeps, and no operator returns


class Checkpointed(nn.Module):
    """A layer that keeps its input alone, and runs again in the backward."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.layer, x, use_reentrant=False)


def gpt(layers: int = 4, checkpointed: bool = False) -> GPT:
    torch.manual_seed(0)
    model = GPT(Shape(layers=layers, heads=4, width=128, context=128))
    if checkpointed:
        model.blocks = nn.ModuleList(Checkpointed(block) for block in model.blocks)
    return model


def loss_of_gpt(model: nn.Module) -> torch.Tensor:
    tokens = torch.zeros(8, 128, dtype=torch.int64)
    return model.loss(tokens, tokens)


def in_bfloat16(model: nn.Module) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return loss_of_gpt(model)


def measure(model: nn.Module, loss: Callable[[nn.Module], torch.Tensor]) -> int:
    """The largest peak of forward and backward after the first step, with parameters, gradients and state."""
    optimizer = optim8.AdamW8bit(model.parameters())
    gc.collect()  # what earlier tests left would be freed within the block, and count as less
    with optim8.memory.profile(model, optimizer) as profile:
        for _ in range(3):
            loss(model).backward()
            optimizer.step()
            optimizer.zero_grad()
    return max(
        record.peak for record in profile.records if record.step == 2 and record.phase in ("forward", "backward")
    )


@pytest.mark.parametrize(
    "make, loss, kept",
    [
        (gpt, loss_of_gpt, 0),
        (lambda: gpt(1), loss_of_gpt, 0),
        (lambda: gpt().bfloat16(), loss_of_gpt, 0),
        (gpt, in_bfloat16, 0),
        (lambda: gpt(checkpointed=True), loss_of_gpt, RANDOM_STATE),
        (lambda: gpt(12, checkpointed=True), loss_of_gpt, RANDOM_STATE),
    ],
    ids=["GPT", "one layer", "bfloat16", "autocast", "checkpointed", "12 layers checkpointed"],
)
def test_planned_activations_are_measured_ones(make: Callable[[], GPT], loss: Any, kept: int) -> None:
    """To the byte, but for what a checkpoint keeps of the generator: so every storage and its end is seen."""
    model = make()
    planned = optim8.memory.plan(model, loss=loss)
    # Where the processor has no bfloat16 instructions oneDNN asks for scratch memory, which is no activation.
    with torch.backends.mkldnn.flags(enabled=False):
        measured = measure(model, loss)
    assert planned.bytes["activations"] > 0
    aligned = planned.total - planned.bytes["buffers"]  # gaps between tensors of state are no tensors
    assert 0 <= measured - aligned <= kept
    assert abs(planned.total / measured - 1) < GOAL


@pytest.mark.parametrize("name", ["transformer", "tied"])
def test_other_models_are_within_the_goal(name: str) -> None:
    make, data = MODELS[name]
    model, inputs = make(), data(torch.float32)  # tensors that the loss closes over

    def loss(module: nn.Module) -> torch.Tensor:
        return module(*inputs).float().square().mean()

    assert abs(optim8.memory.plan(model, loss=loss).total / measure(model, loss) - 1) < GOAL


def test_a_checkpoint_needs_less_and_the_dtype_counts() -> None:
    whole, cut = (optim8.memory.plan(gpt(8, each), loss=loss_of_gpt).bytes["activations"] for each in (False, True))
    assert cut < 0.35 * whole
    narrow = optim8.memory.plan(gpt(8), dtype="bfloat16", loss=loss_of_gpt)
    same = optim8.memory.plan(gpt(8).bfloat16(), loss=loss_of_gpt)
    assert narrow.bytes == same.bytes
    assert narrow.bytes["activations"] < 0.6 * whole


def test_the_meta_device_gives_the_same_plan() -> None:
    with torch.device("meta"):
        meta = GPT(Shape(layers=2, heads=4, width=128, context=128))
    planned = optim8.memory.plan(meta, device="cpu", loss=loss_of_gpt)
    assert planned.bytes == optim8.memory.plan(gpt(2), loss=loss_of_gpt).bytes


def test_a_trace_changes_nothing_and_keeps_nothing() -> None:
    model = MODELS["cnn"][0]()
    before = copy.deepcopy(model.state_dict())
    tensors = [*model.parameters(), *model.buffers()]
    images = torch.randn(2, 3, 12, 12)

    def loss(module: nn.Module) -> torch.Tensor:
        assert module is not model
        return module(images).square().mean()

    plans = [optim8.memory.plan(model, loss=loss) for _ in range(2)]
    assert plans[0].bytes == plans[1].bytes
    assert all(a is b for a, b in zip(tensors, itertools.chain(model.parameters(), model.buffers())))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert type(torch.ones(1)) is torch.Tensor  # no mode is left on


def test_a_failed_trace_leaves_no_mode_on() -> None:
    def loss(module: nn.Module) -> torch.Tensor:
        raise KeyError("of the program itself")

    with pytest.raises(KeyError, match="of the program itself"):
        optim8.memory.plan(gpt(1), loss=loss)
    assert type(torch.ones(1)) is torch.Tensor


def test_the_plan_shows_activations_for_every_optimizer() -> None:
    planned = optim8.memory.plan(gpt(2), loss=loss_of_gpt)
    without = optim8.memory.plan(gpt(2))
    count = planned.bytes["activations"]
    assert planned.total == without.total + count
    assert planned.needed == without.needed + count
    assert planned.fits(planned.needed)
    assert not planned.fits(planned.needed - 1)
    assert planned.state_bytes == without.state_bytes
    for beside, bare in zip(planned.beside, without.beside, strict=True):
        assert beside.total == bare.total + count
    text = str(planned)
    assert "activations (host)" in text
    assert "Not in it: temporary tensors" in text
    assert "activations (host)" not in str(without)
    assert "Not in it: activations" in str(without)
    assert not planned.notes
    (note,) = optim8.memory.plan(gpt(2), device="cuda", loss=loss_of_gpt).notes
    assert "the CPU's operators" in note


def test_paged_state_has_what_activations_leave() -> None:
    """Half of the state stays on the device; all of it would, beside nothing else."""
    whole = optim8.memory.plan(gpt(2), device="cuda", loss=loss_of_gpt)

    def on_device(loss: Any) -> int:
        pager = optim8.paging.Pager(device_reserve=0, bucket="64KiB")
        budget = whole.needed - whole.state_bytes // 2
        planned = optim8.memory.plan(gpt(2), device="cuda", paged=pager, budget=budget, loss=loss)
        assert planned.needed <= budget
        return sum(row.nbytes for row in planned.rows if row.tier == "device" and row.kind == "codes")

    assert on_device(None) == whole.bytes["codes"]
    assert 0 < on_device(loss_of_gpt) < whole.bytes["codes"]


def test_frozen_parameters_have_no_gradients() -> None:
    model = gpt(2).requires_grad_(False)
    model.norm_out.weight.requires_grad_(True)
    planned = optim8.memory.plan(model, loss=loss_of_gpt)
    measured = measure(model, loss_of_gpt)
    assert abs(planned.total / measured - 1) < GOAL
    assert planned.bytes["activations"] < 0.5 * optim8.memory.plan(gpt(2), loss=loss_of_gpt).bytes["activations"]


OTHER = nn.Linear(4, 4)


@pytest.mark.parametrize(
    "loss, error, message",
    [
        (3, TypeError, "loss must be a function of the module, .* got int"),
        (lambda model: (model(torch.ones(4)),), TypeError, "must give a tensor of one value, got tuple"),
        (lambda model: model(torch.ones(4)), ValueError, r"got shape \[4\] and requires_grad=True"),
        (lambda model: torch.ones(()), ValueError, "requires_grad=False"),
        (lambda model: model(torch.ones(4)).sum().detach(), ValueError, "requires_grad=False"),
        (lambda model: OTHER(torch.ones(4)).sum(), ValueError, r"a parameter of shape \[4, 4\] of another"),
        (lambda model: torch.ones((), requires_grad=True) * 2, ValueError, "gave no parameter of it a gradient"),
        (lambda model: model(torch.ones(4)).sum() * torch.ones(3).sum().item(), ValueError, "values of tensors"),
        (lambda model: model(torch.ones(4))[torch.ones(4).nonzero()].sum(), ValueError, "values of tensors"),
    ],
)
def test_what_cannot_be_traced_is_refused(loss: Any, error: type[Exception], message: str) -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(error, match=message):
        optim8.memory.plan(model, loss=loss)
    assert all(p.grad is None for p in (*OTHER.parameters(), *model.parameters()))


def test_a_loss_needs_a_whole_module() -> None:
    with pytest.raises(TypeError, match="loss needs a module to compute with, got dict"):
        optim8.memory.plan({"parameters": {"w": [64, 64]}}, loss=loss_of_gpt)
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4), nn.GRU(4, 4)])})
    with pytest.raises(ValueError, match=r"recurrent layers are not planned.*; got layers\.1\. Leave loss out"):
        optim8.memory.plan(model, loss=loss_of_gpt)
    with pytest.raises(ValueError, match="activations beside sharded parameters are not planned"):
        optim8.memory.plan(gpt(1), loss=loss_of_gpt, sharding="fsdp", world_size=2)
    assert optim8.memory.plan(gpt(1), loss=loss_of_gpt, world_size=2).bytes["activations"] > 0
