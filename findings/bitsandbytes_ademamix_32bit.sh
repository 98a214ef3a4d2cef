#!/usr/bin/env bash
# bitsandbytes 0.50.2 (CPU): of its four AdEMAMix with state in 32 bits, AdEMAMix and PagedAdEMAMix step and AdEMAMix32bit
# and PagedAdEMAMix32bit raise in their first step, with the same arguments. Elsewhere in that library X and X32bit
# differ in nothing but whether optim_bits may be chosen. These two do not derive from AdEMAMix but from the optimizer of
# two states, so that they make one first moment, where the rule has a fast and a slow one.
#
# Output seen with torch 2.13.0+cpu, bitsandbytes 0.50.2 on an AMD EPYC:
#   bitsandbytes 0.50.2, AdEMAMix: (2, 4096)
#   bitsandbytes 0.50.2, PagedAdEMAMix: (2, 4096)
#   bitsandbytes 0.50.2, AdEMAMix32bit: RuntimeError
#   bitsandbytes 0.50.2, PagedAdEMAMix32bit: RuntimeError
#   bitsandbytes 0.50.2, AdamW: (4096,)
#   bitsandbytes 0.50.2, AdamW32bit: (4096,)
#
# Fails where it is no longer so. TORCH names another build of the same version, such as torch==2.13.0+cpu.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "${TORCH:-torch==2.13.0}" "numpy==2.2.6" "bitsandbytes==0.50.2"
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import bitsandbytes as bnb
import torch


def first_moments(name):
    """The shape of what a first step makes of them, or the error that it raises."""
    p = torch.nn.Parameter(torch.ones(4096))
    p.grad = torch.ones(4096)
    optimizer = getattr(bnb.optim, name)([p], lr=1e-3)
    try:
        optimizer.step()
    except RuntimeError as error:
        return type(error).__name__
    return tuple(optimizer.state[p]["state1"].shape)


for name, seen in {
    "AdEMAMix": (2, 4096),
    "PagedAdEMAMix": (2, 4096),
    "AdEMAMix32bit": "RuntimeError",
    "PagedAdEMAMix32bit": "RuntimeError",
    "AdamW": (4096,),
    "AdamW32bit": (4096,),
}.items():
    found = first_moments(name)
    print(f"bitsandbytes {bnb.__version__}, {name}: {found}")
    assert found == seen, f"it was {seen}: the finding is out of date"
PYTHON
