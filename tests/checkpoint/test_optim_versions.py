"""What earlier versions saved goes on; and no other optimizer takes what we save for its own.

To the bit, but for second moments in 8 bits, of which earlier versions kept no roots: they are quantized once more.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import EVERY, Case
from support.convert_harness import REQUANTIZED
from support.harness import bits
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

import optim8
from optim8.state.layout import moments_of

DATA = Path(__file__).parents[1] / "data"
# 0.1.0, and a later commit whose codes have keys of their own.
FOLDERS = pytest.mark.parametrize("folder", [DATA / "v0.1.0", DATA / "33be66e"], ids=lambda folder: folder.name)

spec = importlib.util.spec_from_file_location("write_v010", DATA / "v0.1.0" / "write.py")
assert spec is not None
assert spec.loader is not None
write = importlib.util.module_from_spec(spec)
spec.loader.exec_module(write)


def load(path: Path, **options: Any) -> Any:
    return torch.load(path, weights_only=True, **options)


def assert_goes_on(params: Any, optimizer: Any, after: list[torch.Tensor]) -> None:
    """Two more steps lead where they led, rounded as then, and the state has today's names."""
    for group in optimizer.param_groups:
        group["rounding"] = "nearest"
    before = [p.detach().clone() for p in params]
    write.steps(params, optimizer, 3, 5)
    for p, was, value in zip(params, before, after, strict=True):
        requantized = optimizer.precision(p) == "8bit" and any(moment.root for moment in optimizer.moments)
        assert_led_to(p, was, value, requantized)
    assert [optimizer.precision(p) for p in params] == ["8bit", "8bit", "8bit", "32bit"]
    for p in params:
        entry = optimizer.state[p]
        codes = {moment.codes for moment in moments_of(optimizer.moments, entry)}
        assert (codes <= entry.keys()) == (optimizer.precision(p) == "8bit")
        assert ("exp_avg" in entry) == (optimizer.precision(p) == "32bit")


def assert_led_to(p: torch.Tensor, before: torch.Tensor, after: torch.Tensor, requantized: bool) -> None:
    if requantized:
        assert bits(p) != bits(before)
        # Rounding to bfloat16 makes more of a small difference.
        within = REQUANTIZED * (1 if p.dtype == torch.float32 else 3)
        assert (p - after).float().norm() <= within * (after - before).float().norm()
    else:
        assert bits(p) == bits(after)


def fill(params: Any, values: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for p, value in zip(params, values, strict=True):
            p.copy_(value)


@FOLDERS
@pytest.mark.parametrize("name", ["Adam8bit", "AdamW8bit", "Lion8bit"])
def test_a_state_dict_of_an_earlier_version_goes_on(folder: Path, name: str) -> None:
    saved = load(folder / "state_dicts.pt")[name]
    params, optimizer = write.make(getattr(optim8, name))
    optimizer.load_state_dict(saved["state_dict"])
    fill(params, saved["params"])
    assert_goes_on(params, optimizer, saved["after"])


@FOLDERS
@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit"])
def test_a_pickle_of_an_earlier_version_goes_on(folder: Path, name: str) -> None:
    params, optimizer = torch.load(folder / f"{name}.pickle.pt", weights_only=False)
    assert_goes_on(params, optimizer, load(folder / "pickles_after.pt")[name])


@FOLDERS
def test_a_kept_directory_of_an_earlier_version_goes_on(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder / "kept", tmp_path / "kept")
    saved = load(folder / "kept_after.pt")
    pager = optim8.paging.Pager(directory=copy, keep=True, resume=True)
    params, optimizer = write.make(optim8.AdamW8bit, paged=pager)
    fill(params, saved["params"])
    assert_goes_on(params, optimizer, saved["after"])
    optimizer.close()
    # It was written anew under today's names.
    again = write.make(optim8.AdamW8bit, paged=pager)[1]
    assert {"exp_avg_codes", "exp_avg_sq_root_codes"} <= next(iter(again.state.values())).keys()
    again.close()


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@FOLDERS
@pytest.mark.parametrize("shard", [False, True])
def test_sharded_state_of_an_earlier_version_goes_on(one_rank: None, folder: Path, shard: bool) -> None:
    saved, model = load(folder / "sharded.pt"), write.net()
    fill(model.parameters(), saved["params"])
    if shard:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
    optimizer = optim8.AdamW8bit(model.parameters(), lr=1e-2, min_8bit_size=100, rounding="nearest")
    if shard:
        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(model, optimizer, saved["state_dict"], options=options)
    else:
        optimizer.load_state_dict(by_position(saved["state_dict"], model))
    write.net_steps(model, optimizer, 3, 5)
    for p, before, after in zip(model.parameters(), saved["params"], saved["after"], strict=True):
        full = p.full_tensor() if shard else p
        assert_led_to(full.detach(), before, after, requantized=True)  # gradients depend on all parameters


def by_position(state_dict: dict[str, Any], model: torch.nn.Module) -> dict[str, Any]:
    """A dict with names of parameters as one with positions."""
    places = {name: place for place, (name, _) in enumerate(model.named_parameters())}
    groups = [{**group, "params": [places[n] for n in group["params"]]} for group in state_dict["param_groups"]]
    return {"state": {places[n]: entry for n, entry in state_dict["state"].items()}, "param_groups": groups}


@pytest.mark.parametrize("theirs", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam])
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_another_optimizer_that_loads_our_dict_cannot_step(case: Case, theirs: Any) -> None:
    """Codes stand under no name that it knows, so it fails instead of training with them."""
    p = torch.nn.Parameter(torch.ones(5000))
    p.grad = torch.ones(5000)
    ours = case.make([p])
    ours.step()
    other = theirs([p])
    before = bits(p)
    saved = ours.state_dict()
    groups = [{**other.state_dict()["param_groups"][0], **group} for group in saved["param_groups"]]

    def go_on() -> None:
        other.load_state_dict({**saved, "param_groups": groups})
        other.step()

    # NAdam looks while loading; of AdEMAMix there are three betas.
    with pytest.raises((KeyError, ValueError), match=r"exp_avg|mu_product|too many values"):
        go_on()
    assert bits(p) == before
