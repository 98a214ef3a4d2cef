"""Stands for `bitsandbytes.functional.lib`, the shared library whose C functions other packages call by name."""

from __future__ import annotations

from typing import NoReturn


def __getattr__(name: str) -> NoReturn:
    raise AttributeError(
        f"functional.lib: {name!r} is a C function of bitsandbytes' shared library, and optim8 has none: its kernels "
        "take tensors. Call the function of optim8.functional that does the same, such as dequantize_4bit; for a "
        "package that calls the library itself, such as unsloth or axolotl, install bitsandbytes and leave it its name."
    )
