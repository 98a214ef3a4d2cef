"""Every function of the functional API for every small size and around every block and vector, on each instruction set.

torch's own products take part in some: its instructions, and those of the library it multiplies with, are masked too.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import child_environment

from optim8 import _native

HERE = Path(__file__).parent
# What a processor of that kind would use. Those named are without VNNI, where torch's int8 product saturates.
KINDS = {
    "scalar": ("scalar", "default", "SSE41"),
    "AVX2": ("avx2", "avx2", "AVX2"),
    "AVX-512": ("avx512", "avx512", "AVX512_CORE"),
    "all": ("", "", ""),
}
VARIABLES = ("OPTIM8_CPU_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")


@pytest.mark.parametrize("kind", KINDS)
def test_every_size_gives_what_the_definition_says(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    masks = dict(zip(VARIABLES, KINDS[kind], strict=True))
    if masks["OPTIM8_CPU_ISA"] and masks["OPTIM8_CPU_ISA"] not in _native.cpu().isa_info()["available"]:
        pytest.skip(f"this processor has no {masks['OPTIM8_CPU_ISA']}")
    environment = {name: value for name, value in child_environment().items() if name not in VARIABLES}
    environment |= {name: value for name, value in masks.items() if value}
    command = [sys.executable, "functional_sizes_worker.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE, check=False)
    assert done.returncode == 0, f"{masks}: {done.stderr}"
    result = json.loads(done.stdout)
    assert result["wrong"] == [], result["processor"]
    assert result["count"] > 3000
