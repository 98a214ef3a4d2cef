"""Times one optimizer step: torch.optim.AdamW, optim8 and the peers that are installed, in turn, in one process.

Every ratio is to torch's fused AdamW in the same rounds. The bytes are the least that a step must move: parameters and
state read and written, gradients read.
"""

import argparse
import gc
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch
from shared.common import add_json, json_path, provenance, table, time_interleaved, write_json
from shared.subjects import (
    REFERENCE,
    Case,
    Make,
    cases,
    least_traffic,
    make_parameters,
    namesake_subjects,
    optim8_subjects,
    peer_subjects,
    peer_versions,
    torch_subjects,
    weight_subjects,
)

ISAS = ("scalar", "avx2", "avx512bw", "avx512", "neon")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    every = torch.get_num_threads()
    parser.add_argument("--quick", action="store_true", help="small tensors: shows that it runs, says nothing of speed")
    parser.add_argument("--repeats", type=int, default=15, help="rounds; fewer for a subject that is very slow")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="of parameters and gradients")
    parser.add_argument("--threads", default=",".join(map(str, sorted({1, every}))), help="numbers of threads")
    parser.add_argument("--no-peers", action="store_true", help="leave bitsandbytes and torchao out")
    parser.add_argument("--namesakes", action="store_true", help="measure each class of torch.optim in every form too")
    parser.add_argument("--isa", choices=ISAS, help="force optim8's instruction set (a child process does the work)")
    add_json(parser, "bench_step")
    return parser.parse_args(argv)


def measure(case: Case, dtype: torch.dtype, threads: int, subjects: dict[str, Make], repeats: int) -> dict[str, Any]:
    """Times the subjects on the same parameters; gives `timings`, a row each, and `failed`: who could not run."""
    torch.set_num_threads(threads)
    parameters = make_parameters(case, dtype)
    steps, failed, rows = {}, {}, []
    for name, make in subjects.items():
        optimizer = make(parameters)
        try:
            optimizer.step()
        except Exception as error:
            if name.startswith(("torch ", "optim8 ")):
                raise
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"  # a peer that fails is a finding
        else:
            steps[name] = optimizer
    timings = time_interleaved({name: optimizer.step for name, optimizer in steps.items()}, repeats)
    for name, timing in timings.items():
        traffic = least_traffic(parameters, steps[name])
        seconds = timing["median_ms"] / 1e3
        rows.append(
            {
                "case": case.name,
                "dtype": str(dtype).removeprefix("torch."),
                "threads": threads,
                "subject": name,
                "tensors": len(parameters),
                "parameters": case.parameters,
                "bytes_per_parameter": traffic / case.parameters,
                **timing,
                "bytes_per_second": traffic / seconds,
                "parameters_per_second": case.parameters / seconds,
                "speed_ratio": timings[REFERENCE]["median_ms"] / timing["median_ms"],
            }
        )
    return {"timings": rows, "failed": failed}


def rows_table(rows: Sequence[dict[str, Any]]) -> str:
    return table(
        ["optimizer", "ms", "quartiles", "repeats", "G parameters/s", "bytes/parameter", "GB/s", "times torch fused"],
        [
            [
                row["subject"],
                f"{row['median_ms']:.2f}",
                f"{row['lower_quartile_ms']:.2f} to {row['upper_quartile_ms']:.2f}",
                row["repeats"],
                f"{row['parameters_per_second'] / 1e9:.3f}",
                f"{row['bytes_per_parameter']:.2f}",
                f"{row['bytes_per_second'] / 1e9:.1f}",
                f"{row['speed_ratio']:.2f}",
            ]
            for row in rows
        ],
    )


def benchmark(arguments: argparse.Namespace) -> None:
    import optim8._native

    result: dict[str, Any] = {
        **provenance(vars(arguments)),
        "isa": optim8._native.cpu().isa_info()["used"],
        "peers": {} if arguments.no_peers else peer_versions(),
        "timings": [],
        "failed": {},
    }
    peers = {} if arguments.no_peers else peer_subjects()
    for dtype in arguments.dtypes.split(","):
        for threads in map(int, arguments.threads.split(",")):
            for case in cases(arguments.quick):
                subjects = {**torch_subjects(), **optim8_subjects(case.small), **peers}
                if arguments.namesakes:
                    subjects |= namesake_subjects()
                if dtype != "float32":
                    subjects |= weight_subjects()
                found = measure(case, getattr(torch, dtype), threads, subjects, arguments.repeats)
                result["timings"] += found["timings"]
                result["failed"].update(found["failed"])
                gc.collect()
                print(f"\n{case.name}, {dtype}, {threads} thread{'s'[: threads > 1]}\n", flush=True)
                print(rows_table(found["timings"]), flush=True)
    for name, reason in result["failed"].items():
        print(f"{name} could not run: {reason}")
    path = json_path(arguments, f"bench_step-{arguments.isa}" if arguments.isa else "bench_step")
    write_json(path, result)
    print(f"\noptim8 used {result['isa']}. Written: {path}")


def main() -> int:
    arguments = parse_arguments(sys.argv[1:])
    if arguments.isa and os.environ.get("OPTIM8_CPU_ISA") != arguments.isa:
        environment = {**os.environ, "OPTIM8_CPU_ISA": arguments.isa}
        return subprocess.run([sys.executable, __file__, *sys.argv[1:]], env=environment, check=False).returncode
    benchmark(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
