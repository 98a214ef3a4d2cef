"""How much of a step of Muon8bit are its matrix products? `python experiments/muon_share.py`.

A transformer's matrices take the Newton-Schulz iteration, its other parameters AdamW. torch's profiler tells the time
of the products, with that of copying what they are added to, from the time of the step.
"""

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from shared.common import add_json, json_path, origin, provenance, spread, table, write_json
from shared.subjects import cases, make_parameters
from torch.profiler import ProfilerActivity, profile

import optim8

PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm")


def seconds_of_products(optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """Of a step: all of it, and its matrix products."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        start = time.perf_counter()
        optimizer.step()
        whole = time.perf_counter() - start
    products = sum(event.cpu_time_total for event in profiled.key_averages() if event.key in PRODUCTS)
    return whole, products / 1e6


def measure(dtype: torch.dtype, quick: bool, repeats: int) -> dict[str, Any]:
    transformer = cases(quick)[1]
    params = make_parameters(transformer, dtype)
    matrices = [param for param in params[1:] if param.ndim == 2]  # the first is the vocabulary's
    others = [param for param in params if all(param is not matrix for matrix in matrices)]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "use_muon": False}]
    optimizer = optim8.Muon8bit(groups)
    optimizer.step()
    timed = [seconds_of_products(optimizer) for _ in range(repeats)]
    return {
        "case": transformer.name,
        "dtype": str(dtype).removeprefix("torch."),
        "in_matrices": sum(matrix.numel() for matrix in matrices),
        "parameters": transformer.parameters,
        "step": spread([whole for whole, _ in timed]),
        "products": spread([products for _, products in timed]),
        "share_outside": statistics.median(1 - products / whole for whole, products in timed),
    }


def render(result: Mapping[str, Any]) -> str:
    heads = ["parameters", "in matrices", "step", "matrix products", "outside them"]
    cells = [
        [
            f"{row['case']}, {row['dtype']}",
            f"{row['in_matrices'] / row['parameters']:.0%}",
            f"{row['step']['median_ms']:.0f} ms",
            f"{row['products']['median_ms']:.0f} ms",
            f"{row['share_outside']:.1%}",
        ]
        for row in result["shares"]
    ]
    return f"{table(heads, cells)}\n\n{result['threads']} threads. {origin(result)}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="in small: shows that it runs, its figures say nothing")
    parser.add_argument("--repeats", type=int, default=9, help="steps")
    add_json(parser, "muon_share")
    arguments = parser.parse_args(argv)
    rows = [measure(dtype, arguments.quick, arguments.repeats) for dtype in (torch.float32, torch.bfloat16)]
    path = json_path(arguments, "muon_share")
    result = {**provenance(vars(arguments)), "threads": torch.get_num_threads(), "shares": rows}
    write_json(path, result)
    print(f"{render(result)}\n\nWritten: {path}")


if __name__ == "__main__":
    main()
