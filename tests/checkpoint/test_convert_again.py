"""A conversion and its way back: after the first, nothing changes any more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.convert_harness import make_params, ours, steps, twins
from support.harness import codes_of, snapshot

import optim8
from optim8 import codec
from optim8.state.layout import moments_of

PAIRS = {"Adam8bit": torch.optim.Adam, "AdamW8bit": torch.optim.AdamW}
OPTIMIZERS = [*PAIRS, "Lion8bit"]


def tensors(optimizer: Any) -> list[dict[str, Any]]:
    return [{k: v.clone() for k, v in optimizer.state[p].items()} for p in optimizer.param_groups[0]["params"]]


def all_extremes(optimizer: Any, params: list[torch.nn.Parameter]) -> None:
    """Every block gets another largest code, of either sign or of both, also far from the ends of the table."""
    generator = torch.Generator().manual_seed(3)
    for p in params:
        if optimizer.precision(p) == "32bit":
            continue
        entry = optimizer.state[p]
        for moment in moments_of(optimizer.moments, entry):
            absmax, codes = entry[moment.absmax], entry[moment.codes]
            new = torch.randint(256, (absmax.numel(), 256), generator=generator, dtype=torch.int16)
            reach = torch.arange(absmax.numel(), dtype=torch.int16)[:, None] % 127 + 1
            new = (new - 127).clamp(-reach, reach) + 127 if moment.signed else new.clamp(max=2 * reach)
            new[1::3] = new[1::3].clamp(max=127 if moment.signed else 255)
            codec.flat(codes).copy_(new.view(-1)[: p.numel()])
            absmax.copy_(10 ** torch.empty(absmax.shape).uniform_(-12, 0, generator=generator))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("codes", ["of steps", "of any reach"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_goes_to_torch_and_back_without_change(name: str, codes: str, dtype: torch.dtype) -> None:
    params = make_params(dtype)
    optimizer = ours(name, params)
    steps(params, optimizer, 0, 3)
    if codes == "of any reach":
        all_extremes(optimizer, params)
    before = tensors(optimizer)
    seen = []
    for _ in range(4):
        written = optim8.convert.to_torch(optimizer)
        if name in PAIRS:  # torch brings state into the dtype of the parameter
            theirs = PAIRS[name](twins(params))
            theirs.load_state_dict(written)
            written = theirs.state_dict()
        optimizer = ours(name, params)
        optimizer.load_state_dict(written)
        seen.append(snapshot(optimizer))
    assert seen[1:] == seen[:-1]
    if codes == "of steps" and dtype == torch.float32:
        for was, now in zip(before, tensors(optimizer), strict=True):
            for key, value in was.items():
                if key.endswith("_absmax"):  # divided and multiplied by the value of the lowest code
                    torch.testing.assert_close(now[key], value, rtol=2**-23, atol=0)
                elif value.dtype == torch.uint8:
                    assert (codes_of(now[key]) == codes_of(value)).all(), key


def test_a_largest_magnitude_keeps_its_value_of_either_sign() -> None:
    p = torch.nn.Parameter(torch.zeros(1024))
    theirs = torch.optim.AdamW([p])
    p.grad = torch.linspace(-1, 0.5, 1024)
    theirs.step()
    optimizer = optim8.AdamW8bit([p], min_8bit_size=0)
    optimizer.load_state_dict(theirs.state_dict())
    moment = theirs.state[p]["exp_avg"]
    back = optim8.convert.to_torch(optimizer)["state"][0]["exp_avg"]
    for block in range(0, 1024, 256):
        part = moment[block : block + 256]
        at = block + int(part.abs().argmax())
        torch.testing.assert_close(back[at], moment[at], rtol=2**-23, atol=0)


def test_precision_to_32_bits_and_back_changes_nothing() -> None:
    params = make_params()
    optimizer = optim8.AdamW8bit(params)
    steps(params, optimizer, 0, 2)
    seen = []
    for _ in range(3):
        with optim8.override(params[0], optim_bits=32):
            assert optimizer.precision(params[0]) == "32bit"
        with optim8.override(params[0], optim_bits=8):
            assert optimizer.precision(params[0]) == "8bit"
        seen.append(snapshot(optimizer))
    assert seen[1:] == seen[:-1]
