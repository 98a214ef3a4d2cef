"""The stepper apart from an optimizer's own step: subsets, previews, arrays; and how often a step gathers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import Case
from support.harness import ALL, bits, hostile, moments, parameter, snapshot, state_bits

from optim8 import _native
from optim8.step.stepper import Stepper


def make(case: Case, device: torch.device, **options: Any) -> tuple[list[torch.nn.Parameter], Any]:
    params = [
        parameter(torch.ones(n, device=device), hostile(n, torch.float32, seed=n, small=-3, large=0).to(device))
        for n in (600, 70, 300)
    ]
    return params, case.make(params, **options)


@ALL
def test_a_subset_is_stepped_as_if_the_others_had_no_gradient(case: Case, device: torch.device) -> None:
    params, optimizer = make(case, device)
    twins, other = make(case, device)
    twins[1].grad = None
    for _ in range(2):
        optimizer.stepper.step(optimizer, [params[2], params[0]])
        other.step()
    assert [bits(p) for p in params] == [bits(p) for p in twins]
    assert set(optimizer.state) == {params[0], params[2]}
    assert all(state_bits(optimizer, params[i]) == state_bits(other, twins[i]) for i in (0, 2))


@pytest.mark.parametrize("optim_bits", [8, 16, 32])
@ALL
def test_a_preview_is_what_the_next_step_makes_of_32_bit_state(
    case: Case, optim_bits: int, device: torch.device
) -> None:
    params, optimizer = make(case, device, optim_bits=optim_bits)
    optimizer.step()
    before = snapshot(optimizer, params)
    group = optimizer.param_groups[0]
    old, whole = optimizer.stepper.preview(optimizer, group, params[0])
    _, part = optimizer.stepper.preview(optimizer, group, params[0], torch.tensor([1], device=device))
    assert snapshot(optimizer, params) == before
    assert all(torch.equal(part[name], whole[name][256:512]) for name in case.states)
    for name, moment in moments(optimizer, case, params[0]).items():
        assert (np.abs(old[name].cpu().double().numpy() - moment.value) <= moment.error).all()
    if optim_bits == 32:
        optimizer.step()
        for name, moment in moments(optimizer, case, params[0]).items():
            assert whole[name].cpu().double().numpy().tolist() == moment.value.tolist()


class Counting(Stepper):
    """Counts how often it gathers."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered_times = 0

    def _gather(self, *args: Any) -> list[Any]:
        self.gathered_times += 1
        return super()._gather(*args)


@ALL
def test_a_step_gathers_once_and_one_that_lacks_anything_twice(case: Case, device: torch.device) -> None:
    params, optimizer = make(case, device)
    strided = parameter(torch.ones(20, 30, device=device)[:, ::2], torch.ones(20, 15, device=device))
    turned = parameter(torch.ones(40, 20, device=device))
    turned.grad = torch.ones(20, 40, device=device).t()
    optimizer.add_param_group({"params": [strided, turned]})
    counting = optimizer.__dict__["_stepper"] = Counting()
    optimizer.step()
    assert counting.gathered_times == 2, "no state, gaps, gradients in another order: all at once"
    for p in (strided, turned):
        p.grad = None
    optimizer.step()
    assert counting.gathered_times == 3
    assert len(params) == 3


@pytest.mark.parametrize(
    "begins, shape, stride", [([-1], (2,), (1,)), ([9], (2,), (1,)), ([0], (3, 4), (4, 1)), ([0], (2,), (10,))]
)
def test_nothing_is_cut_from_beyond_the_memory(begins: list[int], shape: Any, stride: Any) -> None:
    with pytest.raises(ValueError, match="must lie within the 10 values"):
        _native.cpu().cut(torch.zeros(10), begins, [shape], [stride])


def test_what_is_cut_keeps_the_memory_and_has_a_storage_of_its_own() -> None:
    flat = torch.arange(10.0)
    tensors = [torch.utils.dlpack.from_dlpack(c) for c in _native.cpu().cut(flat, [2, 6], [(2, 2), ()], [(1, 2), ()])]
    assert tensors[0].tolist() == [[2, 4], [3, 5]]
    assert tensors[1].item() == 6
    assert [t.untyped_storage().nbytes() for t in tensors] == [16, 4]
    tensors[0].fill_(7)
    assert flat.tolist() == [0, 1, 7, 7, 7, 7, 6, 7, 8, 9]
    del flat
    assert tensors[0].sum() == 28
    _native.cpu().cut(torch.zeros(3), [0], [(3,)], [(1,)])  # nobody takes these: they are freed
