"""`python -m optim8 run`: a program as it is, with optim8 where its framework chooses an optimizer by a name."""

from __future__ import annotations

import argparse
import runpy
import sys
import zipfile
from pathlib import Path

from optim8.integrations import bitsandbytes, nemo, ranks, timm, transformers

STAND_INS = {bitsandbytes.NAME: bitsandbytes.install}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command, but for those of the program, which `split` takes away."""
    parser.add_argument(
        "--as", dest="stand_in", choices=sorted(STAND_INS), help="let optim8 stand in for this package too"
    )
    parser.add_argument("-m", dest="is_module", action="store_true", help="PROGRAM is the name of a module")
    parser.add_argument("program", metavar="PROGRAM", help="a script, or a folder or zip file with a __main__.py")


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Part a command line, from "run" on, behind the program. argparse would take the program's "--" and "-h" away."""
    at = 1
    while at < len(arguments) and arguments[at].startswith("-"):
        at += 2 if arguments[at] == "--as" else 1
    return arguments[: at + 1], arguments[at + 1 :]


def run(parsed: argparse.Namespace, arguments: list[str]) -> int:
    """Install the shims and run the program in this process, as `python PROGRAM ...` or `python -m PROGRAM ...` would.

    sys.argv, sys.path[0] and __main__ are the program's; environment variables stay as they are. Forked processes have
    the shims too; what the program starts as a new Python process (spawn) does not.

    Returns:
        0 when the program comes to its end; its SystemExit and its errors pass through. 2 where there is no program.
    """
    path = Path(parsed.program).absolute()
    if not parsed.is_module and not path.exists():
        print(
            f"python -m optim8 run: there is no {parsed.program}. Name a file, or a module after -m.", file=sys.stderr
        )
        return 2
    for shim in (transformers, timm, nemo):
        shim.install()
    ranks.install([] if parsed.stand_in is None else ["--as", parsed.stand_in])
    if parsed.stand_in is not None:
        STAND_INS[parsed.stand_in]()
    sys.argv[:] = [parsed.program, *arguments]
    if parsed.is_module:  # sys.path[0] is the working directory already, for optim8 is run with -m too
        runpy.run_module(parsed.program, run_name="__main__", alter_sys=True)
        return 0
    if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):  # else Python puts nothing there
        if path.is_dir() or zipfile.is_zipfile(path):
            del sys.path[0]  # runpy puts the program there
        else:
            sys.path[0] = str(path.resolve().parent)
    runpy.run_path(str(path), run_name="__main__")
    return 0
