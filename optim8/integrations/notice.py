"""What a shim has to say to the user of a program that somebody else wrote."""

from __future__ import annotations

import os
import sys

_said: set[str] = set()


def say(text: str) -> None:
    """Print `text` to stderr, once in the process, and only in the first process of a machine (LOCAL_RANK 0)."""
    if text in _said:
        return
    _said.add(text)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"optim8: {text}", file=sys.stderr, flush=True)
