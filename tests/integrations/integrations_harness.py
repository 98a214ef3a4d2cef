"""What the tests of shims share: programs that say what they see, and a process in which they run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from support.processes import child_environment

# Says what a program can see of the way in which it was started.
REPORT = """
import json, os, sys
main = sys.modules["__main__"]
print(json.dumps({
    "argv": sys.argv,
    "path": sys.path[0],
    "name": __name__,
    "main": main.__dict__ is globals(),
    "file": __file__,
    "spec": __spec__ and __spec__.name,
    "environment": sorted(os.environ),
}))
"""


def python(*arguments: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python in `folder`, with what this process can import."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=child_environment(**variables),
        capture_output=True,
        text=True,
        timeout=300,
    )


def last_json(completed: subprocess.CompletedProcess[str]) -> Any:
    """What the program printed last."""
    assert completed.returncode == 0, completed.stderr
    return json.loads(completed.stdout.splitlines()[-1])
