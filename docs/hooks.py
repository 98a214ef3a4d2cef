"""What mkdocs does for the site beyond mkdocs.yml.

Documents that stand outside of docs/, where GitHub looks for them, become pages. Fences lose the options that the tests
read. A page of the API names a module, and shows what is in its `__all__`.
"""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import optim8

# Documents outside of docs/ by their path in the project, and their pages.
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "experiments/README.md": "experiments.md",
}
# A fence's language, and behind it `needs=` or `for=`, which no highlighter knows.
_FENCE = re.compile(r"^(?P<fence> *```\w+)[ ].*$", re.MULTILINE)
# A directive without options of its own.
_MODULE = re.compile(r"^::: (?P<name>[\w.]+)$(?!\n )", re.MULTILINE)


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    for source, page in PAGES.items():
        path = Path(config.config_file_path).parent / source
        files.append(File.generated(config, page, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    for source, page in PAGES.items():
        markdown = markdown.replace(f"](../{source}", f"]({page}")
    return _MODULE.sub(_with_members, _FENCE.sub(r"\g<fence>", markdown))


def _with_members(directive: re.Match[str]) -> str:
    """The directive with the module's public names, but for those that optim8 itself or the page has too."""
    module = importlib.import_module(directive["name"])
    names = set(module.__all__) - (set() if module is optim8 else set(optim8.__all__))
    members = [
        name
        for name in sorted(names)
        if not inspect.ismodule(getattr(module, name)) and f"{directive[0]}.{name}\n" not in directive.string
    ]
    return (
        f"{directive[0]}\n"
        "    options:\n"
        f"      members: {members}\n"
        "      show_root_heading: false\n"
        "      show_root_toc_entry: false\n"
    )


class Fields(griffe.Extension):
    """Takes off attributes, whose docstring is found by inspection, the docstring of their value's class."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        if "property" not in attr.labels:
            attr.docstring = None
