"""Calls that wait for an import."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType

import pytest

from optim8.integrations.hooks import after_import


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with a module that imports another; nothing of it is imported yet."""
    (tmp_path / "waited").mkdir()
    (tmp_path / "waited" / "__init__.py").write_text("")
    (tmp_path / "waited" / "inner.py").write_text("from waited import other\nvalue = other.value\n")
    (tmp_path / "waited" / "other.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "waited"]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


def test_a_call_waits_for_the_import(library: Path) -> None:
    seen: list[ModuleType] = []
    after_import("waited.inner", seen.append)
    after_import("waited.other", lambda module: setattr(module, "value", 2))
    assert importlib.util.find_spec("waited") is not None
    assert seen == []
    assert "waited" not in sys.modules
    inner = importlib.import_module("waited.inner")
    assert seen == [inner]
    assert inner.value == 2
    assert type(inner.__loader__).__name__ == type(inner.__spec__.loader).__name__ == "SourceFileLoader"
    assert "other.value" in inspect.getsource(inner)
    after_import("waited.inner", seen.append)  # it is there already
    assert seen == [inner, inner]


def test_the_last_call_that_waits_counts(library: Path) -> None:
    seen: list[str] = []
    after_import("waited.other", lambda _: seen.append("first"))
    after_import("waited.other", lambda _: seen.append("second"))
    importlib.import_module("waited.other")
    assert seen == ["second"]


def test_what_is_not_there_stays_missing() -> None:
    after_import("waited_for_nothing", lambda _: None)
    assert importlib.util.find_spec("waited_for_nothing") is None
    with pytest.raises(ModuleNotFoundError, match="waited_for_nothing"):
        importlib.import_module("waited_for_nothing")
