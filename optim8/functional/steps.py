"""One optimizer step of one tensor, as functions: thin wrappers over the native step that the optimizers use. Kept for
code that calls them; new code uses the classes of optim8."""

from __future__ import annotations

from typing import Any

import torch

from optim8 import _native, codec, rules
from optim8.codec import BLOCK
from optim8.functional import _check
from optim8.rules import Rule
from optim8.state.layout import dense_grad
from optim8.step.arrays import step_array


def optimizer_update_8bit_blockwise(
    optimizer_name: str,
    g: torch.Tensor,
    p: torch.Tensor,
    state1: torch.Tensor,
    state2: torch.Tensor | None,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    step: int,
    lr: float,
    qmap1: torch.Tensor,
    qmap2: torch.Tensor | None,
    absmax1: torch.Tensor,
    absmax2: torch.Tensor | None,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    skip_zeros: bool = False,
) -> None:
    """One step with 8-bit state, in place.

    Args:
        optimizer_name: "adam" (or "adamw": decoupled weight decay, torch's AdamW) or "lion".
        g: the gradient, of p's shape, of p's dtype or float32.
        p: the parameter: float32, bfloat16 or float16.
        state1, state2: uint8 codes of the first and second moment, of p's shape and strides; lion has no state2.
        beta1, beta2, eps, lr, weight_decay: as for the optimizers.
        beta3, alpha: only 0; no rule here has them.
        step: the number of this step, from 1.
        qmap1, qmap2: the tables of the codes: `create_dynamic_map(signed=True)` and `create_dynamic_map(signed=False)`.
        absmax1, absmax2: float32 [ceil(n / 256)].
        gnorm_scale: the gradient is multiplied by it.
        skip_zeros: only False.

    Raises:
        TypeError: an argument is no dense tensor.
        ValueError: an argument cannot be honoured; wrong dtype, shape, strides or device. Nothing was changed.

    Source: Dettmers et al. 2021, arXiv 2110.02861.

    Examples:
        >>> import torch
        >>> from optim8 import functional as F
        >>> p, g = torch.zeros(256), torch.ones(256)
        >>> m, v = torch.full((256,), 127, dtype=torch.uint8), torch.zeros(256, dtype=torch.uint8)
        >>> maps = F.create_dynamic_map(signed=True), F.create_dynamic_map(signed=False)
        >>> a, b = torch.zeros(1), torch.zeros(1)
        >>> F.optimizer_update_8bit_blockwise("adam", g, p, m, v, 0.9, 0.999, 0, 0, 1e-8, 1, 0.5, *maps, a, b)
        >>> p[0], m[0], a
        (tensor(-0.5000), tensor(255, dtype=torch.uint8), tensor([0.1000]))
    """
    who = "optimizer_update_8bit_blockwise"
    check_tensors(who, g, p)
    if _check.through_op(p):
        scalars = (beta1, beta2, beta3, alpha, eps, step, lr)
        scales = (qmap1, qmap2, absmax1, absmax2, weight_decay, gnorm_scale, skip_zeros)
        torch.ops.optim8.optimizer_update_8bit_blockwise(optimizer_name, g, p, state1, state2, *scalars, *scales)
        return
    rule = _rule(who, optimizer_name, beta3, alpha, skip_zeros)
    entry: dict[str, torch.Tensor] = {}
    given = ((state1, qmap1, absmax1), (state2, qmap2, absmax2))
    for i in range(2):
        state, qmap, absmax = given[i]
        if i >= len(rule.moments):
            _check_absent(who, optimizer_name, {"state2": state, "qmap2": qmap, "absmax2": absmax})
            continue
        moment = rule.moments[i].direct
        entry[moment.codes] = _check_state(who, f"state{i + 1}", state, p, torch.uint8)
        _check_map(who, f"qmap{i + 1}", qmap, moment.signed)
        blocks = _check.blocks(p.numel(), BLOCK)
        absmax = _check.tensor(who, f"absmax{i + 1}", absmax, (torch.float32,))
        _check.on_device(who, f"absmax{i + 1}", absmax, p.device, "p")
        why = f"{p.numel()} values / blocksize {BLOCK}, rounded up"
        _check.entries(who, f"absmax{i + 1}", absmax, blocks, why, "Allocate it so.")
        entry[moment.absmax] = absmax
    hypers = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": weight_decay}
    _run(who, rule, g, p, entry, step, hypers, gnorm_scale)


def optimizer_update_32bit(
    optimizer_name: str,
    g: torch.Tensor,
    p: torch.Tensor,
    state1: torch.Tensor,
    beta1: float,
    eps: float,
    step: int,
    lr: float,
    state2: torch.Tensor | None = None,
    beta2: float = 0.0,
    beta3: float = 0.0,
    alpha: float = 0.0,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    unorm_vec: torch.Tensor | None = None,
    max_unorm: float = 0.0,
    skip_zeros: bool = False,
) -> None:
    """One step with float32 state, in place.

    Args:
        optimizer_name, g, p, beta1, beta2, beta3, alpha, eps, step, lr, weight_decay, gnorm_scale, skip_zeros: as for
            `optimizer_update_8bit_blockwise`.
        state1, state2: float32 of p's shape and strides; lion has no state2.
        unorm_vec, max_unorm: only None and 0; updates are not clipped by their norm.

    Raises:
        TypeError: an argument is no dense tensor.
        ValueError: an argument cannot be honoured; wrong dtype, shape, strides or device. Nothing was changed.

    Examples:
        >>> import torch
        >>> from optim8 import functional as F
        >>> p, m = torch.zeros(3), torch.zeros(3)
        >>> F.optimizer_update_32bit("lion", torch.ones(3), p, m, beta1=0.9, eps=0.0, step=1, lr=0.25, beta2=0.5)
        >>> p, m
        (tensor([-0.2500, -0.2500, -0.2500]), tensor([0.5000, 0.5000, 0.5000]))
    """
    who = "optimizer_update_32bit"
    check_tensors(who, g, p)
    if _check.through_op(p):
        scalars = (beta1, beta2, beta3, alpha, eps, step, lr, weight_decay, gnorm_scale)
        clip = (unorm_vec, max_unorm, skip_zeros)
        torch.ops.optim8.optimizer_update_32bit(optimizer_name, g, p, state1, state2, *scalars, *clip)
        return
    rule = _rule(who, optimizer_name, beta3, alpha, skip_zeros)
    if unorm_vec is not None or max_unorm != 0.0:
        raise ValueError(f"{who}: unorm_vec must be None and max_unorm 0. Clip the gradient before the step instead.")
    first, *second = rule.moments
    entry = {first.name: _check_state(who, "state1", state1, p, torch.float32)}
    if second:
        entry[second[0].name] = _check_state(who, "state2", state2, p, torch.float32)
    else:
        _check_absent(who, optimizer_name, {"state2": state2})
    hypers = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": weight_decay}
    _run(who, rule, g, p, entry, step, hypers, gnorm_scale)


def _rules() -> dict[str, Rule]:
    """The rules by the names that the functional API takes: its own for them, and theirs."""
    known = [rule for rule in rules.every().values() if rule.functional_name is not None]
    return {rule.name: rule for rule in known} | {str(rule.functional_name): rule for rule in known}


def _rule(who: str, name: str, beta3: float, alpha: float, skip_zeros: bool) -> Rule:
    known = _rules()
    if name not in known:
        raise ValueError(f"{who}: optimizer_name must be one of {sorted(known)}, got {name!r}.")
    if beta3 != 0 or alpha != 0:
        raise ValueError(f"{who}: beta3 and alpha must be 0, {name} has none, got {beta3} and {alpha}.")
    if skip_zeros:
        raise ValueError(f"{who}: skip_zeros must be False, got {skip_zeros!r}. Zero gradients step as others do.")
    return known[name]


def check_tensors(who: str, g: torch.Tensor, p: torch.Tensor) -> None:
    """Raise TypeError or ValueError where these are no gradient and parameter of one step."""
    _check.floats(who, "p", p)
    dtypes = (p.dtype,) if p.dtype == torch.float32 else (p.dtype, torch.float32)
    _check.tensor(who, "g", g, dtypes, "A gradient has the parameter's dtype or float32.")
    _check.on_device(who, "g", g, p.device, "p")
    if g.shape != p.shape:
        raise ValueError(f"{who}: g must have p's shape {tuple(p.shape)}, got {tuple(g.shape)}.")


def _check_state(who: str, name: str, state: torch.Tensor | None, p: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    state = _check.tensor(who, name, state, (dtype,))
    _check.on_device(who, name, state, p.device, "p")
    if state.shape != p.shape or state.stride() != p.stride():
        raise ValueError(
            f"{who}: {name} must have p's shape {tuple(p.shape)} and strides {p.stride()}, got {tuple(state.shape)} "
            f"and {state.stride()}. Make it with torch.empty_like(p, dtype={dtype})."
        )
    return state


def _check_absent(who: str, optimizer_name: str, values: dict[str, object]) -> None:
    for name, value in values.items():
        if value is not None:
            raise ValueError(f"{who}: {name} must be None, {optimizer_name} has one state.")


def _check_map(who: str, name: str, qmap: torch.Tensor | None, signed: bool) -> None:
    qmap = _check.tensor(who, name, qmap, (torch.float32,))
    if not torch.equal(qmap, codec.code_table(signed, qmap.device)):
        raise ValueError(f"{who}: {name} must be create_dynamic_map(signed={signed}), got another table.")


def _run(
    who: str,
    rule: Rule,
    g: torch.Tensor,
    p: torch.Tensor,
    entry: dict[str, torch.Tensor],
    step: int,
    hypers: dict[str, Any],
    gnorm_scale: float,
) -> None:
    if step < 1:
        raise ValueError(f"{who}: step must be at least 1, got {step}. The first step is number 1.")
    _native.module_for(p.device, who)  # says what is missing before anything is made
    param, gradient = p.detach(), g.detach()
    if gradient.stride() != param.stride():
        gradient = dense_grad(param, gradient)
    group = {**{hyper.name: hyper.default for hyper in rule.hypers}, **hypers}
    options = _native.cpu().StepOptions(who, rule.name, group, gradient_scale=gnorm_scale, direct=True)
    state = {**entry, "step": torch.tensor(float(step - 1), dtype=torch.float32, device="cpu")}
    step_array(who, options, param, gradient, state)
    torch.autograd.graph.increment_version([p])
