"""optim8 in the place of bitsandbytes for a while, in the process of the tests."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from optim8.integrations import bitsandbytes

# A package of that name which is not bitsandbytes, so that no test waits for bitsandbytes to load.
SOURCES = {
    "bitsandbytes/__init__.py": "from bitsandbytes import functional, nn, optim\n__version__ = '9.9'\nbeside = 1\n",
    "bitsandbytes/functional.py": "def quantize_blockwise(): ...\ndef gone(): ...\n",
    "bitsandbytes/nn/__init__.py": "from bitsandbytes.nn.modules import Linear4bit, StableEmbedding\n",
    "bitsandbytes/nn/modules.py": (
        "import bitsandbytes as bnb\nimport bitsandbytes.functional as F\n"
        "class StableEmbedding: ...\n"
        "class Linear4bit:\n"
        "    def quantize(self): return bnb.functional.quantize_blockwise, F.quantize_blockwise\n"
    ),
    "bitsandbytes/optim.py": "class AdamW8bit: ...\n",
    "bitsandbytes/cextension.py": "lib = 'theirs'\n",
    "bitsandbytes-9.9.dist-info/METADATA": "Metadata-Version: 2.1\nName: bitsandbytes\nVersion: 9.9\n",
}


def write_package(folder: Path) -> Path:
    """Write a small package called bitsandbytes. Returns the folder."""
    for name, text in SOURCES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@contextlib.contextmanager
def stand_in(folder: Path | None = None) -> Iterator[None]:
    """Install the stand-in: over the package in `folder`, or as where bitsandbytes is not installed."""
    modules = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "bitsandbytes"}
    path = list(sys.path)
    if folder is not None:
        sys.path.insert(0, str(folder))
    bitsandbytes.install()
    if folder is None:
        bitsandbytes._finder.installed_version = None
    try:
        yield
    finally:
        bitsandbytes.remove()
        sys.path[:] = path
        for name in list(sys.modules):
            if name.partition(".")[0] == "bitsandbytes":
                del sys.modules[name]
        sys.modules.update(modules)
