"""What the processes of test_distributed.py save and load: one function for each scenario."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import reference
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import CASES, LAYOUTS, Case
from distributed_common import (
    BLOCK,
    ON_BLOCKS,
    SHAPES,
    Net,
    default_size,
    local,
    sharded,
    snapshot_local,
    take_steps,
)
from distributed_worker import Place, Scenario
from support.convert_harness import converted_scales
from support.harness import bits, state_bits
from support.rounding import UNIT, Array, Rounded
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, Partial, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import optim8
from optim8 import codec

NO_LOW = -1  # in the place of a low byte where a moment has none


class Moment(NamedTuple):
    """A moment of a whole parameter, or of some of its values: what they are in float32, their codes, scales and low
    bytes; in 32 bits codes are the values, and the rest says nothing."""

    values: Array
    codes: Array
    scales: Array
    low: Array

    def part(self, which: Any) -> Moment:
        return Moment(*(each[which].reshape(-1) for each in self))


class Saved:
    """The moments of all parameters."""

    def __init__(self, case: Case, net: Net, optimizer: Any) -> None:
        whole = get_optimizer_state_dict(net, optimizer, options=StateDictOptions(full_state_dict=True))
        self.moments: dict[str, dict[str, Moment]] = {}
        self.steps: dict[str, float] = {}
        for name, shape in SHAPES.items():
            entry = whole["state"][f"weights.{name}"]
            self.steps[name] = float(entry["step"])
            self.moments[name] = {}
            for moment, signed in case.states.items():
                if entry.get(case.absmax(moment), torch.empty(0)).numel() == 0:
                    floats = entry[moment].cpu().numpy()
                    self.moments[name][moment] = Moment(floats, floats, np.ones_like(floats), np.zeros_like(floats))
                    continue
                codes = entry[case.codes(moment)].cpu().numpy()
                scales = entry[case.absmax(moment)].cpu()
                if scales.dim() == 1:
                    scale = scales.repeat_interleave(BLOCK)[: codes.size]
                else:
                    scale = scales[..., 0].flatten().repeat_interleave(codes.size // (scales.numel() // 2))
                scale = scale.view(shape).numpy()
                low = entry.get(case.low(moment), torch.empty(0)).cpu().numpy()
                if low.size:
                    ones = np.ones(-(-codes.size // BLOCK), np.float32)
                    quotient = reference.decode16(codes.ravel(), low.ravel(), ones, signed).value.reshape(shape)
                else:
                    quotient, low = reference.dynamic_map(signed)[codes], np.full(codes.shape, NO_LOW)
                self.moments[name][moment] = Moment(quotient * scale, codes, scale, low)


def check_loaded(place: Place, case: Case, old: Saved, new: Saved, ranks: int) -> None:
    """Every block of the shards now is as it was, or its values of then quantized once."""
    assert new.steps == old.steps
    for name, shape in SHAPES.items():
        for moment, signed in case.states.items():
            was, now = old.moments[name][moment], new.moments[name][moment]
            if name in ON_BLOCKS or np.prod(shape) < 4096:
                assert all(map(np.array_equal, was[1:], now[1:])), name
                continue
            rows = -(-shape[0] // ranks)
            for first in range(0, shape[0], rows):
                shards = [each.part(slice(first, first + rows)) for each in (was, now)]
                for i in range(0, shards[0].values.size, BLOCK):
                    check_block(*(each.part(slice(i, i + BLOCK)) for each in shards), signed=signed)


def check_block(was: Moment, now: Moment, *, signed: bool) -> None:
    scale = now.scales[0]
    assert (now.scales == scale).all()
    if (was.scales == was.scales[0]).all():
        assert all(map(np.array_equal, was[1:], now[1:]))
        return
    exact = was.values.astype(np.float64)
    if (now.low == NO_LOW).all():
        top = converted_scales(exact, signed, now.scales[:1].astype(np.float64))
        assert scale == top[0]
        assert not reference.wrong_codes(now.codes, Rounded.exact(exact), signed, top).size
        return
    # Decoded by a line in float32 with two rounded constants, each as large as 9 times the value, and a product.
    values = Rounded(exact, 20 * UNIT * np.abs(exact))
    largest = reference.block_max(exact)[0] / reference.largest_value(signed)
    assert abs(scale - largest) <= 24 * UNIT * largest
    assert not reference.wrong_dithered_codes(now.codes, values, signed, np.full(exact.size, 0.5), now.low).size


def save_sharded(place: Place) -> None:
    """Two steps, then every kind of checkpoint; and the whole state, to compare with."""
    for case in LAYOUTS:
        net = sharded(place)
        optimizer = default_size(case, net)
        take_steps(net, optimizer, 1, 2)
        at = place.folder / f"{case.name}-{place.world}"
        before = snapshot_local(optimizer)
        dcp.save({"optimizer": get_optimizer_state_dict(net, optimizer)}, checkpoint_id=at / "dcp")
        flat = StateDictOptions(flatten_optimizer_state_dict=True)
        dcp.save({"optimizer": get_optimizer_state_dict(net, optimizer, options=flat)}, checkpoint_id=at / "flat")
        dcp.save({"optimizer": optimizer.state_dict()}, checkpoint_id=at / "plain")
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        whole = get_optimizer_state_dict(net, optimizer, options=options)
        saved = Saved(case, net, optimizer)
        if place.rank == 0:
            torch.save(whole, at / "whole.pt")
            torch.save(saved, at / "saved.pt")
        assert snapshot_local(optimizer) == before
        dist.barrier()


def load_resharded(place: Place) -> None:
    """The checkpoints of every other number of processes, by every way to load them."""
    for case in LAYOUTS:
        for at in sorted(place.folder.glob(f"{case.name}-*")):
            saved = torch.load(at / "saved.pt", weights_only=False)
            for way in ("dcp", "flat", "plain"):
                net = sharded(place)
                optimizer = default_size(case, net)
                before = bits(local(net.weights["vector"]))
                if way == "plain":
                    initialize(net, optimizer)
                    state = {"optimizer": optimizer.state_dict()}
                    dcp.load(state, checkpoint_id=at / way)
                    optimizer.load_state_dict(state["optimizer"])
                else:
                    options = StateDictOptions(flatten_optimizer_state_dict=way == "flat")
                    state = {"optimizer": get_optimizer_state_dict(net, optimizer, options=options)}
                    dcp.load(state, checkpoint_id=at / way)
                    set_optimizer_state_dict(net, optimizer, state["optimizer"], options=options)
                assert bits(local(net.weights["vector"])) == before
                check_loaded(place, case, saved, Saved(case, net, optimizer), place.world)
            go_on(place, case, net, optimizer)


def initialize(net: Net, optimizer: Any) -> None:
    """What get_optimizer_state_dict does for an optimizer without state."""
    lr = optimizer.param_groups[0]["lr"]
    optimizer.param_groups[0]["lr"] = 0.0
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.param_groups[0]["lr"] = lr


def go_on(place: Place, case: Case, net: Net, optimizer: Any) -> None:
    """What is on the grid has the future of a run that was never interrupted or distributed."""
    whole = Net(place.device)
    own = default_size(case, whole)
    take_steps(whole, own, 1, 2)
    for name, p in net.weights.items():
        local(p).copy_(local(distribute_tensor(whole.weights[name].detach(), p.device_mesh, p.placements)))
    take_steps(net, optimizer, 3, 4)
    take_steps(whole, own, 3, 4)
    if case.has_norms:  # whose sums run over the shards; norms_over_ranks compares those
        return
    for name in (*ON_BLOCKS, "small"):
        assert bits(net.weights[name].full_tensor()) == bits(whole.weights[name])


def whole_to_one_process(place: Place) -> None:
    """A full state dict of sharded training loads into a plain optimizer, by torch's function and by ours."""
    for case in LAYOUTS:
        for at in sorted(place.folder.glob(f"{case.name}-*")):
            saved, whole = torch.load(at / "saved.pt", weights_only=False), torch.load(at / "whole.pt")
            for by_torch in (False, True):
                net = Net(place.device)
                optimizer = default_size(case, net)
                if by_torch:
                    set_optimizer_state_dict(net, optimizer, whole)
                else:
                    optimizer.load_state_dict(whole)
                check_loaded(place, case, saved, Saved(case, net, optimizer), 1)
            dcp_to_torch_save(at / "flat", at / "flat.pt")
            net = Net(place.device)
            optimizer = default_size(case, net)
            flat = torch.load(at / "flat.pt")["optimizer"]
            set_optimizer_state_dict(net, optimizer, flat, options=StateDictOptions(flatten_optimizer_state_dict=True))
            check_loaded(place, case, saved, Saved(case, net, optimizer), 1)


def one_process_to_shards(place: Place) -> None:
    """A checkpoint of one process loads into shards."""
    for case in LAYOUTS:
        alone = Net(place.device)
        own = default_size(case, alone)
        take_steps(alone, own, 1, 2)
        saved = Saved(case, alone, own)
        by_name = get_optimizer_state_dict(alone, own, options=StateDictOptions(cpu_offload=True, full_state_dict=True))
        if place.rank:
            by_name = get_optimizer_state_dict(alone, own)
        for way in ("ours", "ours by name", "torch"):
            net = sharded(place)
            optimizer = default_size(case, net)
            if way == "torch":
                set_optimizer_state_dict(net, optimizer, by_name, options=StateDictOptions(full_state_dict=True))
            else:
                optimizer.load_state_dict(own.state_dict() if way == "ours" else by_name)
            check_loaded(place, case, saved, Saved(case, net, optimizer), place.world)


def from_rank_0(place: Place) -> None:
    """broadcast_from_rank0: state that was gathered from shards loads, and that of one process."""
    case = LAYOUTS[0]
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    at = place.folder / f"{case.name}-{place.world}"
    whole = torch.load(at / "whole.pt") if place.rank == 0 else {}
    net = sharded(place)
    optimizer = default_size(case, net)
    set_optimizer_state_dict(net, optimizer, whole, options=options)
    saved = torch.load(at / "saved.pt", weights_only=False)
    check_loaded(place, case, saved, Saved(case, net, optimizer), place.world)
    alone = Net(place.device)
    own = default_size(case, alone)
    take_steps(alone, own, 1, 2)
    plain = get_optimizer_state_dict(alone, own) if place.rank == 0 else {}
    set_optimizer_state_dict(net, optimizer, plain, options=options)
    check_loaded(place, case, Saved(case, alone, own), Saved(case, net, optimizer), place.world)


def paged(place: Place) -> None:
    """Paged state of shards: the bits of state in memory, saved and loaded in either direction."""
    nets = [sharded(place), sharded(place)]
    folder = place.folder / f"paged-{place.rank}"
    folder.mkdir()
    pager = optim8.paging.Pager(directory=folder)
    optimizers = [
        optim8.AdamW8bit(nets[0].parameters(), lr=1e-2),
        optim8.PagedAdamW8bit(nets[1].parameters(), lr=1e-2, paged=pager),
    ]
    for net, optimizer in zip(nets, optimizers, strict=True):
        take_steps(net, optimizer, 1, 2)
    assert snapshot_local(optimizers[0]) == snapshot_local(optimizers[1])
    assert place.device.type == "cuda" or {at.tier for at in optimizers[1].placement()} == {"disk"}
    take_steps(nets[0], optimizers[0], 3, 3)
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        local(q).copy_(local(p))
    for net, optimizer in zip(nets, optimizers, strict=True):
        take_steps(net, optimizer, 4, 4)
    assert snapshot_local(optimizers[0]) == snapshot_local(optimizers[1])


def torch_optim_to_shards(place: Place) -> None:
    """State of torch.optim.AdamW, sharded or whole, becomes that of the shards."""
    case = CASES["AdamW8bit"]
    net, alone = sharded(place), Net(place.device)
    theirs = torch.optim.AdamW(net.parameters(), lr=1e-3)
    theirs_alone = torch.optim.AdamW(alone.parameters(), lr=1e-3)
    take_steps(net, theirs, 1, 2)
    take_steps(alone, theirs_alone, 1, 2)
    ends = []
    for state in (theirs.state_dict(), theirs_alone.state_dict()):
        target = sharded(place)
        optimizer = default_size(case, target)
        optimizer.load_state_dict(state)
        ends.append([state_bits(optimizer, p) for p in target.parameters()])
        for name, p in target.weights.items():
            assert optimizer.precision(p) == ("32bit" if name == "small" else "8bit"), name
    assert ends[0] == ends[1]


def tensor_parallel_checkpoint(place: Place) -> None:
    """State sharded by columns: saved, gathered, and loaded into the same sharding and into one process, exactly."""
    case = CASES["AdamW8bit"]
    make = lambda: torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Tanh(), torch.nn.Linear(96, 72))  # noqa: E731
    parallel = lambda: parallelize_module(  # noqa: E731
        make().to(place.device), place.mesh(), {"0": ColwiseParallel(), "2": RowwiseParallel()}
    )
    model = parallel()
    optimizer = default_size(case, model)
    model(torch.ones(6, 64, device=place.device)).square().mean().backward()
    optimizer.step()
    state = get_optimizer_state_dict(model, optimizer)
    dcp.save({"optimizer": state}, checkpoint_id=place.folder / "tensor_parallel")
    whole = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    for options in (StateDictOptions(), StateDictOptions(full_state_dict=True)):
        other = parallel()
        loaded = default_size(case, other)
        if options.full_state_dict:
            set_optimizer_state_dict(other, loaded, whole, options=options)
        else:
            target = {"optimizer": get_optimizer_state_dict(other, loaded)}
            dcp.load(target, checkpoint_id=place.folder / "tensor_parallel")
            set_optimizer_state_dict(other, loaded, target["optimizer"])
        states = [[state_bits(o, p) for p in m.parameters()] for o, m in ((optimizer, model), (loaded, other))]
        assert states[0] == states[1]
    alone = make().to(place.device)
    own = default_size(case, alone)
    set_optimizer_state_dict(alone, own, whole)
    # Two shards of a row are in blocks of their own: what is quantized anew stays within a gap of the code.
    entry, shard = own.state[alone[2].weight], optimizer.state[model[2].weight]
    assert entry["exp_avg_codes"].shape == (72, 96)
    assert shard["exp_avg_codes"].shape == (72, 96 // place.world)
    moment = optimizer.moments[0]
    largest = codec.dequantize(shard[moment.codes], shard[moment.absmax], signed=moment.signed).abs().max()
    kept = codec.dequantize(entry[moment.codes], entry[moment.absmax], signed=moment.signed).abs().max()
    torch.testing.assert_close(kept, max_over_ranks(largest))


def max_over_ranks(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


def refusals(place: Place) -> None:
    """What does not fit is refused by name, and nothing changes."""
    case = CASES["AdamW8bit"]
    net, alone = sharded(place), Net(place.device)
    optimizer, own = default_size(case, net), default_size(case, alone)
    take_steps(net, optimizer, 1, 1)
    take_steps(alone, own, 1, 1)
    with pytest.raises(ValueError, match=r"\['exp_avg_codes'\] is a DTensor, but the parameter is not"):
        own.load_state_dict(optimizer.state_dict())
    index = [p.shape for p in net.parameters()].index(SHAPES["rows_of_a_block"])
    absmax = optimizer.state_dict()["state"][index]["exp_avg_absmax"].full_tensor()
    broken: list[tuple[str, torch.Tensor, str]] = [
        ("exp_avg_codes", own.state_dict()["state"][index]["exp_avg_codes"][1:], "must be uint8"),
        ("exp_avg_absmax", own.state_dict()["state"][index]["exp_avg_absmax"][1:], "must be float32"),
        ("exp_avg_absmax", absmax[1:], "must be the tiles of"),
        ("exp_avg_absmax", absmax.double(), "must be the tiles of"),
        ("exp_avg_absmax", absmax[..., :1], "must be the tiles of"),
        ("exp_avg_absmax", absmax[..., :1].expand_as(absmax), "must be the tiles of"),
        ("exp_avg_absmax", absmax * torch.tensor([-1.0, 1.0], device=absmax.device) - 1e-30, "must be"),
        ("exp_avg_absmax", absmax * torch.tensor([float("nan"), 1.0], device=absmax.device), "must be finite"),
    ]
    before = snapshot_local(optimizer), snapshot_local(own)
    for loader in (optimizer, own):
        for key, bad, message in broken:
            state = loader.state_dict()
            state["state"][index] = {**own.state_dict()["state"][index], key: bad}
            with pytest.raises(ValueError, match=message) as error:
                loader.load_state_dict(state)
            assert f"state[{index}][{key!r}]" in str(error.value)
    assert (snapshot_local(optimizer), snapshot_local(own)) == before
    for convert in (optim8.convert.to_torch, optim8.convert.to_bitsandbytes):
        with pytest.raises(ValueError, match="parameters must be whole, got DTensors"):
            convert(optimizer)
    p = torch.nn.Parameter(DTensor.from_local(torch.ones(8, device=place.device), place.mesh(), [Partial()]))
    partial = case.make([p])
    p.grad = DTensor.from_local(torch.ones(8, device=place.device), place.mesh(), [Partial()])
    partial.step()
    with pytest.raises(ValueError, match="cannot be saved or loaded"):
        partial.state_dict()


SCENARIOS: dict[str, Scenario] = {
    f.__name__: f
    for f in (
        save_sharded,
        load_resharded,
        whole_to_one_process,
        one_process_to_shards,
        from_rank_0,
        paged,
        torch_optim_to_shards,
        tensor_parallel_checkpoint,
        refusals,
    )
}
