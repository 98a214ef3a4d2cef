"""The documents and their pictures show what the result files say, and it is noticed where they do not."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from experiments_harness import EXPERIMENTS, read

ROOT = EXPERIMENTS.parent
FIGURES = ROOT / "docs" / "figures"


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import report as module

    return module


@pytest.fixture
def copied(report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the report on a document in `tmp_path` that shows one picture, beside copies of picture and result."""
    shutil.copy(FIGURES / "train_lm-loss.png", tmp_path)
    result = EXPERIMENTS / "results" / "train_lm.json"
    (tmp_path / "train_lm.json").write_text(result.read_text())
    (tmp_path / "document.md").write_text("![loss](figures/train_lm-loss.png)\n")

    def main(*options: str) -> int:
        paths = [f"--results={tmp_path}", f"--figures={tmp_path}", str(tmp_path / "document.md")]
        monkeypatch.setattr("sys.argv", ["report.py", *options, *paths])
        return int(report.main())

    return main


def change_a_loss(folder: Path) -> None:
    result = read(folder / "train_lm.json")
    result["runs"]["adamw8bit"]["training_curve"][50][1] *= 1.0001
    (folder / "train_lm.json").write_text(json.dumps(result))


def change_a_label(folder: Path) -> None:
    result = read(folder / "train_lm.json")
    result["runs"]["adamw8bit"]["label"] += "!"
    (folder / "train_lm.json").write_text(json.dumps(result))


def paint_a_pixel(folder: Path) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngImageFile, PngInfo

    path = folder / "train_lm-loss.png"
    with Image.open(path) as image:
        assert isinstance(image, PngImageFile)
        kept = PngInfo()
        for key, value in image.text.items():
            kept.add_text(key, str(value))
        painted = image.convert("RGB")
        painted.putpixel((300, 300), (255, 0, 0))
    painted.save(path, pnginfo=kept)


def remove(folder: Path) -> None:
    (folder / "train_lm-loss.png").unlink()


def replace_by_another(folder: Path) -> None:
    (folder / "train_lm-loss.png").write_bytes((FIGURES / "roofline.png").read_bytes())


@pytest.mark.parametrize("harm", [change_a_loss, change_a_label, paint_a_pixel, remove, replace_by_another])
def test_a_picture_of_other_data_is_found_and_mended(
    copied: Callable[..., int], harm: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert copied() == 0
    assert (tmp_path / "train_lm-loss.png").read_bytes() == (FIGURES / "train_lm-loss.png").read_bytes()  # left alone
    harm(tmp_path)
    assert copied("--check") == 1
    assert "train_lm-loss.png: differs from the result files" in capsys.readouterr().err
    assert copied() == 0
    assert copied("--check") == 0


@pytest.mark.parametrize(
    "link, needed",
    [
        ("![x](figures/unheard-of.png)", "a figure must be one of train_lm-loss"),
        ("![x](figures/roofline.png)", "figure roofline needs roofline.json, which is not there"),
        ("<!-- table:unheard -->\n<!-- /table -->", "a table must be one of train_lm"),
    ],
)
def test_a_wrong_mark_is_refused(
    copied: Callable[..., int], tmp_path: Path, link: str, needed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "document.md").write_text(link)
    assert copied() == 2
    assert needed in capsys.readouterr().err


def test_a_table_without_a_result_says_so(copied: Callable[..., int], tmp_path: Path) -> None:
    (tmp_path / "document.md").write_text("<!-- table:roofline -->\n1.23\n<!-- /table -->\n")
    assert copied() == 0
    assert (tmp_path / "document.md").read_text() == "<!-- table:roofline -->\nNot measured yet.\n<!-- /table -->\n"


def test_every_committed_picture_is_shown_and_checked(report: ModuleType) -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in report.documents())
    shown = {found["name"] for found in report.SHOWN.finditer(text)}
    assert {path.stem for path in FIGURES.glob("*.png")} == shown == set(report.FIGURES)
    every = text.count(".png)")
    assert every == sum(1 for _ in report.SHOWN.finditer(text)), "a picture that the report does not know"


def test_peers_have_their_version_and_gaps_are_named(report: ModuleType) -> None:
    result = read(EXPERIMENTS / "results" / "bench_step-peers.json")
    versions = result["peers"]
    header = report.bench_step(result).splitlines()[0]
    for library in ("bitsandbytes", "torchao"):
        assert f"{library} {versions[library]} AdamW8bit" in header
    rest = {**result, "peers": {"torchao": versions["torchao"]}, "failed": {"torchao AdamW8bit": "OSError: no"}}
    rest["timings"] = [row for row in result["timings"] if not row["subject"].startswith(("bitsandbytes", "torchao"))]
    text = report.bench_step(rest)
    assert "Not measured: bitsandbytes (left out, or not installed)." in text
    assert "Not measured: torchao AdamW8bit (OSError: no)." in text
    assert "not measured |" in text  # torch's steps have no 8-bit state


def lightness(colour: str) -> float:
    """Luma (ITU-R BT.601) of a colour "#rrggbb", from 0 to 1: what a greyscale copy keeps."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue


def test_styles_are_told_apart_without_colour(report: ModuleType) -> None:
    from shared.plotting import STYLES

    shades = [lightness(style.colour) for style in STYLES]
    for before, after in itertools.pairwise(shades):
        assert abs(before - after) > 0.2
    assert len({style.dashes for style in STYLES}) == len({style.marker for style in STYLES}) == len(STYLES)


def test_every_panel_is_labelled_with_units(report: ModuleType) -> None:
    from shared.plotting import contents

    for name in report.FIGURES:
        panels: list[dict[str, Any]] = contents(report.figure(name, EXPERIMENTS / "results"))
        assert panels
        assert panels[0]["y"][0] or len(panels[0]["y"]) > 2, name  # a label, or the names of bars
        for panel in panels:
            assert panel["x"][0] or len(panel["x"]) > 2, name
