"""How every picture looks, and the mark by which a picture is told from one that was drawn from other data.

A PNG that `save` writes carries a digest of all that its figure shows (numbers, labels, titles) and of its pixels.
`is_current` draws the figure again, without rendering it, and compares. So a picture that does not show what the result
file says is noticed on any machine, with any version of matplotlib, and so is a picture that somebody painted over.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.common import atomic_path, json_path, write_json

if TYPE_CHECKING:  # matplotlib takes a second to import, and a table needs none of it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

MARK = "optim8 digest"  # the name of the PNG's text entry
SETTINGS: dict[Any, Any] = {
    "font.size": 13,
    "axes.titlesize": 13,
    "figure.dpi": 110,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
    "hatch.linewidth": 0.7,
}


@dataclass(frozen=True)
class Style:
    """How one subject is drawn: its colour, and what tells it apart where colours are lost."""

    colour: str
    dashes: str | tuple[int, tuple[int, ...]]
    marker: str
    hatch: str

    def line(self, **more: Any) -> dict[str, Any]:
        own = {"color": self.colour, "linestyle": self.dashes, "marker": self.marker, "linewidth": 2, "markersize": 7}
        return {**own, **more}

    def bar(self) -> dict[str, Any]:
        return {"color": self.colour, "hatch": self.hatch, "edgecolor": "white"}


# Neighbours differ in lightness by a third of the scale, so that they are told apart in greyscale too.
STYLES = (
    Style("#000000", "-", "o", ""),
    Style("#e69f00", "--", "s", ""),
    Style("#0060a8", "-.", "^", "//"),
    Style("#8cc6ec", ":", "D", ""),
    Style("#7b3294", (0, (5, 1)), "v", "\\\\"),
    Style("#999999", (0, (3, 1, 1, 1)), "P", ".."),
)


def new_figure(columns: int = 1, width: float = 7.0, height: float = 5.5, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of panels side by side, each `width` by `height` inches; `options` are those of `Figure.subplots`."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update(SETTINGS)
    figure = Figure(figsize=(width * columns, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, **options)
    return figure, list(axes[0])


def save(figure: Figure, path: Path) -> None:
    """Writes the figure as PNG, with its mark, atomically."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    with Image.open(buffer) as rendered, atomic_path(path) as temporary:
        # 256 colours are plenty for lines and bars, and make the file several times smaller.
        image = rendered.convert("RGB").quantize(256)
        mark = PngInfo()
        mark.add_text(MARK, _digest(figure, image))
        image.save(temporary, format="png", pnginfo=mark, optimize=True)


def publish(
    name: str,
    result: dict[str, Any],
    arguments: argparse.Namespace,
    draw: Callable[[dict[str, Any]], Figure],
    render: Callable[[dict[str, Any]], str],
) -> None:
    """The end of an experiment: its result as a file and as a picture, where `add_outputs` says, and as text."""
    path = json_path(arguments, name)
    write_json(path, result)
    save(draw(result), arguments.png)
    print(f"\n{render(result)}\n\nWritten: {path}, {arguments.png}")


def is_current(figure: Figure, path: Path) -> bool:
    """Is there a picture at `path` that shows what `figure` does, as `save` wrote it?"""
    from PIL import Image, PngImagePlugin

    if not path.exists():
        return False
    with Image.open(path) as image:
        if not isinstance(image, PngImagePlugin.PngImageFile):
            return False
        return image.text.get(MARK) == _digest(figure, image)


def _digest(figure: Figure, image: Image) -> str:
    digest = hashlib.sha256(json.dumps(contents(figure)).encode())
    digest.update(repr(image.size).encode() + image.convert("RGB").tobytes())
    return digest.hexdigest()


def contents(figure: Figure) -> list[dict[str, Any]]:
    """All that the figure tells: per panel its words, and the numbers that its lines, bars and areas stand for.

    Numbers have six digits, more than any picture shows, so that another machine's last bit is no difference.
    """
    return [_panel(axis) for axis in figure.axes]


def _panel(panel: Axes) -> dict[str, Any]:
    from matplotlib.patches import Rectangle

    legend = panel.get_legend()
    bars = [patch for patch in panel.patches if isinstance(patch, Rectangle)]
    return {
        "title": panel.get_title(),
        "x": [panel.get_xlabel(), panel.get_xscale(), *_given_ticks(panel.xaxis)],
        "y": [panel.get_ylabel(), panel.get_yscale(), *_given_ticks(panel.yaxis)],
        "lines": [[line.get_label(), _digits(line.get_xydata())] for line in panel.get_lines()],
        "bars": [_digits(bar.get_bbox().get_points()) for bar in bars],
        "areas": [_digits(path.vertices) for area in panel.collections for path in area.get_paths()],
        "texts": [[text.get_text(), _digits([text.get_position()])] for text in panel.texts],
        "legend": [text.get_text() for text in legend.get_texts()] if legend else [],
    }


def _given_ticks(axis: Any) -> list[str]:
    """The labels of ticks that the script placed; matplotlib chooses the others, from the size of the text."""
    from matplotlib.category import StrCategoryLocator
    from matplotlib.ticker import FixedLocator

    given = isinstance(axis.get_major_locator(), (FixedLocator, StrCategoryLocator))
    return [label.get_text() for label in axis.get_ticklabels()] if given else []


def _digits(points: Any) -> list[str]:
    return [f"{x:.6g} {y:.6g}" for x, y in points]
