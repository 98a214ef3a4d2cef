"""Imports point one way, between packages, within them, and in csrc."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A module imports from its own layer's package and from layers below it. Files beside __init__.py are layers by name.
PYTHON_LAYERS = [
    "_cpu",
    "_cuda",
    "_native",
    "text",
    "rules",
    "codec",
    "state",
    "step",
    "functional",
    "paging",
    "checkpoint",
    "optim",
    "convert",
    "master",
    "nn",
    "memory",
    "health",
    "__init__",
    "integrations",
    "__main__",
]
# The same within a package: modules and folders, from the ground up.
INNER_LAYERS = {
    "state": [
        *(
            "symbols",
            "layout",
            "mapped",
            "report",
            "states",
            "allocation",
            "moments",
            "weights",
            "conversion",
            "tiles",
            "shards",
        ),
    ],
    "step": [
        *("orthogonal", "weight_options", "hypers", "arguments", "overrides", "pending", "norms", "run", "scaling"),
        *("parts", "arrays"),
        *("memory", "supply", "ranks", "matrices", "stepper", "record", "operator"),
    ],
    "paging": ["files", "pager", "placement", "directory", "tiers", "streaming", "sharing", "store"],
    "checkpoint": [
        *("formats", "inbox", "windows", "pickling", "former_names", "adopt", "arrivals", "optimizer", "shards"),
        *("copying", "read", "save", "load"),
    ],
    "optim": [
        *("absent", "override", "reset", "summary", "access", "manager", "optimizer", "update", "base"),
        "docstring",
        "precision",
        "*",  # the families of optimizers
        "adamw",
    ],
    "memory": ["models", "profiling", "planning", "command"],
    "integrations": ["notice", "hooks", "names", "transformers", "*", "launcher"],
}
COMPILED = ("_cpu", "_cuda")

# What each folder of csrc includes from csrc. A folder that is not here counts as the folder around it.
CSRC_INCLUDES = {
    "core": {"core"},
    "cpu/kernels": {"core", "cpu/kernels"},
    "cpu": {"core", "cpu/kernels", "cpu"},
    "cpu/step": {"core", "cpu", "cpu/step"},
    "cuda": {"core", "cuda"},
    "tensors": {"core", "tensors"},
    "bind": {"core", "tensors", "bind"},
    "bind/cpu": {"core", "cpu", "cpu/step", "tensors", "bind", "bind/cpu"},
    "bind/cuda": {"core", "cuda", "tensors", "bind", "bind/cuda"},
}


def imported_modules(text: str, module: str) -> list[str]:
    """Dotted names under optim8 that the source of `module` (say "optim8.optim.adam") imports, by any spelling."""
    is_package = module.endswith(".__init__")
    package = module.split(".")[:-1]
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            # `from optim8 import functional` imports a module; `from optim8.functional import f` names one inside it.
            found += [".".join([*base, alias.name]) if len(base) <= 2 else ".".join(base) for alias in node.names]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if name in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
                dotted = str(node.args[0].value)
                found.append("optim8" + dotted if dotted.startswith(".") else dotted)
    return [name for name in found if name.split(".")[0] == "optim8" and not (is_package and name == module)]


def python_violations(text: str, module: str) -> list[str]:
    """Imports of `module` that do not point down, as messages."""
    layer = module.split(".")[1]
    messages = []
    for name in imported_modules(text, module):
        target = name.split(".")[1] if "." in name else "__init__"
        if target not in PYTHON_LAYERS:
            target = "__init__"  # a public name, such as `from optim8 import AdamW8bit`
        down = PYTHON_LAYERS.index(target) < PYTHON_LAYERS.index(layer) or target == layer
        if not down:
            messages.append(f"{module} ({layer}) imports {name} ({target}), which lies above it")
        if target == layer and layer in INNER_LAYERS:
            messages += _inner_violation(module, name, INNER_LAYERS[layer])
        if target in COMPILED and layer != "_native":
            messages.append(f"{module} imports {name}; only optim8._native imports compiled modules")
    return messages


def csrc_part(path: str) -> str:
    """The innermost folder of CSRC_INCLUDES around a file of csrc; where there is none, the folder itself."""
    folders = [folder.as_posix() for folder in Path(path).parents]
    return next((folder for folder in folders if folder in CSRC_INCLUDES), folders[0])


def _inner_violation(module: str, name: str, order: list[str]) -> list[str]:
    """An import from one part of a package that does not point down within it."""
    here, there = module.split(".")[2:3], name.split(".")[2:3]
    if here == ["__init__"] or here == there:
        return []
    if not there:
        return [f"{module} imports {name}, the package that it is in"]
    here, there = ([part if part in order or "*" not in order else "*" for part in parts] for parts in (here, there))
    unknown = [part for part in (*here, *there) if part not in order]
    if unknown:
        return [f"{module} imports {name}: {unknown[0]} has no place in INNER_LAYERS"]
    if order.index(there[0]) < order.index(here[0]):
        return []
    return [f"{module} imports {name}, which lies above it in its package"]


def csrc_violations(text: str, path: str) -> list[str]:
    """Includes of `path` (relative to csrc) that do not point down, as messages."""
    part = csrc_part(path)
    messages = []
    for quote, name in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', text, re.MULTILINE):
        if re.match(r"(torch|ATen|c10)/", name):
            messages.append(f"csrc/{path} includes {name}; native code includes no torch header")
        if quote == "<" and name.startswith("pybind11") and part.split("/")[0] not in ("tensors", "bind"):
            messages.append(f"csrc/{path} includes {name}; only tensors and bind know Python")
        if quote == "<" and name.startswith("cuda") and part not in ("cuda", "bind/cuda"):
            messages.append(f"csrc/{path} includes {name}; only csrc/cuda and its binding know CUDA")
        if quote == '"':
            target, allowed = csrc_part(name), CSRC_INCLUDES.get(part, set())
            if target not in allowed:
                messages.append(f"csrc/{path} includes {name}; {part} includes only {sorted(allowed)}")
    return messages


PYTHON_FILES = sorted((ROOT / "optim8").rglob("*.py"))
CSRC_FILES = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu"))


def test_files_are_found() -> None:
    assert len(PYTHON_FILES) > 3
    assert len(CSRC_FILES) > 3


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_imports_point_down(path: Path) -> None:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    assert python_violations(path.read_text(), module) == []


@pytest.mark.parametrize("path", CSRC_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_csrc_includes_point_down(path: Path) -> None:
    assert csrc_violations(path.read_text(), str(path.relative_to(ROOT / "csrc"))) == []


@pytest.mark.parametrize(
    "module, text",
    [
        ("optim8.functional.blockwise", "from optim8.optim import base"),
        ("optim8.functional.blockwise", "from ..optim.base import Base"),
        ("optim8.functional.blockwise", "import optim8.optim.adam as adam"),
        ("optim8.functional.__init__", "from .. import optim"),
        ("optim8.functional.blockwise", "def f():\n    from optim8 import optim"),
        ("optim8.functional.blockwise", "from optim8 import _cpu"),
        ("optim8.functional.blockwise", "import importlib\nimportlib.import_module('optim8._cuda')"),
        ("optim8.functional.blockwise", "from importlib import import_module\nimport_module('._cpu', 'optim8')"),
        ("optim8._native", "from . import functional"),
        ("optim8.optim.adam", "from optim8 import AdamW8bit"),
        ("optim8.optim.adam", "from .._cpu import step"),
        ("optim8.optim.adam", "import optim8"),
        ("optim8.state.layout", "from optim8.state.moments import Codes"),
        ("optim8.state.layout", "from optim8.step import run"),
        ("optim8.step.run", "from optim8.step import stepper"),
        ("optim8.state.layout", "from optim8.state.nowhere import what"),
    ],
)
def test_an_import_that_points_up_is_noticed(module: str, text: str) -> None:
    assert python_violations(text, module) != []


@pytest.mark.parametrize(
    "module, text",
    [
        ("optim8.__init__", "from .optim import AdamW8bit\nfrom . import functional"),
        ("optim8.__main__", "import torch\nfrom optim8 import __version__, _native"),
        ("optim8.optim.adam", "from .base import Base\nfrom ..functional import steps\nfrom .. import _native"),
        ("optim8.optim.__init__", "from . import adam\nfrom .adam import Adam8bit"),
        ("optim8._native", "from optim8 import _cpu\nimport optim8._cuda"),
        ("optim8.state.moments", "from optim8.state.layout import Layout\nfrom optim8.state import report"),
    ],
)
def test_an_import_that_points_down_is_allowed(module: str, text: str) -> None:
    assert python_violations(text, module) == []


@pytest.mark.parametrize(
    "path, text",
    [
        ("core/codec.h", '#include "cpu/kernels/simd.h"'),
        ("core/codec.h", "#include <cuda_runtime.h>"),
        ("core/rules/adam.h", '#  include "tensors/view.h"'),
        ("cpu/kernels/step.cpp", '#include "cuda/step.h"'),
        ("cpu/kernels/step.cpp", '#include "cpu/dispatch.h"'),
        ("cpu/kernels/step.cpp", "#include <pybind11/pybind11.h>"),
        ("cpu/step/rows.cpp", "#include <pybind11/pybind11.h>"),
        ("cpu/step/rows.cpp", '#include "cpu/kernels/simd.h"'),
        ("cpu/step/rows.cpp", '#include "tensors/view.h"'),
        ("cpu/dispatch.cpp", '#include "cpu/step/rows.h"'),
        ("tensors/view.h", '#include "bind/jobs.h"'),
        ("tensors/view.h", "#include <cuda_runtime.h>"),
        ("bind/jobs.h", '#include "cpu/dispatch.h"'),
        ("other/more.h", '#include "core/codec.h"'),
        ("cuda/step.cu", "#include <torch/extension.h>"),
        ("bind/cpu/module.cpp", '#include "cuda/step.h"'),
        ("bind/cuda/more.cpp", '#include "cpu/dispatch.h"'),
    ],
)
def test_an_include_that_points_up_is_noticed(path: str, text: str) -> None:
    assert csrc_violations(text, path) != []
