#!/usr/bin/env bash
# bitsandbytes 0.50.2: an override made for one model is applied to the parameter at the same place of every later
# optimizer of the process, whatever its model. GlobalOptimManager keeps overrides by parameter, and also by (index of
# the group, index in the group), and an optimizer takes what stands under its own places. They come to stand there
# - by register_parameters(params), for those that override_config was called for before;
# - by the first step of any optimizer that has the weight of an Embedding or a StableEmbedding of bitsandbytes, which
#   asks for 32 bits: nobody called the manager, and the next model keeps its first parameter in 32 bits.
# With override_config after the only register_parameters, as its docstring shows, nothing stands there, and the next
# model is as it was asked for. initialize() forgets all overrides, those of the first model too.
#
# Output seen with torch 2.13.0+cpu, bitsandbytes 0.50.2 on an AMD EPYC:
#   bitsandbytes 0.50.2, override, register; this model: [32, 8]
#   bitsandbytes 0.50.2, override, register; the next model: [32, 8]
#   bitsandbytes 0.50.2, after initialize; another model: [8, 8]
#   bitsandbytes 0.50.2, Embedding; this model: [32, 8]
#   bitsandbytes 0.50.2, Embedding; the next model: [32, 8]
#   bitsandbytes 0.50.2, register, override; this model: [32, 8]
#   bitsandbytes 0.50.2, register, override; the next model: [8, 8]
#
# Fails where it is no longer so. TORCH names another build of the same version, such as torch==2.13.0+cpu.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "${TORCH:-torch==2.13.0}" "numpy==2.2.6" "bitsandbytes==0.50.2"
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import bitsandbytes as bnb
import torch

manager = bnb.optim.GlobalOptimManager.get_instance()
models = []  # that stay: a new parameter never has the id of an old one


def model(first=None):
    first = first or torch.nn.Linear(64, 128, bias=False)
    models.append(torch.nn.Sequential(first, torch.nn.Linear(128, 64, bias=False)))
    return models[-1]


def bits(model):
    """What a new AdamW8bit keeps the state of each weight in."""
    optimizer = bnb.optim.AdamW8bit(model.parameters(), lr=1e-3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return [8 * optimizer.state[p]["state1"].itemsize for p in model.parameters()]


def show(what, found, seen):
    print(f"bitsandbytes {bnb.__version__}, {what}: {found}")
    assert found == seen, f"it was {seen}: the finding is out of date"


first = model()
manager.override_config(first[0].weight, "optim_bits", 32)
manager.register_parameters(first.parameters())
show("override, register; this model", bits(first), [32, 8])
show("override, register; the next model", bits(model()), [32, 8])
manager.initialize()
show("after initialize; another model", bits(model()), [8, 8])

show("Embedding; this model", bits(model(bnb.nn.Embedding(100, 128))), [32, 8])
show("Embedding; the next model", bits(model()), [32, 8])
manager.initialize()

first = model()
manager.register_parameters(first.parameters())
manager.override_config(first[0].weight, "optim_bits", 32)
show("register, override; this model", bits(first), [32, 8])
show("register, override; the next model", bits(model()), [8, 8])
PYTHON
