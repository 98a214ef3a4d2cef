"""State that does not fit: under RLIMIT_DATA resident state cannot be allocated, and paged state trains, is copied,
pickled, saved and loaded, with the same bits and under its budget."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.processes import child_environment

from optim8.paging import files, tiers

HERE = Path(__file__).parent
MIB = 2**20
PARAMETERS = GRADIENTS = 16 * MIB  # of paging_worker.py
BUDGET = 8 * MIB
# What a process may allocate beside parameters and gradients: two copies of the parameters, which pickle makes; the
# budget; three copies of the MiB of state that is unpickled at a time; and 2 MiB for small things and the stacks of
# threads. It is less than the state.
ROOM = 2 * PARAMETERS + BUDGET + 5 * MIB
STATE = 52 * MIB
SMALL = 2 * MIB
# What each phase may have in memory. Pickle makes two copies of the parameters and holds them until it is done.
MAY_HAVE = {
    "training": PARAMETERS + GRADIENTS + BUDGET + SMALL,
    "training after loading": PARAMETERS + GRADIENTS + BUDGET + SMALL,
    "deepcopy": PARAMETERS + GRADIENTS + 2 * BUDGET + SMALL,
    "pickle": PARAMETERS + GRADIENTS + BUDGET + 2 * PARAMETERS + SMALL,
    "unpickling": PARAMETERS + GRADIENTS + BUDGET + 2 * PARAMETERS + SMALL,
}


def work(**asked: Any) -> Any:
    # What is freed is given back at once, so that what is allocated is what is used.
    environment = child_environment(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    command = [sys.executable, "paging_worker.py", json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def past_cache(folder: Path) -> bool:
    """Whether the file system can be read and written past the page cache."""
    (folder / "probe").write_bytes(bytes(tiers.PAGE))
    handle = files._past_cache(folder / "probe")
    if handle is not None:
        os.close(handle)
    return handle is not None


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize("cold", [False, True], ids=["page cache", "disk"])
def test_state_that_cannot_be_allocated_is_trained_under_a_budget(cold: bool, tmp_path: Path) -> None:
    expected = work(paged=False)
    got = work(paged=True, room=ROOM, budget=BUDGET, bucket=4 * MIB, folder=str(tmp_path), cold=cold, may_have=MAY_HAVE)
    assert got["resident"] == "fails to allocate"
    assert got["ways"] == ["direct" if cold and past_cache(tmp_path) else "cached"] * 2
    assert got["digests"] == expected["digests"], "loaded from a state dict, and from a pickle"
    assert got["tiers"]["host"] <= BUDGET - 4 * MIB
    assert sum(got["tiers"].values()) > STATE > ROOM
    assert {name: (got["peaks"][name], may) for name, may in MAY_HAVE.items() if got["peaks"][name] > may} == {}
