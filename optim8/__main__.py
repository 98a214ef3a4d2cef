"""`python -m optim8`: what is installed, what of it runs on this machine, and what to do about what is missing; and
`python -m optim8 plan`: the memory that a training needs; `python -m optim8 run`: a program, with optim8's optimizers
under the names of others."""

from __future__ import annotations

import argparse
import platform
import sys

import torch

from optim8 import __version__, _native
from optim8.integrations import launcher
from optim8.memory import command

ROW = "{:<14}{}"


def describe_cpu() -> tuple[str, str | None]:
    """One line on optim8._cpu, and what to do where it is missing or refuses to work."""
    try:
        isa = _native.cpu().isa_info()
    except (ImportError, RuntimeError, ValueError) as error:
        return "not usable", str(error)
    parts = [f"{title} {' '.join(isa[key])}" for title, key in (("compiled", "compiled"), ("runs here", "available"))]
    return f"built; {'; '.join(parts)}; used {isa['used']}", None


def cuda_version(number: int) -> str:
    """A version as CUDA counts it, 1000 * major + 10 * minor."""
    return f"{number // 1000}.{number % 1000 // 10}"


def describe_cuda() -> tuple[str, str | None]:
    """One line on optim8._cuda, and what to do where torch sees a GPU and the module does not run there."""
    module = _native.cuda_or_none()
    if module is None and not torch.cuda.is_available():
        return "not built; nothing here needs it (to have it all the same, install with OPTIM8_CUDA=1)", None
    try:
        module = _native.module_for(torch.device("cuda"), "optim8._cuda")
        built = f"built by CUDA {cuda_version(module.toolkit)} for {module.architectures.replace(';', ' ')}"
        if not torch.cuda.is_available():
            return f"{built}; not tried, as torch sees no GPU", None
        found = [module.probe(index) for index in range(torch.cuda.device_count())]
    except (ImportError, RuntimeError) as error:
        return "not usable", str(error)
    kernels = {
        f"sm_{each['binary']}" + ("" if each["binary"] == each["ptx"] else f" from PTX {each['ptx']}") for each in found
    }
    return (
        f"{built}; runs here as {', '.join(sorted(kernels))}; driver for CUDA {cuda_version(found[0]['driver'])}",
        None,
    )


def describe_gpu() -> tuple[str, str | None]:
    """One line on the GPUs that torch sees."""
    if torch.version.cuda is None:
        return "none (this torch is built without CUDA)", None
    if not torch.cuda.is_available():
        return f"none (torch is built for CUDA {torch.version.cuda}, but sees no GPU)", None
    names = [
        f"{torch.cuda.get_device_name(index)} (sm_{''.join(map(str, torch.cuda.get_device_capability(index)))})"
        for index in range(torch.cuda.device_count())
    ]
    return f"{', '.join(names)}; CUDA {torch.version.cuda}", None


def show_info() -> int:
    """Print the report. Returns 0, or 1 where the CPU module cannot be used."""
    rows = {"optim8._cpu": describe_cpu(), "optim8._cuda": describe_cuda(), "GPU": describe_gpu()}
    print(ROW.format("optim8", __version__))
    print(ROW.format("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"))
    print(ROW.format("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"))
    for name, (line, _) in rows.items():
        print(ROW.format(name, line))
    for name, (_, remedy) in rows.items():
        if remedy:
            print(f"\nTo do for {name}: {remedy}")
    return 0 if rows["optim8._cpu"][1] is None else 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m optim8", description=__doc__)
    parser.add_argument("--version", action="version", version=f"optim8 {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("info", help="what is installed and what runs here (the default)")
    command.add_arguments(
        commands.add_parser(
            "plan", help="the memory that a training needs", description=command.__doc__, epilog=command.EXIT
        )
    )
    launcher.add_arguments(
        commands.add_parser("run", help="a program, with optim8's optimizers", description=launcher.__doc__)
    )
    arguments = sys.argv[1:] if arguments is None else arguments
    of_program: list[str] = []
    if arguments[:1] == ["run"]:
        arguments, of_program = launcher.split(arguments)
    parsed = parser.parse_args(arguments)
    if parsed.command == "run":
        return launcher.run(parsed, of_program)
    return command.run(parsed) if parsed.command == "plan" else show_info()


if __name__ == "__main__":
    sys.exit(main())
