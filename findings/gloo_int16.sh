#!/usr/bin/env bash
# torch 2.13.0, backend gloo: collectives refuse int16, though they take every other integer type of 8 to 64 bits, and
# both floats of 16. So a DTensor of int16 can be made, sharded and saved by torch.distributed.checkpoint (which writes
# each rank's part), but not made whole: full_tensor() ends with "Invalid scalar type", and so does
# get_optimizer_state_dict with full_state_dict=True for an optimizer that keeps int16 state. The same bits viewed as
# float16 go through unchanged.
#
# Output seen with torch 2.13.0+cpu:
#   2.13.0+cpu uint8: whole
#   2.13.0+cpu int8: whole
#   2.13.0+cpu int16: RuntimeError: Invalid scalar type
#   2.13.0+cpu int32: whole
#   2.13.0+cpu int64: whole
#   2.13.0+cpu float16: whole
#   2.13.0+cpu bfloat16: whole
#   2.13.0+cpu int16 viewed as float16: whole
#
# Fails where it is no longer so. TORCH names another build of the same version, such as torch==2.13.0+cpu.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "${TORCH:-torch==2.13.0}" "numpy==2.2.6"
cd "$folder"
cat >whole.py <<'PYTHON'
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard


def whole(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for name in ("uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "int16 viewed as float16"):
        kind, _, view = name.partition(" viewed as ")
        part = torch.arange(4).to(getattr(torch, kind)) + 4 * rank
        sent = part.view(getattr(torch, view)) if view else part
        try:
            back = DTensor.from_local(sent, mesh, [Shard(0)]).full_tensor()
            assert back.view(part.dtype).tolist() == list(range(8))
            said = "whole"
        except RuntimeError as error:
            said = f"RuntimeError: {error}".splitlines()[0]
        if rank == 0:
            print(torch.__version__, f"{name}: {said}", flush=True)
        assert (said == "whole") == (name != "int16"), "the finding is out of date"
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.start_processes(whole, (sys.argv[1],), nprocs=2, start_method="spawn")
PYTHON
"$folder/venv/bin/python" whole.py "$folder"
