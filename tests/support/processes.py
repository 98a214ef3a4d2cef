"""What tests share that start Python in a process of its own."""

from __future__ import annotations

import os
import sys


def child_environment(**variables: str) -> dict[str, str]:
    """The environment of a process that imports what this one can, with these variables on top."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables}
