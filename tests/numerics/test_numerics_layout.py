"""Any size and any dense strides: the same result as for the same elements in a row, without a copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, EVERY, Case
from support.harness import ALL, DTYPES, bits, flat, hostile, parameter, shards_from, state_bits, values
from support.pairs import pairwise

# Each makes a dense tensor of 4 * 6 * 10 * 14 = 3360 elements whose memory order is not its logical order.
LAYOUTS = {
    "channels-last": lambda x: x.view(4, 6, 10, 14).contiguous(memory_format=torch.channels_last),
    "channels-last 3d": lambda x: x.view(2, 2, 6, 10, 14).contiguous(memory_format=torch.channels_last_3d),
    "transposed": lambda x: x.view(60, 56).t(),
    "permuted": lambda x: x.view(6, 40, 14).permute(2, 0, 1),
    "offset": lambda x: torch.cat([x[:3], x])[3:].view(24, 140),
    "ones in the shape": lambda x: x.view(1, 3360, 1).transpose(0, 1),
}


def _three_steps(case: Case, data: torch.Tensor, grads: list[torch.Tensor]) -> tuple[torch.Tensor, Any]:
    p = parameter(data)
    optimizer = case.make([p], case.hypers[0])
    for g in grads:
        p.grad = g
        optimizer.step()
    return p, optimizer


@pairwise(case=EVERY, layout=LAYOUTS, dtype=DTYPES)
def test_dense_strides(case: Case, layout: str, dtype: str, device: torch.device) -> None:
    """Blocks run in memory order, so a strided tensor is its memory in a row; nothing is moved or copied."""
    change = LAYOUTS[layout]
    data = change(hostile(3360, DTYPES[dtype], seed=1, small=-6, large=1).to(device))
    grads = [change(hostile(3360, DTYPES[dtype], seed=i).to(device)) for i in (2, 3, 4)]
    in_a_row, row_optimizer = _three_steps(case, flat(data).clone(), [flat(g).clone() for g in grads])
    strides, address = data.stride(), data.data_ptr()
    p, optimizer = _three_steps(case, data, grads)
    assert (p.stride(), p.data_ptr()) == (strides, address)
    assert bits(p) == bits(in_a_row)
    assert state_bits(optimizer, p) == state_bits(row_optimizer, in_a_row)
    for name in case.states:
        codes = optimizer.state[p][case.codes(name)]
        assert codes.shape == p.shape
        assert all(a == b for a, b, n in zip(codes.stride(), p.stride(), p.shape, strict=True) if n > 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@ALL
def test_a_gradient_of_other_strides_means_the_same(case: Case, layout: str, device: torch.device) -> None:
    data = LAYOUTS[layout](hostile(3360, torch.float32, seed=1, small=-6, large=1).to(device))
    grads = [hostile(3360, torch.float32, seed=i).to(device).view(data.shape) for i in (2, 3, 4)]
    matching = [torch.empty_strided(data.shape, data.stride(), device=device).copy_(g) for g in grads]
    p, _ = _three_steps(case, data.clone(memory_format=torch.preserve_format), matching)
    q, _ = _three_steps(case, data.clone(memory_format=torch.preserve_format), grads)
    assert bits(p) == bits(q)


GRADS = {
    "expanded": lambda n: torch.ones(1).expand(n),
    "every second": lambda n: torch.linspace(-1, 1, 2 * n)[::2],
    "negated lazily": lambda n: torch._neg_view(torch.linspace(-1, 1, n)),
    "zeros that have no memory": lambda n: torch._efficientzerotensor(n),
    "one column": lambda n: torch.linspace(-1, 1, 3 * n).view(n, 3)[:, 1],
}


@pytest.mark.parametrize("kind", GRADS)
@ALL
def test_gradients_that_are_not_plain_memory(case: Case, kind: str, device: torch.device) -> None:
    grads = [GRADS[kind](600).to(device)] * 3
    p, _ = _three_steps(case, torch.ones(600, device=device), grads)
    q, _ = _three_steps(case, torch.ones(600, device=device), [g + torch.zeros(600, device=device) for g in grads])
    assert bits(p) == bits(q)


@ALL
def test_a_parameter_with_gaps(case: Case, device: torch.device) -> None:
    """A view into a larger tensor: stepped right, or refused; what lies between its elements is not touched."""
    whole = torch.ones(600, 2, device=device)
    p = parameter(whole[:, 0], torch.linspace(-1, 1, 600, device=device))
    q = parameter(torch.ones(600, device=device), torch.linspace(-1, 1, 600, device=device))
    try:
        case.make([p], case.hypers[0]).step()
        case.make([q], case.hypers[0]).step()
    except ValueError as error:
        refused = str(error)
    else:
        refused = ""
    assert not refused or "group 0" in refused
    assert torch.equal(p, q)  # both stepped, or both not
    assert (whole[:, 1] == 1).all()


@ALL
def test_what_is_8bit_is_stated_and_can_be_asked_for(case: Case, device: torch.device) -> None:
    sizes = (1, 255, 4095, 4096, 5000)
    rows = [
        ({}, 4096),
        ({"min_8bit_size": 0}, 0),
        ({"min_8bit_size": 255}, 255),
        ({"min_8bit_size": 10**15}, 10**15),
        ({"optim_bits": 32, "min_8bit_size": 0}, 10**15),
    ]
    for options, least in rows:
        params = [parameter(torch.ones(n, device=device)) for n in sizes]
        optimizer = case.with_defaults(params, **case.hypers[0], **options)
        expected = ["8bit" if n >= least else "32bit" for n in sizes]
        assert [optimizer.precision(p) for p in params] == expected, "before the first step"
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert [optimizer.precision(p) for p in params] == expected
        for p, precision in zip(params, expected, strict=True):
            for name in case.states:
                in_8_bits, entry = precision == "8bit", optimizer.state[p]
                dtype = entry[case.codes(name) if in_8_bits else name].dtype
                assert dtype == (torch.uint8 if in_8_bits else torch.float32)
                assert (case.absmax(name) in entry) == in_8_bits


def _available_bytes() -> int:
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AdamW8bit", "SGD8bit", "LAMB8bit"])  # places are counted alike for every rule
def test_more_than_2_to_the_31_elements(name: str, device: torch.device) -> None:
    """The last blocks of a tensor of 2^31 + 300 elements end as they do in a shard of their own."""
    case = CASES[name]
    n, tail = 2**31 + 300, 44 + 2 * 256  # tail begins at a block
    needed = n * (2 + 2 + len(case.states)) + 2**30
    if device.type == "cpu" and _available_bytes() < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free memory")
    p = parameter(torch.zeros(n, dtype=torch.bfloat16, device=device))
    p.grad = torch.zeros(n, dtype=torch.bfloat16, device=device)
    g = hostile(tail, torch.bfloat16, seed=1).to(device)
    p.grad[-tail:] = g
    p.grad[:tail] = g
    optimizer = case.make([p], case.hypers[0])
    optimizer.step()
    q = parameter(torch.zeros(tail, dtype=torch.bfloat16, device=device), g)
    small = case.make([q], case.hypers[0])
    with shards_from({q: n - tail}):
        small.step()
    head = tail - tail % 256
    assert bits(p[-tail:]) == bits(q)
    start = parameter(torch.zeros(head, dtype=torch.bfloat16, device=device), g[:head])
    case.make([start], case.hypers[0]).step()
    assert bits(p[:head]) == bits(start)
    assert not p[head:-tail].any()
    for name in case.states:
        assert bits(optimizer.state[p][case.codes(name)][-tail:]) == bits(small.state[q][case.codes(name)])
        absmax = optimizer.state[p][case.absmax(name)]
        assert absmax.numel() == -(-n // 256)
        assert np.array_equal(values(absmax[-3:]), values(small.state[q][case.absmax(name)]))
