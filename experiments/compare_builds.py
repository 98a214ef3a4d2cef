"""Compares the step of two builds of optim8, in turn, in one run: `python experiments/compare_builds.py BEFORE`.

BEFORE is a source tree with its compiled module, such as an older commit after `python setup.py build_ext --inplace`.
Each build runs in a process of its own, and then in another; one waits while the other steps. A ratio above 1 says
that the optim8 of this environment is faster. With --before-isa and --isa the two may have instruction sets that
differ, and BEFORE may then be this source tree.
"""

import argparse
import contextlib
import itertools
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shared.common import add_json, json_path, provenance, spread, table, write_json

import optim8

FIRST = "first step"


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="source tree of the older build")
    parser.add_argument("--quick", action="store_true", help="small tensors: shows that it runs, says nothing of speed")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of parameters")
    parser.add_argument("--rounding", default="dithered", choices=["dithered", "nearest"], help="if a build has it")
    parser.add_argument(
        "--processes", type=int, default=4, help="of each build, one after another: memory lies otherwise"
    )
    parser.add_argument("--repeats", type=int, default=9, help="rounds of a process")
    parser.add_argument("--before-isa", help="instruction set of the older build, as OPTIM8_CPU_ISA names it")
    parser.add_argument("--isa", help="instruction set of the build of this environment")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    add_json(parser, "compare_builds")
    return parser.parse_args(argv)


def work(quick: bool, dtype: str, rounding: str) -> None:
    """Answers "case optimizer threads" with seconds of one step; of an optimizer's first with FIRST as the case."""
    import torch
    from shared.subjects import cases, make_parameters, optim8_subjects

    known = {case.name: case for case in cases(quick)}
    name = ""
    parameters: list[torch.nn.Parameter] = []
    made: dict[str, torch.optim.Optimizer] = {}
    for line in sys.stdin:
        of_case, subject, threads, first = line.rstrip("\n").split("\t")
        torch.set_num_threads(int(threads))
        if of_case != name:
            made.clear()
            name, parameters = of_case, make_parameters(known[of_case], getattr(torch, dtype))
        make = optim8_subjects(known[of_case].small)[subject]
        optimizer = make(parameters) if first or subject not in made else made[subject]
        for group in optimizer.param_groups:
            if "rounding" in group:
                group["rounding"] = rounding
        if not first and subject not in made:
            optimizer.step()
            made[subject] = optimizer
        start = time.perf_counter()
        optimizer.step()
        print(time.perf_counter() - start, flush=True)


class Build:
    """A process that steps with the build of a source tree."""

    def __init__(self, root: Path, isa: str | None, options: list[str]) -> None:
        # Threads that spin while they wait would take the processor from the other build.
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_WAIT_POLICY": "passive"}
        if isa is not None:
            environment["OPTIM8_CPU_ISA"] = isa
        command = [sys.executable, __file__, str(root), "--worker", *options]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, bufsize=1
        )

    def seconds(self, *what: str) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\t".join(what) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the build of {self.process.args[2]!r} ended; its message is above")  # type: ignore[index]
        return float(answer)


@contextlib.contextmanager
def builds(roots: dict[str, Path], isas: dict[str, str | None], options: list[str]) -> Iterator[dict[str, Build]]:
    running = {name: Build(root, isas[name], options) for name, root in roots.items()}
    try:
        yield running
    finally:
        for build in running.values():
            build.process.terminate()


def commit_of(root: Path) -> str:
    """The commit of a source tree, or of the archive that it was made from; "" where nobody knows."""
    done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    named = root / "COMMIT"
    return done.stdout.strip() or (named.read_text().strip() if named.exists() else "")


def subjects(quick: bool) -> Iterator[tuple[str, str, str]]:
    """Case, optimizer, and whether it is the first step."""
    from shared.subjects import cases

    for case in cases(quick):
        yield case.name, "optim8 AdamW8bit", ""
        yield case.name, "optim8 Lion8bit", ""
        if case.small:
            yield case.name, "optim8 AdamW8bit min_8bit_size=0", ""
            yield case.name, "optim8 AdamW8bit", FIRST


def main() -> int:
    arguments = parse_arguments(sys.argv[1:])
    if arguments.worker:
        work(arguments.quick, arguments.dtype, arguments.rounding)
        return 0
    rows: list[dict[str, Any]] = []
    roots = {"before": arguments.before.resolve(), "after": Path(optim8.__file__).resolve().parents[1]}
    for root in roots.values():
        if not list((root / "optim8").glob("_cpu*")):
            sys.exit(f"compare_builds: there is no optim8 with a compiled module in {root}. Build it there first.")
    isas = {"before": arguments.before_isa, "after": arguments.isa}
    every = len(os.sched_getaffinity(0))
    options = ["--dtype", arguments.dtype, "--rounding", arguments.rounding, *(["--quick"] if arguments.quick else [])]
    seconds: dict[tuple[str, str, str, int], dict[str, list[float]]] = {}
    for _ in range(arguments.processes):
        with builds(roots, isas, options) as running:
            for (case, subject, first), threads in itertools.product(
                list(subjects(arguments.quick)), sorted({1, every})
            ):
                taken = seconds.setdefault((case, subject, first, threads), {name: [] for name in running})
                for turn in range(arguments.repeats + 1):
                    for name in random.sample(list(running), len(running)):  # which comes first is no advantage
                        time_of_step = running[name].seconds(case, subject, str(threads), first)
                        if turn:
                            taken[name].append(time_of_step)
    for (case, subject, first, threads), taken in seconds.items():
        ratios = sorted(b / a for b, a in zip(taken["before"], taken["after"], strict=True))
        times = {name: spread(values) for name, values in taken.items()}
        row = {
            "case": case,
            "subject": subject + (f", {first}" if first else ""),
            "threads": threads,
            **times,
            "ratio": times["before"]["median_ms"] / times["after"]["median_ms"],
            "ratio_quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
        }
        rows.append(row)
    cells = [
        [
            f"{row['case']}, {row['subject']}",
            row["threads"],
            f"{row['before']['median_ms']:.2f}",
            f"{row['after']['median_ms']:.2f}",
            f"{row['ratio']:.3f}",
            "{:.3f} to {:.3f}".format(*row["ratio_quartiles"]),
        ]
        for row in rows
    ]
    print("\n" + table(["step", "threads", "ms before", "ms after", "times as fast", "quartiles"], cells))
    path = json_path(arguments, "compare_builds")
    about = provenance({name: value for name, value in vars(arguments).items() if name != "before"})
    write_json(path, {**about, "before": commit_of(roots["before"]), "timings": rows})
    print(f"\nWritten: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
