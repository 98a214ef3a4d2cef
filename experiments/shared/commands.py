"""Commands run within a limit: their output passed through as it comes, all of their processes ended at the limit."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from shared.common import ROOT

FINISHED, ENDED, NOT_STARTED = "finished", "ended at the limit", "not started"
_LOOK_SECONDS = 0.05  # between two looks at what runs


class Deadline:
    """A moment that several commands share."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds until then, at least 0."""
        return max(0.0, self._end - time.monotonic())


@dataclass
class Command:
    """A program with its arguments; `seconds`: a limit of its own beside the deadline."""

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    seconds: float = float("inf")


@dataclass
class Outcome:
    """How a command ended. `returncode` is None unless it finished."""

    state: str
    returncode: int | None = None
    seconds: float = 0.0
    lines: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.returncode == 0


class _Running:
    def __init__(self, command: Command, prefix: str) -> None:
        self.start = time.monotonic()
        self.lines: list[str] = []
        print(f"{prefix}$ {' '.join(command.arguments)}", flush=True)
        # In a session of its own: a signal to its group reaches the processes that it starts, too.
        self.process = subprocess.Popen(
            command.arguments,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **command.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, args=(prefix,), daemon=True)
        self._reader.start()

    def _read(self, prefix: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            print(prefix + self.lines[-1], flush=True)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def outcome(self, state: str) -> Outcome:
        """After its end. A process that it left behind is ended, so that the output ends too."""
        seconds = time.monotonic() - self.start
        self._reader.join(1)
        self.kill()
        self._reader.join(1)
        return Outcome(state, self.process.returncode if state == FINISHED else None, seconds, list(self.lines))


def run_all(
    commands: Sequence[Command],
    deadline: Deadline,
    at_once: int = 1,
    done: Callable[[str, Outcome], None] = lambda name, outcome: None,
    heard: Callable[[str, Sequence[str]], None] = lambda name, lines: None,
) -> dict[str, Outcome]:
    """Run the commands in their order in the project's root, `at_once` at a time.

    At the deadline it ends what still runs and starts nothing more. It calls `heard` with the lines that a command has
    printed since, and `done` with each command that ends. An interrupt ends all commands.
    """
    waiting, running = list(commands), dict[str, tuple[Command, _Running]]()
    outcomes: dict[str, Outcome] = {}
    told: dict[str, int] = {}

    def tell(name: str, lines: Sequence[str]) -> None:
        fresh = list(lines[told.get(name, 0) :])
        told[name] = told.get(name, 0) + len(fresh)
        if fresh:
            heard(name, fresh)

    def finish(name: str, outcome: Outcome) -> None:
        outcomes[name] = outcome
        tell(name, outcome.lines)
        done(name, outcome)

    try:
        while waiting or running:
            while waiting and len(running) < at_once and deadline.left() > 0:
                command = waiting.pop(0)
                running[command.name] = (command, _Running(command, f"{command.name}| " if at_once > 1 else ""))
            for name, (command, process) in list(running.items()):
                tell(name, process.lines)
                late = deadline.left() <= 0 or time.monotonic() - process.start > command.seconds
                if process.process.poll() is None and late:
                    process.kill()
                    print(f"{name}: {ENDED}", flush=True)
                    del running[name]
                    finish(name, process.outcome(ENDED))
                elif process.process.poll() is not None:
                    del running[name]
                    finish(name, process.outcome(FINISHED))
            if deadline.left() <= 0:
                for command in waiting:
                    finish(command.name, Outcome(NOT_STARTED))
                waiting.clear()
            if running:
                time.sleep(_LOOK_SECONDS)
    finally:
        for _, process in running.values():
            process.kill()
    return outcomes
