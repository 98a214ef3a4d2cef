#!/usr/bin/env bash
# torch 2.13.0 (CPU): a compiled function that sets an option of a parameter group, such as weight_decay, and steps,
# leaves capturable=True behind in that group. torch.optim itself refuses that on a CPU, so the next step that is not
# compiled fails; a state dict that is saved then holds it too. A compiled function that only steps leaves the group as
# it was.
#
# Output seen with torch 2.13.0+cpu:
#   2.13.0+cpu only steps: capturable False before, False after, then a plain step works
#   2.13.0+cpu sets weight_decay and steps: capturable False before, True after, then a plain step raises AssertionError
# TORCH names another build of the same version, such as torch==2.13.0+cpu.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "${TORCH:-torch==2.13.0}" "numpy==2.2.6"
cd "$folder"
cat >capturable.py <<'PYTHON'
import torch


def run(what, changes):
    weight = torch.nn.Parameter(torch.ones(8))
    weight.grad = torch.ones(8)
    optimizer = torch.optim.AdamW([weight], lr=torch.tensor(1e-3))
    (group,) = optimizer.param_groups

    def step():
        if changes:
            optimizer.param_groups[0]["weight_decay"] = 0.02
        optimizer.step()

    before = group["capturable"]
    torch.compile(step, backend="eager")()
    after = group["capturable"]
    try:
        optimizer.step()
        then = "works"
    except AssertionError:
        then = "raises AssertionError"
    print(
        f"{torch.__version__} {what}: capturable {before} before, {after} after, then a plain step {then}", flush=True
    )
    return before, after, then


assert run("only steps", False) == (False, False, "works"), "the finding is out of date"
changed = run("sets weight_decay and steps", True)
assert changed == (False, True, "raises AssertionError"), "the finding is out of date"
PYTHON
"$folder/venv/bin/python" capturable.py
