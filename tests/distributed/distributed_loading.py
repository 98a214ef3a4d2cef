"""What the processes of test_distributed.py do with state dicts as torch.optim's users do: whole dicts sent by rank 0,
loading in place, copies."""

from __future__ import annotations

import io
import pickle
import threading
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import CASES, EVERY, LAYOUTS, Case
from distributed_common import SHAPES, Net, default_size, local, sharded, snapshot_local, take_steps
from distributed_worker import Place, Scenario
from support.harness import bits
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

FROM_RANK_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def whole_dicts(place: Place, case: Case) -> dict[str, Any]:
    """State dicts of one process, by the names of parameters, that know the rule of `case`."""
    dicts = {}
    for bits_, name in ((8, "codes"), (16, "codes and low bytes"), (32, "own float32")):
        net = Net(place.device)
        own = default_size(case, net) if bits_ == 8 else case.make(net.parameters(), optim_bits=bits_)
        take_steps(net, own, 1, 2)
        dicts[name] = deepcopy(get_optimizer_state_dict(net, own))
    of_lion = case.name == "Lion8bit"
    floats = deepcopy(dicts["own float32"])
    for group in floats["param_groups"]:
        for option in ("optim_bits", "min_8bit_size", "paged"):
            group.pop(option, None)
        if of_lion:  # lion-pytorch has no more than these
            for option in set(group) - {"lr", "betas", "weight_decay", "params"}:
                del group[option]
    for entry in floats["state"].values():
        if of_lion:
            del entry["step"]
    halves = deepcopy(floats)
    for entry in halves["state"].values():
        entry.update({name: entry[name].bfloat16() for name in case.states})
    if of_lion or case.torch_class is not None:
        dicts |= {"another library's float32": floats, "another library's bfloat16": halves}
    if case.name not in ("Adam8bit", "AdamW8bit", "Lion8bit"):  # which version 0.1.0 had
        return dicts
    old = deepcopy(dicts["codes"])
    for entry in old["state"].values():
        for name in [name for name in entry if name.endswith(("_codes", "_root_absmax"))]:
            entry[name.removesuffix("_codes").replace("_root", "")] = entry.pop(name)
    dicts["codes of 0.1.0"] = old
    return dicts


def whole_from_rank_0(place: Place) -> None:
    """Whole dicts that only rank 0 has, or every rank, become what load_state_dict makes of them, in any precision."""
    for case in EVERY:
        for what, whole in whole_dicts(place, case).items():
            for more in ({}, {"optim_bits": 32}) if case.name == "AdamW8bit" else ({},):
                states = []
                for way in ("load_state_dict", "rank 0", "every rank"):
                    net = sharded(place)
                    optimizer = case.make(net.parameters(), min_8bit_size=4096, **more)
                    given = deepcopy(whole)
                    if way == "load_state_dict":
                        optimizer.load_state_dict(given)
                    elif way == "every rank":
                        options = StateDictOptions(full_state_dict=True)
                        set_optimizer_state_dict(net, optimizer, given, options=options)
                    else:
                        set_optimizer_state_dict(net, optimizer, given if place.rank == 0 else {}, options=FROM_RANK_0)
                    precisions = [optimizer.precision(p) for p in net.parameters()]
                    take_steps(net, optimizer, 3, 3)
                    states.append((precisions, snapshot_local(optimizer)))
                assert states[0] == states[1], (case.name, what, more)
                assert states[0] == states[2], (case.name, what, more)


def gathered_from_rank_0(place: Place) -> None:
    """State gathered from shards, in either precision, into an optimizer of either."""
    case = CASES["AdamW8bit"]
    for saved_in in (8, 16, 32):
        net = sharded(place)
        optimizer = case.make(net.parameters(), optim_bits=saved_in)
        take_steps(net, optimizer, 1, 2)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        whole = get_optimizer_state_dict(net, optimizer, options=options)
        assert place.rank == 0 or not whole
        for loaded_in in (8, 16, 32):
            other = sharded(place)
            loaded = case.make(other.parameters(), optim_bits=loaded_in)
            set_optimizer_state_dict(other, loaded, deepcopy(whole), options=FROM_RANK_0)
            assert [s for _, s in snapshot_local(loaded)] == [s for _, s in snapshot_local(optimizer)]


def into_plain_parameters_from_rank_0(place: Place) -> None:
    """Parameters that are not sharded: codes load; what torch hands over to rank 0 alone is told by the others."""
    case = CASES["AdamW8bit"]
    for what, whole in whole_dicts(place, case).items():
        nets = [Net(place.device) for _ in range(2)]
        optimizer, expected = (default_size(case, net) for net in nets)
        expected.load_state_dict(deepcopy(whole))
        given = deepcopy(whole) if place.rank == 0 else {}
        if place.rank == 0 or what == "codes":
            set_optimizer_state_dict(nets[0], optimizer, given, options=FROM_RANK_0)
            assert snapshot_local(optimizer) == snapshot_local(expected), what
        else:
            with pytest.raises(ValueError, match="nothing came"):
                set_optimizer_state_dict(nets[0], optimizer, given, options=FROM_RANK_0)


def strange_from_rank_0(place: Place) -> None:
    """A dict whose moments have names that torch does not hand over is refused on every rank, and nothing changes."""
    case = CASES["AdamW8bit"]
    strange = whole_dicts(place, case)["another library's float32"]
    for entry in strange["state"].values():
        entry["state1"], entry["state2"] = entry.pop("exp_avg"), entry.pop("exp_avg_sq")
    net = sharded(place)
    optimizer = default_size(case, net)
    take_steps(net, optimizer, 1, 1)
    before = snapshot_local(optimizer)
    with pytest.raises(ValueError, match="nothing came"):
        set_optimizer_state_dict(net, optimizer, strange if place.rank == 0 else {}, options=FROM_RANK_0)
    assert snapshot_local(optimizer) == before


def in_place(place: Place) -> None:
    """torch.distributed.checkpoint loads into the state dict: whether load_state_dict follows or not."""
    for case in EVERY:
        net = sharded(place)
        optimizer = default_size(case, net)
        take_steps(net, optimizer, 1, 2)
        folder = place.folder / f"in_place-{case.name}"
        dcp.save({"optimizer": optimizer.state_dict()}, checkpoint_id=folder)
        weights = {name: local(p).clone() for name, p in net.weights.items()}
        take_steps(net, optimizer, 3, 4)
        ends = [snapshot_local(optimizer)]
        for way in ("dict that goes", "dict that stays", "load_state_dict", "after a step"):
            other = sharded(place)
            loaded = default_size(case, other)
            take_steps(other, loaded, 5, 6)
            state = {"optimizer": loaded.state_dict()}
            if way == "after a step":
                take_steps(other, loaded, 7, 7)
            dcp.load(state, checkpoint_id=folder)
            if way == "load_state_dict":
                loaded.load_state_dict(state["optimizer"])
            if way != "dict that stays":
                del state
            for name, p in other.weights.items():
                local(p).copy_(weights[name])
            take_steps(other, loaded, 3, 4)
            ends.append(snapshot_local(loaded))
        assert all(end == ends[0] for end in ends), case.name


def kept_over_a_step(place: Place) -> None:
    """A state dict that lives on over a step tells of the newest state, as torch.optim's does."""
    case = CASES["AdamW8bit"]
    net = sharded(place)
    optimizer = default_size(case, net)
    take_steps(net, optimizer, 1, 1)
    state = optimizer.state_dict()
    take_steps(net, optimizer, 2, 3)
    now = optimizer.state_dict()
    for index, entry in now["state"].items():
        assert state["state"][index].keys() == entry.keys()
        for name, value in entry.items():
            assert bits(local(state["state"][index][name])) == bits(local(value)), name
    del state, now, entry, value
    assert not optimizer.windows  # what nobody holds is not kept up


def strange_tiles(place: Place) -> None:
    """What was written into a state dict and cannot be tiles is told at the next step, which changes nothing."""
    case = CASES["AdamW8bit"]
    net = sharded(place)
    optimizer = default_size(case, net)
    take_steps(net, optimizer, 1, 1)
    before = snapshot_local(optimizer)
    index = [p.shape for p in net.parameters()].index(SHAPES["rows_of_a_block"])
    state = optimizer.state_dict()
    local(state["state"][index]["exp_avg_absmax"]).fill_(1.0)
    for _ in range(2):  # also once the dict is gone
        with pytest.raises(ValueError, match=rf"state\[{index}\]\['exp_avg_absmax'\] must be the tiles of"):
            take_steps(net, optimizer, 2, 2)
        assert snapshot_local(optimizer) == before
        state = {}


def copies(place: Place) -> None:
    """Sharded state dicts are copied, pickled, saved and staged as torch.optim's are; a copy takes what it holds."""
    for case in LAYOUTS:
        for more in ({}, {"optim_bits": 32}):
            net = sharded(place)
            optimizer = case.make(net.parameters(), min_8bit_size=4096, **more)
            take_steps(net, optimizer, 1, 2)
            want = snapshot_local(optimizer)
            entries = optimizer.state_dict()["state"].values()
            held = sum(local(value).nbytes + 1000 for entry in entries for value in entry.values())
            del entries
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            assert file.tell() < 1.5 * held, "whole arenas were saved"
            file.seek(0)
            allowed = torch.serialization.get_unsafe_globals_in_checkpoint(file)
            file.seek(0)
            assert not any("optim8" in name for name in allowed)
            flat = StateDictOptions(flatten_optimizer_state_dict=True)
            copied = [
                deepcopy(optimizer.state_dict()),
                pickle.loads(pickle.dumps(optimizer.state_dict())),
                torch.load(file, weights_only=False),
                deepcopy(get_optimizer_state_dict(net, optimizer)),
                deepcopy(get_optimizer_state_dict(net, optimizer, options=flat)),
            ]
            folder = place.folder / f"staged-{case.name}-{len(more)}"
            dcp.async_save({"optimizer": optimizer.state_dict()}, checkpoint_id=folder).result()
            weights = {name: local(p).clone() for name, p in net.weights.items()}
            take_steps(net, optimizer, 3, 4)  # what was copied does not change
            staged = {"optimizer": optimizer.state_dict()}
            dcp.load(staged, checkpoint_id=folder)
            for state in (*copied, staged["optimizer"]):
                for name, p in net.weights.items():
                    local(p).copy_(weights[name])
                set_optimizer_state_dict(
                    net, optimizer, state, options=flat if "state" not in state else StateDictOptions()
                )
                assert snapshot_local(optimizer) == want
                take_steps(net, optimizer, 3, 3)
    dist.barrier()


class _LateWriter(dcp.FileSystemWriter):
    """Writes when it is told to, in the thread of dcp.async_save."""

    def __init__(self, folder: Path, told: threading.Event) -> None:
        super().__init__(folder)
        self.told = told

    def write_data(self, *arguments: Any) -> Any:
        assert self.told.wait(120)
        return super().write_data(*arguments)


def saved_while_stepping(place: Place) -> None:
    """dcp.async_save takes the state of when it is called, whatever steps come before it writes."""
    group = dist.new_group(backend="gloo")  # of its own: what it sends meanwhile must not meet what the training sends
    for case in (CASES["AdamW8bit"], CASES["Lion8bit"]):
        for paged in (False, True):
            net = sharded(place)
            optimizer = case.make(net.parameters(), min_8bit_size=4096, paged=paged)
            take_steps(net, optimizer, 1, 2)
            want = snapshot_local(optimizer)
            folder, told = place.folder / f"late-{case.name}-{paged}", threading.Event()
            state = {"weights": net.state_dict(), "optimizer": optimizer.state_dict()}
            future = dcp.async_save(state, storage_writer=_LateWriter(folder, told), process_group=group)
            take_steps(net, optimizer, 3, 5)
            told.set()
            future.result()
            assert snapshot_local(optimizer) != want
            state = {"weights": net.state_dict(), "optimizer": optimizer.state_dict()}
            dcp.load(state, checkpoint_id=folder)
            del state
            assert snapshot_local(optimizer) == want
            take_steps(net, optimizer, 3, 3)
    dist.barrier()


def default_dtype(place: Place) -> None:
    """What is loaded does not depend on torch's default dtype, blocks that are put together included."""
    case = CASES["AdamW8bit"]
    net = sharded(place)
    optimizer = default_size(case, net)
    take_steps(net, optimizer, 1, 2)
    whole = get_optimizer_state_dict(net, optimizer, options=StateDictOptions(full_state_dict=True))
    loaded = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        alone = Net(place.device)
        own = default_size(case, alone)
        torch.set_default_dtype(dtype)
        try:
            own.load_state_dict(deepcopy(whole))
        finally:
            torch.set_default_dtype(torch.float32)
        loaded.append(snapshot_local(own))
    assert loaded[0] == loaded[1] == loaded[2]


SCENARIOS: dict[str, Scenario] = {
    f.__name__: f
    for f in (
        whole_from_rank_0,
        gathered_from_rank_0,
        into_plain_parameters_from_rank_0,
        strange_from_rank_0,
        in_place,
        kept_over_a_step,
        strange_tiles,
        copies,
        saved_while_stepping,
        default_dtype,
    )
}
