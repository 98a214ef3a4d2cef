#!/usr/bin/env bash
# heavyball 3.2.1: with `param_ecc` a float32 parameter becomes bfloat16 as soon as the optimizer is made, in place; what
# it lacks of its value is in the optimizer's state. The model then computes in another dtype than it was made in: with
# float32 inputs its layers raise an error, and a state dict that is saved has the upper halves alone.
#
# Output seen with heavyball 3.2.1 and torch 2.13.0+cpu:
#   3.2.1 without param_ecc: torch.float32
#   3.2.1 param_ecc=bf16+8: torch.bfloat16, saved as torch.bfloat16, and beside it torch.int8
#   3.2.1 param_ecc=bf16+16: torch.bfloat16, saved as torch.bfloat16, and beside it torch.int16
#   a float32 input: RuntimeError
#
# Fails where it is no longer so. TORCH names another build of the same version, such as torch==2.13.0+cpu.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "${TORCH:-torch==2.13.0}" "setuptools" "heavyball==3.2.1"
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import heavyball
import torch


def step(**options):
    layer = torch.nn.Linear(40, 30, bias=False)
    optimizer = heavyball.AdamW(layer.parameters(), lr=1e-3, compile_step=False, **options)
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step()
    (state,) = next(iter(optimizer.state.values())).values()
    return layer, state.get("param::ecc")


plain, _ = step()
print(version("heavyball"), "without param_ecc:", plain.weight.dtype)
assert plain.weight.dtype == torch.float32
for ecc, dtype in {"bf16+8": torch.int8, "bf16+16": torch.int16}.items():
    layer, rest = step(param_ecc=ecc)
    saved = layer.state_dict()["weight"].dtype
    print(version("heavyball"), f"param_ecc={ecc}: {layer.weight.dtype}, saved as {saved}, and beside it {rest.dtype}")
    assert (layer.weight.dtype, saved) == (torch.bfloat16, torch.bfloat16), "it stays float32 now: out of date"
    assert rest.dtype == dtype
try:
    layer(torch.ones(2, 40))
except RuntimeError:
    print("a float32 input: RuntimeError")
else:
    raise AssertionError("a float32 input is taken now: the finding is out of date")
PYTHON
