"""A kept directory is resumed with the parameters that its last step left, and with no others unnoticed."""

from __future__ import annotations

import copy
import gc
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.harness import bits, parameter, snapshot
from test_paging_kept import ADAMW, keep

from optim8.paging import Pager
from optim8.paging.directory import fingerprint

KINDS: dict[str, Callable[[], torch.Tensor]] = {
    "float32": lambda: torch.randn(70_001),
    "bfloat16": lambda: torch.randn(70_001, dtype=torch.bfloat16),
    "few values": lambda: torch.randn(3),
    "one value": lambda: torch.randn(()),
    "matrix": lambda: torch.randn(300, 301),
    "transposed": lambda: torch.randn(300, 301).t(),
    "channels last": lambda: torch.randn(20, 30, 5, 7).contiguous(memory_format=torch.channels_last),
    "a view": lambda: torch.randn(2, 70_000, dtype=torch.bfloat16)[1],
    "empty": lambda: torch.randn(0, 3),
}
Params = list[torch.nn.Parameter]


def model(seed: int = 0) -> Params:
    """One parameter of each kind, and a last one that has no gradient."""
    torch.manual_seed(seed)
    return [parameter(make()) for make in (*KINDS.values(), KINDS["float32"])]


def made(params: Params, pager: Pager) -> Any:
    """In two groups."""
    return ADAMW.make([{"params": params[:4]}, {"params": params[4:]}], paged=pager)


def step(params: Params, optimizer: Any) -> None:
    torch.manual_seed(99)
    for p in params[:-1]:
        p.grad = torch.randn_like(p)
    optimizer.step()


def put(params: Params, values: list[torch.Tensor]) -> None:
    """As a checkpoint of a model is loaded."""
    with torch.no_grad():
        for p, value in zip(params, values, strict=True):
            p.copy_(value)


def values_of(params: Params) -> list[torch.Tensor]:
    return [p.detach().clone() for p in params]


@pytest.fixture
def history(tmp_path: Path) -> list[list[torch.Tensor]]:
    """The parameters before each step of a run of two that left its directory, and after."""
    params = model()
    optimizer = made(params, keep(tmp_path))
    seen = [values_of(params)]
    for _ in range(2):
        step(params, optimizer)
        seen.append(values_of(params))
    optimizer.close()
    return seen


def _next_bits(p: torch.Tensor, at: int) -> None:
    """The smallest change of one value, in memory order of the logical elements."""
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(at % p.numel()), p.shape))
    with torch.no_grad():
        p[index] = torch.nextafter(p[index], torch.tensor(torch.inf, dtype=p.dtype))


def _in_bfloat16(params: Params) -> None:
    params[0].data = params[0].data.bfloat16()


# What is done to the right parameters, and the error of the first step.
CHANGES: dict[str, tuple[Callable[[Params], Any], str | None]] = {
    "nothing": (lambda params: None, None),
    "other strides": (lambda params: [setattr(p, "data", p.data.contiguous()) for p in params], None),
    "without state": (lambda params: _next_bits(params[-1], 0), None),
    "another run": (lambda params: put(params, [p.detach() for p in model(1)]), "parameter 0 .*, nor are 7 others"),
    "another dtype": (_in_bfloat16, r"parameter 0 .* It was float32 and is bfloat16\."),
    **{
        f"{end} value of {kind}": (
            lambda params, place=place, at=at: _next_bits(params[place], at),  # type: ignore[misc]
            rf"parameter {place} is not what it was",
        )
        for place, kind in enumerate(KINDS)
        if kind != "empty"
        for end, at in (("first", 0), ("last", -1))
    },
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_parameter_that_is_not_what_the_last_step_left_is_refused(
    what: str, history: list[list[torch.Tensor]], tmp_path: Path
) -> None:
    """Nothing is changed then; with the right parameters, or when told so, the run goes on."""
    change, message = CHANGES[what]
    params = model(2)
    optimizer = made(params, keep(tmp_path, resume=True))
    put(params, history[-1])  # after the optimizer was made, as a loaded checkpoint may be
    change(params)
    if message is None:
        step(params, optimizer)
        return
    before = snapshot(optimizer, params)
    for _ in range(2):
        with pytest.raises(ValueError, match=message) as error:
            step(params, optimizer)
        assert snapshot(optimizer, params) == before
    for part in ("AdamW8bit: ", str(tmp_path / "kept"), "step 2", "another run. Load", "changed_params=True"):
        assert part in str(error.value)
    optimizer.close()
    optimizer = made(params, keep(tmp_path, resume=True, changed_params=True))
    step(params, optimizer)
    optimizer.close()
    optimizer = made(params, keep(tmp_path, resume=True))  # the changed ones are the right ones now
    step(params, optimizer)


@pytest.mark.parametrize("earlier", [0, 1])
def test_parameters_of_an_earlier_step_are_refused(
    earlier: int, history: list[list[torch.Tensor]], tmp_path: Path
) -> None:
    """Loaded before or after the optimizer is made; the right ones may be loaded after the refusal."""
    params = model(2)
    put(params, history[earlier])
    optimizer = made(params, keep(tmp_path, resume=True))
    with pytest.raises(ValueError, match="parameter 0 is not what it was"):
        step(params, optimizer)
    put(params, history[-1])
    for _ in range(2):  # compared once
        step(params, optimizer)
    assert bits(params[0]) != bits(history[-1][0])


def test_a_run_that_made_no_step_leaves_the_check_to_the_next(
    history: list[list[torch.Tensor]], tmp_path: Path
) -> None:
    params = model(2)
    for end in ("flush", "close", "state_dict"):
        optimizer = made(params, keep(tmp_path, resume=True))
        getattr(optimizer, end)()
        optimizer.close()
    optimizer = made(params, keep(tmp_path, resume=True))
    with pytest.raises(ValueError, match="parameter 0 is not what it was"):
        step(params, optimizer)
    optimizer.close()
    optimizer = made(params, keep(tmp_path, resume=True))
    put(params, history[-1])
    step(params, optimizer)


def test_groups_that_are_added_late(history: list[list[torch.Tensor]], tmp_path: Path) -> None:
    params = model(2)
    put(params, history[-1])
    _next_bits(params[5], 0)
    optimizer = ADAMW.make(params[:4], paged=keep(tmp_path, resume=True))
    with pytest.raises(RuntimeError, match="lacks"):
        optimizer.step()
    optimizer.add_param_group({"params": params[4:]})
    with pytest.raises(ValueError, match="parameter 5 is not what it was"):
        step(params, optimizer)


@pytest.mark.parametrize("end", ["flush", "close", "gone"])
def test_the_parameters_of_the_last_step_are_those_that_count(end: str, tmp_path: Path) -> None:
    """Those that are loaded after a flush, such as the best of a run, do not."""
    params = model()
    optimizer = made(params, keep(tmp_path))
    step(params, optimizer)
    right = values_of(params)
    if end == "flush":
        optimizer.flush()
        put(params, [p.detach() for p in model(1)])
        optimizer.close()
    elif end == "close":
        optimizer.close()
    else:
        del optimizer
        gc.collect()
    params = model(1)
    optimizer = made(params, keep(tmp_path, resume=True))
    with pytest.raises(ValueError, match="parameter 0 is not what it was"):
        step(params, optimizer)
    put(params, right)
    step(params, optimizer)


def _stepped(params: Params, optimizer: Any) -> None:
    step(params, optimizer)


def _stepped_after_flush(params: Params, optimizer: Any) -> None:
    optimizer.flush()
    step(params, optimizer)


def _loaded(params: Params, optimizer: Any) -> None:
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.flush()


def _loaded_after_flush(params: Params, optimizer: Any) -> None:
    optimizer.flush()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.flush()


def _as_if_killed(last: Callable[[Params, Any], None], folder: Path) -> tuple[list[torch.Tensor], Path]:
    """Parameters, and a copy of a directory as a process leaves it that is killed then."""
    params = model()
    (folder / "a").mkdir()
    optimizer = made(params, keep(folder / "a"))
    step(params, optimizer)
    last(params, optimizer)
    shutil.copytree(folder / "a", folder / "b")
    return values_of(params), folder / "b"


@pytest.mark.parametrize("last", [_loaded, _loaded_after_flush])
def test_nothing_is_compared_after_a_state_dict_was_loaded(last: Callable[[Params, Any], None], tmp_path: Path) -> None:
    _, left = _as_if_killed(last, tmp_path)
    others = model(1)
    step(others, made(others, keep(left, resume=True)))


@pytest.mark.parametrize("last", [_stepped, _stepped_after_flush])
def test_without_a_flush_after_the_last_step_a_few_parameters_are_compared(
    last: Callable[[Params, Any], None], tmp_path: Path
) -> None:
    right, left = _as_if_killed(last, tmp_path)
    params = model(1)
    optimizer = made(params, keep(left, resume=True))
    with pytest.raises(ValueError, match=r"parameter 0 .* was stepped last \(step 2\)"):
        step(params, optimizer)
    put(params, right)
    step(params, optimizer)


def test_loaded_state_is_not_that_of_the_directory(history: list[list[torch.Tensor]], tmp_path: Path) -> None:
    params = model(2)
    donor = ADAMW.make([{"params": params[:4]}, {"params": params[4:]}])
    step(params, donor)
    optimizer = made(params, keep(tmp_path, resume=True))
    optimizer.load_state_dict(donor.state_dict())
    step(params, optimizer)


def test_directories_of_earlier_versions_are_resumed(history: list[list[torch.Tensor]], tmp_path: Path) -> None:
    (tmp_path / "kept" / "params.json").unlink()
    with (tmp_path / "kept" / "journal").open("r+b") as journal:
        journal.seek(10)
        journal.write(b"\0")
        journal.seek(64)
        journal.write(b"\0" * 8)
    params = model(1)
    step(params, made(params, keep(tmp_path, resume=True)))


def test_a_fork_does_not_speak_for_the_parameters(tmp_path: Path) -> None:
    params = [parameter(torch.ones(3))]
    optimizer = ADAMW.make(params, paged=keep(tmp_path))
    params[0].grad = torch.ones(3)
    optimizer.step()
    child = os.fork()
    if child == 0:
        optimizer.flush()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not (tmp_path / "kept" / "params.json").exists()


def test_copies_are_not_checked(history: list[list[torch.Tensor]], tmp_path: Path) -> None:
    params = model(2)
    optimizer = made(params, keep(tmp_path, resume=True, changed_params=True))
    twins, twin = copy.deepcopy((params, optimizer))
    step(twins, twin)


def _without_memory() -> torch.Tensor:
    t = torch.ones(100_000)
    t.untyped_storage().resize_(0)
    return t


@pytest.mark.parametrize("make", [_without_memory, lambda: torch.empty(5, device="meta")], ids=["freed", "meta"])
def test_values_that_are_not_there_have_no_fingerprint(make: Callable[[], torch.Tensor]) -> None:
    assert fingerprint.of(make()) is None


def test_a_fingerprint_reads_a_sample() -> None:
    """Of 2**40 values, all in one place of memory, as of few; and in logical order, whatever the strides."""
    huge = torch.ones(1).expand(2**20, 2**20)
    assert fingerprint.of(huge) == fingerprint.of(torch.ones(fingerprint.SAMPLE))
    for size in (0, 1):  # a stride of 0, as numpy gives it
        assert fingerprint.of(torch.ones(1).as_strided((size,), (0,))) == fingerprint.of(torch.ones(size))
    for shape in ((7,), (3, 5), (70, 80, 3)):
        apart = torch.randn(*shape, 2)[..., 0]
        assert fingerprint.of(apart) == fingerprint.of(apart.contiguous())
    assert fingerprint.of(torch.zeros(5)) != fingerprint.of(-torch.zeros(5))
    assert fingerprint.of(torch.zeros(5)) != fingerprint.of(torch.zeros(5, dtype=torch.bfloat16))
