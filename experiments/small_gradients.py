"""What becomes of small gradients: the update that an optimizer makes, over the exact one, for scales 1e-3 to 1e-12.

Every optimizer takes the same steps with the same random gradients; the exact update is torch's AdamW in float64. The
parameters are set to 0 before each step, so that they then hold that step's update and nothing is lost in a sum.
Adam's update does not depend on the scale of the gradients as long as `eps` is small beside them: a ratio other than 1
is an error of the state. `eps` is 1e-15, where it cannot hide the state's underflow, and 1e-8, torch's default.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from shared.common import add_outputs, not_measured, origin, provenance, table
from shared.plotting import STYLES, new_figure, publish
from shared.subjects import Make, missing_peers, peer_subjects, peer_versions, with_version
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Name of a case, `eps`, and over how many decades the gradients' elements are spread (each keeps its own magnitude).
CASES = (
    ("gradients alike, eps 1e-15", 1e-15, 0.0),
    ("over 3 decades, eps 1e-15", 1e-15, 3.0),
    ("gradients alike, eps 1e-8", 1e-8, 0.0),
)
SUBJECTS = ("torch AdamW", "optim8 AdamW8bit", "bitsandbytes AdamW8bit", "torchao AdamW8bit")
SHAPE = (256, 256)
LR = 1.0  # the update is then the ratio of the moments itself

Result = Mapping[str, Any]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_outputs(parser, "small_gradients")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-peers", action="store_true", help="leave bitsandbytes and torchao out")
    arguments = parser.parse_args(argv)
    if arguments.steps < 1:
        parser.error(f"--steps: must be at least 1, got {arguments.steps}")
    return arguments


def last_update(make: Make, dtype: torch.dtype, gradients: Sequence[Tensor], eps: float) -> Tensor:
    """The update of the last step, float64, positive where the parameter falls."""
    parameter = torch.nn.Parameter(torch.zeros(gradients[0].shape, dtype=dtype))
    optimizer = make([parameter], lr=LR, eps=eps, weight_decay=0.0)
    for gradient in gradients:
        with torch.no_grad():
            parameter.zero_()
        parameter.grad = gradient.to(dtype)
        optimizer.step()
    return -parameter.detach().double()


def make_gradients(scale: float, decades: float, steps: int, seed: int) -> list[Tensor]:
    """Float32 gradients of standard deviation `scale` for the largest elements, and `decades` less for the smallest."""
    generator = torch.Generator().manual_seed(seed)
    magnitudes = scale * 10 ** (-decades * torch.rand(SHAPE, generator=generator, dtype=torch.float64))
    return [(torch.randn(SHAPE, generator=generator, dtype=torch.float64) * magnitudes).float() for _ in range(steps)]


def compare(actual: Tensor, exact: Tensor) -> dict[str, Any]:
    """How `actual` relates to `exact`: ratio of their norms, and quantiles of the ratio of their elements."""
    finite = actual.isfinite()
    if not finite.all():
        return {"norm_ratio": None, "lower": None, "median": None, "upper": None, "not_finite": int((~finite).sum())}
    ratios = (actual / exact)[exact != 0]
    lower, median, upper = ratios.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
    norm_ratio = (actual.norm() / exact.norm()).item()
    return {"norm_ratio": norm_ratio, "lower": lower, "median": median, "upper": upper, "not_finite": 0}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    import optim8

    subjects: dict[str, Make] = {
        "torch AdamW": torch.optim.AdamW,
        "optim8 AdamW8bit": optim8.AdamW8bit,
        **({} if arguments.no_peers else peer_subjects()),
    }
    exponents = (3, 12) if arguments.quick else range(3, 13)
    points = [(case, exponent) for case in CASES for exponent in exponents]
    rows: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for (name, eps, decades), exponent in tqdm(points, desc="small gradients", unit="scale"):
        scale = 10.0**-exponent
        gradients = make_gradients(scale, decades, arguments.steps, arguments.seed)
        exact = last_update(torch.optim.AdamW, torch.float64, gradients, eps)
        for subject, make in subjects.items():
            if subject in failed:
                continue
            try:
                actual = last_update(make, torch.float32, gradients, eps)
            except Exception as error:
                if not subject.startswith(("bitsandbytes", "torchao")):
                    raise
                failed[subject] = f"{type(error).__name__}: {str(error).splitlines()[0]}"  # a finding, not an end
                continue
            rows.append({"case": name, "eps": eps, "decades": decades, "scale": scale, "subject": subject})
            rows[-1].update(compare(actual, exact))
    return {
        "peers": {} if arguments.no_peers else peer_versions(),
        "not_measured": {**missing_peers(asked=not arguments.no_peers), **failed},
        "values": math.prod(SHAPE),
        "rows": rows,
    }


def by_case(result: Result) -> dict[str, dict[str, list[Mapping[str, Any]]]]:
    """The rows by case and subject."""
    found: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in result["rows"]:
        found.setdefault(row["case"], {}).setdefault(row["subject"], []).append(row)
    return found


def cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "not measured"
    if row["norm_ratio"] is None:
        return f"{row['not_finite']} not finite"
    return f"{ratio(row['norm_ratio'])} ({ratio(row['lower'])} to {ratio(row['upper'])})"


def ratio(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def render(result: Result) -> str:
    parts = []
    for case, subjects in by_case(result).items():
        scales = sorted({row["scale"] for rows in subjects.values() for row in rows}, reverse=True)
        rows = []
        for scale in scales:
            at = {subject: row for subject, found in subjects.items() for row in found if row["scale"] == scale}
            rows.append([f"{scale:.0e}", *(cell(at.get(subject)) for subject in SUBJECTS)])
        headers = [case, *(with_version(subject, result["peers"]) for subject in SUBJECTS)]
        parts.append(table(headers, rows))
    return "\n\n".join(
        [
            *parts,
            f"Norm of the update over that of the exact one; in brackets the 5 % and 95 % quantiles of the ratio of "
            f"{result['values']} elements. Step {result['arguments']['steps']}. {not_measured(result)}".rstrip(),
            origin(result),
        ]
    )


def draw(result: Result) -> Figure:
    """A panel for each case: the ratio of norms against the scale, with the elements' quantiles as bars."""
    cases = by_case(result)
    figure, panels = new_figure(columns=len(cases), width=6.0, sharey=True)
    for panel, (case, subjects) in zip(panels, cases.items()):
        for at, (style, subject) in enumerate(zip(STYLES, SUBJECTS)):
            rows = [row for row in subjects.get(subject, []) if row["norm_ratio"] is not None]
            shift = 10 ** (0.12 * (at - 1.5))  # beside each other, not over each other
            x = [row["scale"] * shift for row in rows]
            medians = [row["median"] for row in rows]
            lengths = [
                [row["median"] - row["lower"] for row in rows],
                [row["upper"] - row["median"] for row in rows],
            ]
            label = with_version(subject, result["peers"]) + ("" if rows else ": not measured")
            panel.errorbar(x, medians, yerr=lengths, fmt="none", capsize=3, ecolor=style.colour)
            panel.plot(x, [row["norm_ratio"] for row in rows], label=label, **style.line(linewidth=1.5, markersize=6))
        panel.set_xscale("log")
        panel.invert_xaxis()
        panel.set_yscale("log")
        panel.set_xlabel("standard deviation of the gradients")
        panel.set_title(case)
    panels[0].set_ylabel("update / exact update (ratio of norms;\nbars: 5 % to 95 % of the elements)")
    panels[-1].legend(loc="upper center")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    torch.set_num_threads(1)  # small tensors
    result = {**provenance(vars(arguments)), **measure(arguments)}
    publish("small_gradients", result, arguments, draw, render)
    return 0


if __name__ == "__main__":
    sys.exit(main())
