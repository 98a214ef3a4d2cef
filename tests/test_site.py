"""The site of `make docs` builds without a warning, has every public name, and asks no other host for anything.

mkdocs itself checks links between pages (`--strict`). README.md and CONTRIBUTING.md are on GitHub only, or are copied,
so their links are checked here.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
import urllib.parse
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest

import optim8

ROOT = Path(__file__).resolve().parent.parent
MODULES = ["optim8", *(f"optim8.{name}" for name in optim8.__all__ if inspect.ismodule(getattr(optim8, name)))]
# What a link, a picture, a style or a script is fetched from.
PLACES = {"a": "href", "img": "src", "link": "href", "script": "src", "iframe": "src"}
HIDDEN = ("code", "pre", "script", "style")


class Page(HTMLParser):
    """The addresses that a page shows or loads, by tag, its anchors, and its text but for code."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.places: list[tuple[str, str]] = []
        self.anchors: set[str] = set()
        self.text = ""
        self.within: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in HIDDEN:
            self.within.append(tag)
        given = dict(attrs)
        self.anchors |= {value for value in (given.get("id"), given.get("name")) if value}
        place = given.get(PLACES.get(tag, ""))
        if place:
            self.places.append((tag, place))

    def handle_endtag(self, tag: str) -> None:
        if self.within and self.within[-1] == tag:
            self.within.pop()

    def handle_data(self, data: str) -> None:
        if not self.within:
            self.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}


def test_every_document_has_a_page(site: Path) -> None:
    documents = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"README"}
    expected = {*documents, "index", "404", "changelog", "contributing", "experiments"}
    assert {path.stem for path in site.glob("*.html")} == expected


def test_every_link_and_picture_leads_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    missing = []
    for path, page in pages.items():
        if path.name == "404.html":
            continue  # its links begin at the root of a host
        for tag, place in page.places:
            address = urllib.parse.urlsplit(place)
            if address.scheme or address.netloc:
                continue
            target = (path.parent / urllib.parse.unquote(address.path)).resolve() if address.path else path
            found = target.is_file() or (target / "index.html").is_file()
            anchor = urllib.parse.unquote(address.fragment)
            if found and tag == "a" and anchor and target in pages:
                found = anchor in pages[target].anchors
            if not found:
                missing.append(f"{path.relative_to(site)}: {tag} {place}")
    assert missing == []


def test_a_link_out_of_docs_leads_to_the_page_of_that_document(pages: dict[Path, Page]) -> None:
    places = next(page.places for path, page in pages.items() if path.name == "results.html")
    assert ("a", "experiments.html") in places


def test_no_markdown_is_left_as_it_was(pages: dict[Path, Page]) -> None:
    """Where the site's Markdown is not GitHub's: tables, items of lists, fences, links."""
    marks = re.compile(r"^.*(?:\| *-{2,}|^ *```|^ *- \w|\]\().*$", re.MULTILINE)
    left = {f"{path.name}: {found[0]}" for path, page in pages.items() for found in marks.finditer(page.text)}
    assert left == set()


def test_a_page_loads_nothing_from_another_host(pages: dict[Path, Page]) -> None:
    foreign = {
        place for page in pages.values() for tag, place in page.places if tag != "a" and re.match(r"(\w+:)?//", place)
    }
    assert foreign == set()


def public_names() -> set[str]:
    """The names of all `__all__`, modules and what optim8 itself has left out."""
    found = set()
    for module in map(importlib.import_module, MODULES):
        names = [name for name in module.__all__ if not inspect.ismodule(getattr(module, name))]
        found |= {f"{module.__name__}.{name}" for name in names if module is optim8 or name not in optim8.__all__}
    return found


def test_the_api_has_every_public_name(site: Path) -> None:
    # Of the inventory that other sites link by: four lines of text, and the rest compressed.
    compressed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    documented = {line.split()[0] for line in zlib.decompress(compressed).decode().splitlines()}
    assert public_names() - documented == set()
    assert len(public_names()) > 100


def test_a_docstring_that_comes_into_being_at_import_is_shown(site: Path) -> None:
    text = (site / "api" / "optim8.html").read_text(encoding="utf-8")
    assert text.count("tensors of fewer values keep 32-bit state") >= len(
        [name for name in optim8.__all__ if name.endswith("8bit") and not name.startswith("Paged")]
    )


def slug(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    text = re.sub(r"^ *```.*?^ *```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return {slug(found) for found in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "experiments/README.md"])
def test_links_of_documents_outside_of_docs_work_on_github(name: str) -> None:
    path = ROOT / name
    missing = []
    for place in re.findall(r"\]\((?!\w+://)([^)\s]+)\)", path.read_text(encoding="utf-8")):
        file, _, anchor = place.partition("#")
        target = path.parent / file if file else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(place)
    assert missing == []


def test_anchors_are_githubs() -> None:
    assert slug("From torch.optim") == "from-torchoptim"
    assert slug("LLM.int8()") == "llmint8"
    assert slug("`optim8.functional`, by *topic*") == "optim8functional-by-topic"
    assert slug("See [the plan](memory.md)") == "see-the-plan"
