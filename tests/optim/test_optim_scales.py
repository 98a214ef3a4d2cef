"""Codes whose scales were lost: noticed wherever state comes from elsewhere, before anything is stepped."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, Case
from support.harness import ALL, bits, hostile, parameter, snapshot

import optim8
from optim8 import codec, rules
from optim8.state import tiles

EXP_AVG = rules.rule("lion").moments[0]


def lost(state: str) -> str:
    return rf"\['{state}_codes'\] has values where '{state}_absmax' is 0"


LOST = lost(EXP_AVG.name)


def trained(case: Case, device: torch.device, **more: Any) -> tuple[torch.nn.Parameter, Any]:
    grad = hostile(400, torch.float32, seed=1, small=-2, large=0).to(device)
    p = parameter(torch.ones(400, device=device), grad)
    optimizer = case.make([p], **more)
    optimizer.step()
    return p, optimizer


@ALL
@pytest.mark.parametrize("block", [0, 1])  # 1: the last, which is shorter
def test_a_dict_whose_scales_were_lost_is_refused(case: Case, block: int, device: torch.device) -> None:
    p, optimizer = trained(case, device)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0][case.absmax(case.state)][block] = 0
    before = snapshot(optimizer, [p])
    with pytest.raises(ValueError, match=lost(case.codes(case.state).removesuffix("_codes"))):
        optimizer.load_state_dict(state)
    assert snapshot(optimizer, [p]) == before


def test_blocks_of_zeros_load_whatever_code_they_have(device: torch.device) -> None:
    """As other libraries write them: it is the same code all over the block."""
    _, optimizer = trained(CASES["AdamW8bit"], device)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["exp_avg_absmax"][0] = 0
    state["state"][0]["exp_avg_codes"][:256] = 131
    optimizer.load_state_dict(state)
    optimizer.step()


@pytest.mark.parametrize("way", ["assigned", "pickled"])
def test_lost_scales_are_told_at_the_first_step(way: str, device: torch.device) -> None:
    case = CASES["AdamW8bit"]
    p, optimizer = trained(case, device)
    entry = {name: value.clone() for name, value in optimizer.state[p].items()}
    entry["exp_avg_absmax"].zero_()
    if way == "assigned":
        optimizer = case.make([p])
    optimizer.state[p] = entry
    if way == "pickled":
        optimizer = pickle.loads(pickle.dumps(optimizer))
        p = optimizer.param_groups[0]["params"][0]
        p.grad = torch.ones_like(p)
    before = bits(p)
    for _ in range(2):
        with pytest.raises(ValueError, match=LOST):
            optimizer.step()
    assert bits(p) == before


def test_lost_scales_of_a_kept_directory_are_told_at_the_first_step(tmp_path: Path) -> None:
    def make(resume: bool) -> tuple[torch.nn.Parameter, Any]:
        p = parameter(torch.ones(5000), hostile(5000, torch.float32, seed=1, small=-2, large=0))
        pager = optim8.paging.Pager(directory=tmp_path, keep=True, resume=resume, changed_params=resume)
        return p, optim8.AdamW8bit([p], paged=pager)

    p, optimizer = make(resume=False)
    optimizer.step()
    optimizer.state[p]["exp_avg_absmax"].zero_()
    optimizer.close()
    _, optimizer = make(resume=True)
    with pytest.raises(ValueError, match=LOST):
        optimizer.step()


@pytest.mark.parametrize("size", [1, 8, 256])
def test_lost_scales_in_tiles(size: int) -> None:
    codes, absmax = torch.empty(4, 256, dtype=torch.uint8), torch.empty(4)
    values = hostile(1024, torch.float32, seed=1, small=-2, large=0).view(4, 256)
    codec.quantize(values, codes, absmax, signed=EXP_AVG.signed)
    cut = tiles.from_absmax((4, 256), (256, 1), absmax, 1, size)
    cut[1, ..., 0] = 0
    with pytest.raises(ValueError, match=LOST):
        tiles.to_absmax("here", EXP_AVG, codes, cut, (256, 1))
