"""The operations that rules are written in (csrc/core/number.h) mean the same on every instruction set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optim8 import _native

HERE = Path(__file__).parent


@pytest.mark.parametrize("isa", _native.cpu().isa_info()["available"])
def test_every_operation_has_the_bits_of_its_definition(isa: str) -> None:
    environment = {**os.environ, "OPTIM8_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "number_worker.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["used"] == isa, "OPTIM8_CPU_ISA is not honoured"
    assert answer["values"] > 200_000
    assert sorted(answer["wrong"]) == sorted(_native.cpu().number_operations)
    assert not any(answer["wrong"].values()), json.dumps(answer["wrong"], indent=1)


def test_bad_arguments_are_refused() -> None:
    x, native = torch.zeros(3), _native.cpu()
    with pytest.raises(ValueError, match="name must be one of number_operations, got 'divide'"):
        native.apply_number_operation("divide", x, x, x, x)
    with pytest.raises(ValueError, match="out must have 3 entries"):
        native.apply_number_operation("add", x, x, x, torch.zeros(4))
