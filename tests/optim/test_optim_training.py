"""200 steps on a small real problem end where torch.optim ends."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import Case
from support.harness import ALL


class PlainLion(torch.optim.Optimizer):
    """arXiv 2302.06675, algorithm 2, in float32 and nothing else: torch.optim has no Lion."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_((beta1 * m + (1 - beta1) * p.grad).sign(), alpha=-group["lr"])
                m.lerp_(p.grad, 1 - beta2)


class PlainAdEMAMix(torch.optim.Optimizer):
    """arXiv 2409.03137, algorithm 1, in float32 and nothing else, both schedules over `warmup` steps."""

    def __init__(self, params: Any, t_alpha: int, t_beta3: int, **hyper: Any) -> None:
        assert t_alpha == t_beta3
        super().__init__(params, {"warmup": t_alpha, **hyper})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            lr, (beta1, beta2, beta3) = group["lr"], group["betas"]
            for p in group["params"]:
                state = self.state[p]
                state["t"] = t = state.get("t", 0) + 1
                part = min(t / group["warmup"], 1.0)
                inverse = (1 - part) / math.log(beta1) + part / math.log(beta3)
                fast, slow, v = (state.setdefault(name, torch.zeros_like(p)) for name in ("fast", "slow", "v"))
                fast.lerp_(p.grad, 1 - beta1)
                slow.lerp_(p.grad, 1 - math.exp(1 / inverse))
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                momentum = fast / (1 - beta1**t) + part * group["alpha"] * slow
                p.mul_(1 - lr * group["weight_decay"])
                p.addcdiv_(momentum, (v / (1 - beta2**t)).sqrt() + 1e-8, value=-lr)


class PlainLAMB(torch.optim.Optimizer):
    """arXiv 1904.00962, algorithm 2, in float32 and nothing else."""

    def __init__(self, params: Any, **hyper: Any) -> None:
        super().__init__(params, hyper)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                state["t"] = t = state.get("t", 0) + 1
                m, v = (state.setdefault(name, torch.zeros_like(p)) for name in ("m", "v"))
                m.lerp_(p.grad, 1 - beta1)
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                direction = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + 1e-8) + group["weight_decay"] * p
                ratio = float(p.norm() / direction.norm()) if p.norm() > 0 and direction.norm() > 0 else 1.0
                p.add_(direction, alpha=-group["lr"] * ratio)


class PlainLARS(torch.optim.Optimizer):
    """arXiv 1708.03888, algorithm 1, in float32 and nothing else, with Nesterov's momentum."""

    def __init__(self, params: Any, nesterov: bool, **hyper: Any) -> None:
        assert nesterov
        super().__init__(params, hyper)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            decay, momentum = group["weight_decay"], group["momentum"]
            for p in group["params"]:
                below = p.grad.norm() + decay * p.norm()
                ratio = group["trust_coefficient"] * p.norm() / below if p.norm() > 0 and below > 0 else 1.0
                g = (p.grad + decay * p) * ratio
                m = self.state[p].setdefault("m", torch.zeros_like(p)).mul_(momentum).add_(g)
                p.add_(g + momentum * m, alpha=-group["lr"])


PLAIN: dict[str, Any] = {
    "Lion8bit": PlainLion,
    "AdEMAMix8bit": PlainAdEMAMix,
    "Muon8bit": torch.optim.AdamW,
    "LAMB8bit": PlainLAMB,
    "LARS8bit": PlainLARS,
}


def _train(make: Any, seed: int, device: torch.device) -> tuple[float, float]:
    """Regression on a noisy nonlinear function of 16 inputs: the loss at the start, and of 2048 points at the end."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2048, 16, generator=generator).to(device)
    w = torch.randn(16, 4, generator=generator).to(device)
    y = torch.sin(x @ w / 2).sum(1, keepdim=True) + 0.5 * torch.randn(2048, 1, generator=generator).to(device)
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(16, 128), torch.nn.GELU(), torch.nn.Linear(128, 64), torch.nn.GELU(), torch.nn.Linear(64, 1)
    ).to(device)
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    loss_of = torch.nn.functional.mse_loss
    start = loss_of(model(x), y).item()
    for t in range(200):
        batch = slice(128 * (t % 16), 128 * (t % 16 + 1))
        optimizer.zero_grad()
        loss_of(model(x[batch]), y[batch]).backward()
        optimizer.step()
        schedule.step()
    return start, loss_of(model(x), y).item()


@pytest.mark.parametrize("seed", [1, 2, 3])
@ALL
def test_200_steps_end_within_one_percent_of_32bit(case: Case, seed: int, device: torch.device) -> None:
    hyper = case.training
    plain = case.torch_class or PLAIN[case.name]
    start, expected = _train(lambda params: plain(params, **hyper), seed, device)
    _, actual = _train(lambda params: case.make(params, hyper), seed, device)
    assert expected < 0.7 * start, "the problem must have been learned for the comparison to mean anything"
    assert abs(actual - expected) <= 0.01 * expected
