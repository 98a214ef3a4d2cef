"""The table of the dynamic code is made once for each device, and what a user gets of it is a copy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import optim8
from optim8 import codec
from optim8.functional import create_dynamic_map

CPU = torch.device("cpu")


@pytest.fixture
def no_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "_tables", {})


@pytest.mark.parametrize("signed", [True, False])
def test_the_table_is_made_once(no_tables: None, signed: bool) -> None:
    table = codec.code_table(signed, CPU)
    assert codec.code_table(signed, CPU) is table
    assert torch.equal(table, create_dynamic_map(signed))
    assert table.dtype == torch.float32


@pytest.mark.parametrize("mode", [torch.inference_mode, FakeTensorMode])
def test_no_mode_leaves_a_table_of_its_own(no_tables: None, mode: Any) -> None:
    with mode():
        codec.code_table(True, CPU)
    table = codec.code_table(True, CPU)
    assert type(table) is torch.Tensor
    assert not table.is_inference()


def test_users_get_copies() -> None:
    shared = {signed: codec.code_table(signed, CPU).clone() for signed in (True, False)}
    p = torch.nn.Parameter(torch.ones(4096))
    p.grad = torch.ones(4096)
    optimizer = optim8.AdamW8bit([p])
    optimizer.step()
    entry = optim8.convert.to_bitsandbytes(optimizer)["state"][0]
    for table in (create_dynamic_map(True), create_dynamic_map(False), entry["qmap1"], entry["qmap2"]):
        table.zero_()
    assert all(torch.equal(codec.code_table(signed, CPU), table) for signed, table in shared.items())


def test_the_block_is_that_of_the_core() -> None:
    assert optim8._native.cpu().step_block == codec.BLOCK == 256
