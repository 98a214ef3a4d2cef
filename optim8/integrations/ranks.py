"""Lightning starts the program anew for each further rank: a program that optim8 runs is started by optim8 there too.

Otherwise one rank would train with optim8, and the others with another library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from optim8.integrations.hooks import after_import
from optim8.integrations.notice import say

_PACKAGES = ("lightning_fabric", "lightning.fabric")


def install(options: Sequence[str]) -> None:
    """Have Lightning start further ranks as `python -m optim8 run` with these options, now or when it is imported."""
    for package in _PACKAGES:
        after_import(f"{package}.strategies.launchers.subprocess_script", partial(_patch, list(options)))


def _patch(options: list[str], module: Any) -> None:
    basic = getattr(module, "_basic_subprocess_cmd", None)
    hydra = getattr(module, "_hydra_subprocess_cmd", None)
    if basic is None or hydra is None:
        say("this version of Lightning starts further ranks without optim8. Start them with torchrun -m optim8 run.")
        return
    module._basic_subprocess_cmd = lambda: _by_optim8(basic(), options)
    module._hydra_subprocess_cmd = _of_hydra(hydra, options)


def _of_hydra(own: Callable[..., tuple[Sequence[str], str]], options: list[str]) -> Callable[..., Any]:
    def command_and_folder(*args: Any, **kwargs: Any) -> tuple[list[str], str]:
        command, folder = own(*args, **kwargs)
        return _by_optim8(command, options), folder

    return command_and_folder


def _by_optim8(command: Sequence[str], options: list[str]) -> list[str]:
    """`python program ...` as `python -m optim8 run program ...`."""
    return [command[0], "-m", "optim8", "run", *options, *command[1:]]
