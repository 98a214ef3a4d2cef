"""What must be true of the sources of the package: one place for names of rules and states, files that can be read."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
from cases import exported_names

import optim8
from optim8 import rules

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "optim8").rglob("*.py"))
LONGEST = 300
RULES = frozenset(rules.every())
STATES = frozenset(moment.name for rule in rules.every().values() for moment in rule.moments)
A_STATE = re.compile(rf"(?<![A-Za-z])({'|'.join(sorted(STATES))})(?![A-Za-z])")  # "exp_avg_codes" too, not "summary"


def docstrings(tree: ast.AST) -> set[int]:
    """The nodes that are docstrings, by identity."""
    nodes = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                nodes.add(id(first.value))
    return nodes


def rule_of_class(tree: ast.AST) -> set[int]:
    """The constants that say which rule a class has: `rule = "adam"` in its body."""
    return {
        id(statement.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for statement in node.body
        if isinstance(statement, ast.Assign) and [ast.unparse(t) for t in statement.targets] == ["rule"]
    }


def parts_of_docstrings(tree: ast.AST) -> set[int]:
    """The constants from which a class puts its docstring together: arguments of docstring(), and _STATES."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "docstring"]
    constants = {id(node) for call in nodes for node in ast.walk(call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_STATES":
            constants.add(id(node.value))
    return constants


def names_in(text: str) -> list[str]:
    """The names of rules and states that a source writes outside of docstrings, other than the rule of a class."""
    tree = ast.parse(text)
    allowed = docstrings(tree) | parts_of_docstrings(tree) | rule_of_class(tree)
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    texts = [node.value for node in constants if id(node) not in allowed]
    return [text for text in texts if text in RULES or A_STATE.search(text)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_formats_and_classes_name_rules_and_states(path: Path) -> None:
    if "formats" in path.parts:
        return  # of other libraries; they say which rules and states are theirs
    assert names_in(path.read_text()) == []


@pytest.mark.parametrize(
    "text", ['x = "adamw"', 'def f():\n    return entry["exp_avg_sq_codes"]', 'x = f"{y} lion"\nz = "lion"']
)
def test_a_name_is_noticed(text: str) -> None:
    assert names_in(text)


@pytest.mark.parametrize(
    "text", ['"""Of adamw, exp_avg."""', 'class A:\n    """adam"""\n    rule = "adam"', 'x = "adamant"']
)
def test_a_docstring_and_a_class_may_have_names(text: str) -> None:
    assert names_in(text) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_not_too_long_to_read(path: Path) -> None:
    most = 200 if path == ROOT / "optim8/optim/base.py" else LONGEST
    assert len(path.read_text().splitlines()) <= most


@pytest.mark.parametrize("name", sorted(exported_names()))
def test_a_signature_has_the_defaults_of_the_rule(name: str) -> None:
    cls = getattr(optim8, name)
    given = {key: parameter.default for key, parameter in inspect.signature(cls).parameters.items()}
    for hyper in rules.rule(cls.rule).hypers:
        assert given[hyper.name] == hyper.default, hyper.name
