"""The table of optimizers: one row for each, as in docs/optimizers.md, with the bytes that state really takes."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from cases import EVERY, Case, exported_names
from experiments_harness import EXPERIMENTS

from optim8 import rules

DOCUMENT = EXPERIMENTS.parent / "docs" / "optimizers.md"


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import suite as module

    return module


def test_the_document_is_up_to_date(suite: ModuleType) -> None:
    """Else run experiments/report.py."""
    table = DOCUMENT.read_text(encoding="utf-8").partition("<!-- table:optimizers -->\n")[2].partition("<!-- /table")[0]
    assert table == suite.render() + "\n"


def test_every_optimizer_has_a_row(suite: ModuleType) -> None:
    rows = suite.render().splitlines()[2:]
    assert sorted(row.split("|")[2].strip(" `") for row in rows) == sorted(exported_names())
    assert suite.DIFFERS.keys() >= {cls.rule for cls in suite.optimizers()}


def test_a_rule_of_which_nothing_is_said_is_noticed(suite: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(suite.DIFFERS, suite.optimizers()[0].rule)
    with pytest.raises(ValueError, match="DIFFERS must say"):
        suite.render()


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_the_bytes_are_those_of_a_state(suite: ModuleType, case: Case) -> None:
    """Of 2^16 values, with each row of hyper-parameters; the count of steps is 4 bytes, a scalar of the rule 4 more."""
    for hyper in case.hypers:
        p = torch.nn.Parameter(torch.ones(256, 256))
        optimizer: Any = case.make([p], hyper)
        p.grad = torch.ones(256, 256)
        optimizer.step()
        taken = sum(t.numel() * t.itemsize for t in optimizer.state.get(p, {}).values())
        variant = rules.variant(case.cls.rule, optimizer.param_groups[0])
        scalars = 4 * (len(variant.moments.scalars) + 1)
        assert taken - scalars == pytest.approx(suite.bytes_of(variant) * p.numel(), abs=scalars)
