"""The step functions do what the optimizer classes do, except that no second moment is kept as its root."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import CASES
from support.harness import DTYPES, assert_stepped, bits, decode_state, set_grad, values

import optim8
from optim8 import functional as F

HYPER = {
    "adam": {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1},
    "lion": {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1},
}
ZEROS = {"adam": {"exp_avg": 127, "exp_avg_sq": 0}, "lion": {"exp_avg": 127}}  # the codes of 0
CLASSES = {"adam": optim8.AdamW8bit, "lion": optim8.Lion8bit}


def parameters(dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    dense = torch.randn(7, 100, device=device).to(dtype)
    last = torch.randn(2, 3, 4, 5, device=device).to(dtype).to(memory_format=torch.channels_last)
    return [dense, last, dense[0, 0].clone(), dense[:0].clone()]


def step(name: str, g: torch.Tensor, p: torch.Tensor, state: dict[str, Any], number: int, scale: float) -> None:
    hyper = HYPER[name]
    beta1, beta2 = hyper["betas"]
    eps, decay = hyper.get("eps", 0.0), hyper["weight_decay"]
    if "exp_avg_absmax" in state:
        F.optimizer_update_8bit_blockwise(
            name, g, p, state["exp_avg_codes"], state.get("exp_avg_sq_codes"),
            beta1, beta2, 0.0, 0.0, eps, number, hyper["lr"],
            F.create_dynamic_map(True).to(p.device),
            F.create_dynamic_map(False).to(p.device) if name == "adam" else None,
            state["exp_avg_absmax"], state.get("exp_avg_sq_absmax"), weight_decay=decay, gnorm_scale=scale,
        )  # fmt: skip
    else:
        F.optimizer_update_32bit(
            name, g, p, state["exp_avg"], beta1, eps, number, hyper["lr"], state.get("exp_avg_sq"), beta2,
            weight_decay=decay, gnorm_scale=scale,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_adam_keeps_the_second_moment_itself(device: torch.device, dtype: str) -> None:
    """As bitsandbytes does; the classes keep its root."""
    case = replace(CASES["AdamW8bit"], roots=frozenset())
    for p in parameters(DTYPES[dtype], device):
        state = {f"{key}_codes": torch.full_like(p, zero, dtype=torch.uint8) for key, zero in ZEROS["adam"].items()}
        state |= {f"{key}_absmax": torch.zeros(-(-p.numel() // 256), device=device) for key in ZEROS["adam"]}
        for number in range(1, 6):
            g = torch.randn_like(p)
            before = values(p), values(g) * 0.5, decode_state(case, state)
            step("adam", g, p, state, number, 0.5)
            assert_stepped(case, p, state, before, HYPER["adam"], number, dithered=False)


@pytest.mark.parametrize(
    ("name", "optim_bits"), [(name, bits) for name in CLASSES for bits in (8, 32) if (name, bits) != ("adam", 8)]
)
@pytest.mark.parametrize("g_dtype", ["own", "float32"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bit_equal_to_the_classes(device: torch.device, name: str, dtype: str, g_dtype: str, optim_bits: int) -> None:
    kind = torch.float32 if g_dtype == "float32" else DTYPES[dtype]
    ours = parameters(DTYPES[dtype], device)
    theirs = [torch.nn.Parameter(p.clone()) for p in ours]
    optimizer = CLASSES[name](theirs, **HYPER[name], min_8bit_size=0, optim_bits=optim_bits, rounding="nearest")
    for p in theirs:
        set_grad(p, torch.zeros_like(p, dtype=kind))
        p.grad.zero_()
    states: list[dict[str, Any]] = [{} for _ in ours]
    for number in range(1, 4):
        for p, q in zip(ours, theirs):
            g = torch.randn(p.shape, device=device).to(kind)
            q.grad.copy_(g * 0.5)
            p.grad_for_step = g  # a contiguous gradient, whatever the parameter's strides
        if number == 1:
            for p, state in zip(ours, states):
                for key, zero in ZEROS[name].items():
                    if optim_bits == 32:
                        state[key] = torch.zeros_like(p).float()
                    else:
                        state[key + "_codes"] = torch.full_like(p, zero, dtype=torch.uint8)
                        state[key + "_absmax"] = torch.zeros(-(-p.numel() // 256), device=device)
        optimizer.step()
        for p, state in zip(ours, states):
            version = p._version
            step(name, p.grad_for_step, p, state, number, 0.5)
            assert p._version > version
    for p, q, state in zip(ours, theirs, states):
        assert bits(p) == bits(q)
        for key, value in state.items():
            assert bits(value) == bits(optimizer.state[q][key]), key


def test_gradients_are_left_alone(device: torch.device) -> None:
    p = torch.nn.Parameter(torch.ones(5, device=device))
    g, m = torch.ones(5, device=device), torch.zeros(5, device=device)
    F.optimizer_update_32bit("lion", g, p, m, 0.9, 0.0, 1, 0.1, beta2=0.99)
    assert p.grad is None
    assert g.tolist() == [1] * 5
    assert p.tolist() == pytest.approx([0.9] * 5)
