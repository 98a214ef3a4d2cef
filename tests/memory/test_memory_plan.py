"""What is planned is what is measured, to the byte, for several architectures, optimizers and dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from memory_harness import MODELS, bytes_by_kind, plain, train
from torch import nn

import optim8
from optim8.memory.planning.peers import PEERS
from optim8.memory.planning.plans import STATE
from optim8.paging import Pager

OPTIMIZERS = {"adam8bit": optim8.Adam8bit, "adamw8bit": optim8.AdamW8bit, "lion8bit": optim8.Lion8bit}
OPTIONS: tuple[dict[str, Any], ...] = ({}, {"min_8bit_size": 0}, {"min_8bit_size": 2000}, {"optim_bits": 32})
WEIGHTS: tuple[dict[str, Any], ...] = ({"master_bits": 24}, {"master_bits": 32})  # of 16-bit parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_planned_bytes_are_measured_bytes(name: str, dtype: torch.dtype, device: torch.device) -> None:
    make, data = MODELS[name]
    for kind, cls in OPTIMIZERS.items():
        for options in (*OPTIONS, *(WEIGHTS if dtype == torch.bfloat16 else ())):
            model = make().to(device, dtype)
            planned = optim8.memory.plan(model, kind, **options)
            optimizer = cls(model.parameters(), **options)
            train(model, optimizer, tuple(tensor.to(device) for tensor in data(dtype)))
            actual = bytes_by_kind(model, optimizer)
            assert planned.bytes == actual
            assert planned.total == sum(actual.values())
            assert planned.state_bytes == sum(t.nbytes for s in optimizer.state.values() for t in s.values())
            assert sum(planned.tiers.values()) == planned.total


@pytest.mark.parametrize("name", MODELS)
def test_sources_of_the_same_sizes_give_the_same_plan(name: str, tmp_path: Any) -> None:
    model = MODELS[name][0]()
    trainable = {key: p for key, p in model.named_parameters() if p.requires_grad}
    planned = optim8.memory.plan({key: tuple(p.shape) for key, p in trainable.items()}, "lion8bit", device="cpu")
    from safetensors.torch import save_file

    save_file({key: p.detach().clone() for key, p in trainable.items()}, tmp_path / "model.safetensors")
    with torch.device("meta"):
        meta = MODELS[name][0]()
    expected = optim8.memory.plan(meta, "lion8bit", device="cpu").bytes
    expected["buffers"] -= sum(buffer.nbytes for buffer in meta.buffers())
    expected["parameters"] -= sum(p.nbytes for p in meta.parameters() if not p.requires_grad)
    assert planned.bytes == expected
    assert optim8.memory.plan(tmp_path / "model.safetensors", "lion8bit", device="cpu").bytes == expected


def test_an_optimizer_is_planned_with_its_own_groups() -> None:
    model = MODELS["transformer"][0]()
    wide = [p for p in model.parameters() if p.dim() > 1]
    narrow = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = optim8.Adam8bit(
        [{"params": narrow, "min_8bit_size": 0}, {"params": wide[1:], "optim_bits": 32}, {"params": wide[:1]}]
    )
    planned = optim8.memory.plan(model, optimizer)
    train(model, optimizer, MODELS["transformer"][1](torch.float32))
    assert planned.bytes == bytes_by_kind(model, optimizer)


def test_an_optimizer_may_hold_frozen_parameters() -> None:
    model = MODELS["transformer"][0]()
    optimizer = optim8.AdamW8bit(model.parameters())
    for p in model.encoder.parameters():
        p.requires_grad_(False)
    planned = optim8.memory.plan(model, optimizer)
    train(model, optimizer, MODELS["transformer"][1](torch.float32))
    assert planned.bytes == bytes_by_kind(model, optimizer)
    for p in model.decoder.parameters():  # frozen later, their state stays
        p.requires_grad_(False)
    later = optim8.memory.plan(model, optimizer)
    assert later.state_bytes == planned.state_bytes
    assert later.bytes["gradients"] == 0


def test_small_adapters_are_told_to_keep_float32_state() -> None:
    """Adapters of LoRA are often under min_8bit_size; where that is a good part of the state, the plan says so."""
    adapters = {f"{i}.lora_A": [4, 512] for i in range(6)}
    for shapes, told in ((adapters, True), ({**adapters, "w": [1000, 1000]}, False)):
        planned = optim8.memory.plan({"parameters": shapes}, beside=False)
        assert bool(planned.notes) == told
        assert (
            "6 tensors of fewer values than min_8bit_size keep float32 state: 12,288 values" in str(planned)
        ) == told
    quantized = optim8.memory.plan({"parameters": adapters}, min_8bit_size=0)
    assert not quantized.notes
    assert quantized.state_bytes < 0.26 * optim8.memory.plan({"parameters": adapters}).state_bytes
    assert not optim8.memory.plan({"parameters": adapters}, optim_bits=32).notes  # asked for


def test_the_table_compares_with_16_bytes_a_parameter() -> None:
    sizes = {"parameters": {"w": [1024, 1024]}}
    planned = optim8.memory.plan(sizes, dtype="bfloat16")
    mixed = next(other for other in planned.beside if other.optimizer == "torch AdamW, float32 master")
    assert mixed.total == 16 * 2**20 + 4
    last = next(line for line in str(planned).splitlines() if line.startswith("bytes a parameter"))
    assert last.split()[3:6] == ["6.03", "8.00", "16.00"]
    assert "float32 master" not in str(optim8.memory.plan(sizes))
    theirs = optim8.memory.plan(sizes, "adamw", dtype="bfloat16")
    assert [other.optimizer for other in theirs.beside][:2] == ["optim8 AdamW8bit", "torch AdamW, float32 master"]
    assert theirs.optimizer == "torch AdamW"


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_overrides_are_planned(dtype: str | None) -> None:
    model = MODELS["transformer"][0]()
    first, last = model.encoder.layers[0], model.decoder.layers[1]
    with optim8.override(first, optim_bits=32), optim8.override("*norm*", module=last, min_8bit_size=0):
        planned = optim8.memory.plan(model, dtype=dtype)
        model.to(torch.bfloat16 if dtype else torch.float32)
        optimizer = optim8.AdamW8bit(model.parameters())
        train(model, optimizer, MODELS["transformer"][1](next(model.parameters()).dtype))
        assert planned.bytes == bytes_by_kind(model, optimizer)
        assert planned.bytes == optim8.memory.plan(model, optimizer).bytes
        without = optim8.memory.plan({name: tuple(p.shape) for name, p in model.named_parameters()}, dtype=dtype)
        assert without.bytes != planned.bytes


# Each optimizer gets a Pager of its own: those of one Pager share its budgets.
PAGERS: dict[str, Callable[[], Any]] = {
    "all on disk": lambda: True,
    "host budget": lambda: Pager(host_budget=200 * 1024, bucket=64 * 1024),
    "little": lambda: Pager(host_budget=64 * 1024, bucket=64 * 1024),
    "all in memory": lambda: Pager(host_budget="1GiB"),
}


@pytest.mark.parametrize("name", ["transformer", "cnn"])
@pytest.mark.parametrize("pager", PAGERS.values(), ids=PAGERS)
def test_paged_state_is_planned_by_tier(pager: Callable[[], Any], name: str) -> None:
    make, data = MODELS[name]
    model = make()
    params = list(model.parameters())
    for cls in (optim8.AdamW8bit, optim8.PagedLion8bit):
        planned = optim8.memory.plan(model, cls, paged=pager())
        optimizer = cls([{"params": params[::2]}, {"params": params[1::2], "min_8bit_size": 0}], paged=pager())
        train(model, optimizer, data(torch.float32))
        grouped = optim8.memory.plan(model, optimizer)
        streaming = sum(row.nbytes for row in grouped.rows if row.kind == "paging buffers")
        actual = bytes_by_kind(model, optimizer)
        assert grouped.bytes == {**actual, "buffers": actual["buffers"] + streaming}
        state = dict.fromkeys(grouped.tiers, 0)
        for row in grouped.rows:
            state[row.tier] += row.nbytes if row.kind in STATE else 0
        assert {tier: count for tier, count in state.items() if count} == optimizer.placement().bytes_by_tier()
        assert (streaming > 0) == (pager() is not True and "disk" in optimizer.placement().bytes_by_tier())
        alone = cls(params, paged=pager())
        train(model, alone, data(torch.float32))
        assert planned.bytes == optim8.memory.plan(model, alone).bytes


def test_paged_state_of_a_gpu_takes_what_is_free() -> None:
    sizes = {"parameters": {str(i): [1000, 1000] for i in range(10)}}
    state = 10 * (2 * 10**6 + 2 * 4 * 3907 + 4)
    fixed = 2 * 4 * 10**7
    resident = optim8.memory.plan(sizes)
    assert resident.tiers["host"] == 40  # counts of steps
    assert optim8.memory.plan(sizes, paged=True).tiers["device"] == fixed
    assert optim8.memory.plan(sizes, "pagedadamw8bit").tiers["host"] >= state
    half = optim8.memory.plan(sizes, paged=Pager(device_reserve=0), budget=fixed + state // 2)
    assert fixed + 0.4 * state < half.tiers["device"] <= fixed + state // 2
    assert half.tiers["host"] > 0.4 * state


def test_paged_state_of_a_gpu_that_fits_nowhere_is_refused() -> None:
    """As training refuses it; the error names a budget that makes it fit."""
    sizes = {"parameters": {str(i): [1000, 1000] for i in range(10)}}
    with pytest.raises(ValueError, match=r"^optim8\.memory\.plan: .*host_budget to (\d+)MiB") as refused:
        optim8.memory.plan(sizes, paged=Pager(device_budget="4MiB", host_budget="17MiB"))
    advised = str(refused.value).partition("host_budget to ")[2].partition(" ")[0]
    fits = optim8.memory.plan(sizes, paged=Pager(device_budget="4MiB", host_budget=advised))
    assert fits.tiers["disk"] == 0
    assert 0 < fits.tiers["device"] - 8 * 10**7 <= 4 * 2**20
    on_cpu = optim8.memory.plan(sizes, paged=Pager(device_budget="4MiB", host_budget="17MiB"), device="cpu")
    assert on_cpu.tiers["disk"] > 0
    with pytest.raises(ValueError, match="kept directory"):
        optim8.memory.plan(sizes, paged=Pager(keep=True, directory="x"))


def test_groups_share_the_budget_of_a_gpu() -> None:
    model = nn.ParameterList([nn.Parameter(torch.empty(1000, 1000)) for _ in range(4)])
    pager = Pager(device_budget="5MiB")
    optimizer = optim8.PagedAdamW8bit([{"params": [p]} for p in model], paged=pager)
    planned = optim8.memory.plan(model, optimizer, device="cuda")
    state = [row for row in planned.rows if row.kind in STATE and row.tier == "device"]
    assert 0 < sum(row.nbytes for row in state) <= 5 * 2**20


def test_dtypes_of_gradients_and_master_copies() -> None:
    config = {"parameters": {"w": [100, 70], "b": [70]}}
    plain_plan = optim8.memory.plan(config, dtype="bfloat16")
    assert plain_plan.bytes["parameters"] == plain_plan.bytes["gradients"] == 7070 * 2
    wide = optim8.memory.plan(config, dtype="bfloat16", grad_dtype=torch.float32, master_copies=True)
    assert wide.bytes["parameters"] == 7070 * 6
    assert wide.bytes["gradients"] == 7070 * 4
    assert wide.bytes["codes"] == plain_plan.bytes["codes"] == 14000
    torch_adamw = optim8.memory.plan(config, "torch-adamw", dtype="bfloat16", master_copies=True)
    assert torch_adamw.bytes["state32"] == 2 * 7070 * 4 + 2 * 4
    narrow = optim8.memory.plan(config, "torch-adamw", dtype="bfloat16")
    assert (narrow.bytes["state16"], narrow.bytes["state32"]) == (2 * 7070 * 2, 2 * 4)
    assert {row.kind for row in narrow.rows} == {"parameters", "gradients", "bfloat16 state", "step counts"}
    assert optim8.memory.plan(config, master_copies=True).bytes["parameters"] == 7070 * 4  # float32 needs no copy


@pytest.mark.peers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("peer", [peer for peer in PEERS if not peer.startswith("flashoptim")])
def test_bytes_of_other_libraries(peer: str, dtype: torch.dtype) -> None:
    make = {
        "torch-adamw": lambda params: torch.optim.AdamW(params),
        "bitsandbytes-adamw8bit": lambda p: pytest.importorskip("bitsandbytes").optim.AdamW8bit(p),
        "bitsandbytes-lion8bit": lambda p: pytest.importorskip("bitsandbytes").optim.Lion8bit(p),
        "torchao-adamw8bit": lambda p: pytest.importorskip("torchao.optim").AdamW8bit(p),
    }[peer]
    sizes = (1, 255, 4095, 4096, 4097, 4352, 70_000)
    model = nn.ParameterList([nn.Parameter(torch.ones(size, dtype=dtype)) for size in sizes])
    for p in model:
        p.grad = torch.ones_like(p)
    optimizer = make(model.parameters())
    torch.compiler.set_stance("force_eager")  # torchao compiles its step, which takes minutes
    try:
        optimizer.step()
    finally:
        torch.compiler.set_stance("default")
    tensors = [t for state in optimizer.state.values() for value in state.values() for t in plain(value)]
    planned = optim8.memory.plan(model, peer)
    assert planned.state_bytes == sum({t.untyped_storage().data_ptr(): t.nbytes for t in tensors}.values())
    assert planned.bytes["codes"] == sum(t.nbytes for t in tensors if t.dtype == torch.uint8)


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_shards_are_those_of_fully_shard(world_size: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        model = MODELS["transformer"][0]()
        whole = {name: p.numel() for name, p in model.named_parameters()}
        planned = optim8.memory.plan(model, world_size=world_size, sharding="fsdp")
        fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
        local = {name: p.to_local().numel() for name, p in model.named_parameters()}
        sharded = optim8.memory.plan(model)
        with pytest.raises(ValueError, match="sharded already"):
            optim8.memory.plan(model, world_size=2, sharding="fsdp")
    finally:
        torch.distributed.destroy_process_group()
    assert planned.bytes["parameters"] == planned.bytes["gradients"] == 4 * sum(local.values())
    assert planned.bytes["codes"] == 2 * sum(local[name] for name, size in whole.items() if size >= 4096)
    assert sharded.bytes == planned.bytes
    assert any(local[name] < 4096 <= size for name, size in whole.items())  # 8-bit by the whole size


def test_ddp_holds_everything_on_each_device() -> None:
    model = MODELS["cnn"][0]()
    assert optim8.memory.plan(model, world_size=4).bytes == optim8.memory.plan(model).bytes
