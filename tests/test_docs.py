"""Every example in README.md, CONTRIBUTING.md and docs/*.md runs: one mechanism for all of them.

A block fenced with ```python is either a dialogue (`>>>`, what is printed is compared) or plain code (it must run).
The blocks of a document run in order and share their names, in an empty folder. A block that needs other libraries
says so behind the language, as in ```python needs=bitsandbytes,torchao; where one of them is not installed, the blocks
that need none still run.
"""

from __future__ import annotations

import doctest
import importlib.util
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

from optim8 import functional as F

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@dataclass(frozen=True)
class Block:
    line: int  # of its first line of code, from 1
    code: str
    needs: tuple[str, ...]

    @property
    def is_dialogue(self) -> bool:
        return any(line.lstrip().startswith(">>>") for line in self.code.splitlines())


def blocks(text: str) -> list[Block]:
    """The fenced Python blocks of a document."""
    found: list[Block] = []
    lines = text.splitlines()
    start: int | None = None
    info = ""
    for number, line in enumerate(map(str.strip, lines)):
        if start is None and line.startswith("```"):
            start, info = number + 1, line.removeprefix("```").strip()
        elif start is not None and line == "```":
            language, *options = info.split() or [""]
            needs = [name for o in options if o.startswith("needs=") for name in o.removeprefix("needs=").split(",")]
            if language == "python":
                code = textwrap.dedent("\n".join(lines[start:number]))  # a block of an item of a list is indented
                found.append(Block(start + 1, f"{code}\n", tuple(needs)))
            start = None
    assert start is None, f"the fence that opens in line {start} is not closed"
    return found


def run(path: Path, block: Block, names: dict[str, object]) -> None:
    if not block.is_dialogue:
        # The document's own lines stand in a traceback.
        exec(compile("\n" * (block.line - 1) + block.code, str(path), "exec"), names)
        return
    test = doctest.DocTestParser().get_doctest(block.code, {}, path.name, str(path), block.line - 1)
    test.globs = names
    heard: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(test, out=heard.append, clear_globs=False)
    assert result.failed == 0, "".join(heard)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_examples_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__document__"}
    missing: set[str] = set()
    for block in blocks(path.read_text(encoding="utf-8")):
        lacks = {name for name in block.needs if importlib.util.find_spec(name) is None}
        missing |= lacks
        if not lacks:
            run(path, block, names)
    if missing:
        pytest.skip(f"the blocks that need {', '.join(sorted(missing))} did not run; all others did")


def test_blocks_are_found() -> None:
    text = "a\n```python\nx = 1\n```\n```\nno\n```\n```python needs=torchao,b\n>>> x\n1\n```\n```bash\nls\n```\n"
    text += "- an item\n\n    ```python\n    if x:\n        y\n    ```\n"
    assert blocks(text) == [
        Block(3, "x = 1\n", ()),
        Block(9, ">>> x\n1\n", ("torchao", "b")),
        Block(18, "if x:\n    y\n", ()),
    ]
    assert sum(len(blocks(path.read_text(encoding="utf-8"))) for path in DOCUMENTS) > 8


@pytest.mark.parametrize("code", ["1 / 0\n", ">>> 1 + 1\n3\n", ">>> 1 / 0\n"])
def test_an_example_that_fails_is_noticed(code: str) -> None:
    with pytest.raises((AssertionError, ZeroDivisionError)):
        run(Path("x.md"), Block(1, code, ()), {})


def test_docs_functional_names_every_function() -> None:
    text = (ROOT / "docs" / "functional.md").read_text(encoding="utf-8")
    assert [name for name in F.__all__ if name not in text] == []


COMPARISON = ROOT / "docs" / "comparison.md"


def test_the_comparison_is_of_the_versions_that_are_installed_for_it() -> None:
    pins = re.findall(r'"(bitsandbytes|torchao|flashoptim)==([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    text = COMPARISON.read_text(encoding="utf-8").casefold()
    header = next(line for line in text.splitlines() if line.startswith("| | optim8 |"))
    assert [f"{name} {version}" in header for name, version in pins] == [True] * 3


@pytest.mark.peers
@pytest.mark.parametrize("column, library", [(1, "optim8"), (2, "bitsandbytes"), (3, "torchao")])
def test_the_comparison_has_the_8_bit_rules_of_each_library(column: int, library: str) -> None:
    module = pytest.importorskip(f"{library}.optim")
    classes = [name for name in dir(module) if name.endswith("8bit") and isinstance(getattr(module, name), type)]
    rules = {name.removesuffix("8bit") for name in classes if not name.startswith("Paged")}
    row = next(line for line in COMPARISON.read_text().splitlines() if line.startswith("| rules with 8-bit state"))
    assert set(row.strip("| ").split(" | ")[column].split(", ")) == rules


@pytest.mark.peers
@pytest.mark.parametrize("library", ["bitsandbytes", "torchao"])
def test_the_files_that_the_comparison_names_are_there(library: str) -> None:
    pytest.importorskip(library)
    files = set(re.findall(rf"`({library}/[\w/]+(?:\.py)?)`", COMPARISON.read_text(encoding="utf-8")))
    assert len(files) >= 3
    folder = Path(str(importlib.util.find_spec(library).origin)).parent.parent  # type: ignore[union-attr]
    assert [name for name in sorted(files) if not (folder / name).exists()] == []
