"""The clocks of a GPU while something runs, as nvidia-smi tells them."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import threading
from typing import Any

FIELDS = {"sm_mhz": "clocks.sm", "memory_mhz": "clocks.mem", "watts": "power.draw", "celsius": "temperature.gpu"}
EVERY_MS = 500


class Watch:
    """Asks for them twice a second within a `with`; without nvidia-smi it finds nothing."""

    def __init__(self) -> None:
        self._samples: list[list[float]] = []
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Watch:
        asked = ["--query-gpu=" + ",".join(FIELDS.values()), "--format=csv,noheader,nounits"]
        with contextlib.suppress(OSError):
            self._process = subprocess.Popen(
                ["nvidia-smi", "--id=0", *asked, f"--loop-ms={EVERY_MS}"],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            threading.Thread(target=self._read, args=(self._process,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with contextlib.suppress(ValueError):  # a field that this GPU does not tell
                sample = [float(cell) for cell in line.split(",")]
                if len(sample) == len(FIELDS):
                    self._samples.append(sample)

    def summary(self) -> dict[str, Any] | None:
        """Least, median and largest of each, or None where nothing was told."""
        samples = list(self._samples)
        if not samples:
            return None
        columns = dict(zip(FIELDS, zip(*samples, strict=True), strict=True))
        return {
            "samples": len(samples),
            **{name: [min(told), statistics.median(told), max(told)] for name, told in columns.items()},
        }
