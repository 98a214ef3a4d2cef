"""The examples of docs/functional.md run, and it names every function."""

from __future__ import annotations

import doctest
from pathlib import Path

from optim8 import functional as F

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "functional.md"


def test_the_examples_run() -> None:
    failed, tried = doctest.testfile(str(DOCUMENT), module_relative=False, encoding="utf-8")
    assert tried > 20
    assert failed == 0


def test_every_public_name_is_there() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert [name for name in F.__all__ if name not in text] == []
