"""Float64 references, straight from the papers: the dynamic 8-bit code and the update rules.

The only other place where these formulas stand is csrc/core. Sources. The code: Dettmers 2015 (arXiv 1511.04561) and
Dettmers et al. 2021 (arXiv 2110.02861). The rules: Kingma & Ba 2014 (arXiv 1412.6980), Loshchilov & Hutter 2017 (arXiv
1711.05101), Chen et al. 2023 (arXiv 2302.06675), and what stands at each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from support.rounding import FLT_MIN, UNIT, Array, Rounded

BLOCK = 256
MAP_SHA256 = {
    True: "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c",
    False: "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398",
}
Moments = dict[str, Rounded]
Rule = Callable[..., tuple[Rounded, Moments]]


# The code.


def dynamic_map(signed: bool) -> npt.NDArray[np.float32]:
    """The 256 sorted values: 7 decades, decade i split evenly into 2^i (signed) or 2^(i+1) (unsigned), and 0 and 1."""
    f32 = np.float32
    values = [f32(0), f32(1)]
    for decade in range(7):
        n = 2**decade if signed else 2 ** (decade + 1)
        # torch.linspace in float32: counted from the nearer end, one rounding (a fused multiply-add) per edge.
        step = float((f32(1) - f32(0.1)) / f32(n))
        edge = [f32(float(f32(0.1)) + step * j) if 2 * j < n + 1 else f32(1 - step * (n - j)) for j in range(n + 1)]
        for j in range(n):
            value = f32(10.0 ** (decade - 6)) * ((edge[j] + edge[j + 1]) / f32(2))
            values += [value, -value] if signed else [value]
    return np.sort(np.array(values, np.float32))


def zero_code(signed: bool) -> int:
    """The index of 0."""
    return 127 if signed else 0


def nearest(table: npt.NDArray[np.float32], y: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    """The index of the entry nearest to each `y`, by comparison of distances in float64; the lower one at a tie."""
    entries, y = table.astype(np.float64), np.asarray(y, np.float64)
    high = np.clip(np.searchsorted(entries, y), 1, len(entries) - 1)
    return (high - (y - entries[high - 1] <= entries[high] - y)).astype(np.uint8)


def code_slack(y: Array) -> Array:
    """How far from `y` the encoder's own rounding may see it.

    A closed form computes a real index of less than 2n in decade i by one fused multiply-add with two rounded
    constants, each as large as the index at most: three errors of 2n * 2^-24. One index is 0.9 / n * 10^(i-6), so
    5.4 * 2^-24 * 10^(i-6) in `y`. The thresholds between decades are constants of the order of 10^(i-6), rounded once:
    within 8 * 2^-24 * 10^(i-6) in all.
    """
    top = 10.0 ** np.clip(np.ceil(np.log10(np.maximum(np.abs(y), 1e-7))), -6, 0)
    return 8 * UNIT * top


def block_max(x: Array) -> Array:
    """The largest magnitude of each block of 256; the last block may be short."""
    starts = np.arange(0, x.size, BLOCK)
    return np.maximum.reduceat(np.abs(x), starts) if x.size else np.zeros(0)


def per_element(absmax: Array, size: int) -> Array:
    """Each element's block value."""
    return np.repeat(absmax, BLOCK)[:size]


def value_at(position: npt.ArrayLike, signed: bool) -> Array:
    """The inverse of `position`, for state in 16 bits: below the first positive value of an unsigned code the line of
    its decade goes on."""
    table = dynamic_map(signed).astype(np.float64)
    table = table[table >= 0]
    index = np.asarray(position, np.float64)
    value = np.interp(index, np.arange(table.size), table)
    if not signed:
        value = np.where((index > 0) & (index < 1), table[1] - (1 - index) * (table[2] - table[1]), value)
    return np.asarray(value)


def position16(y: npt.ArrayLike, signed: bool) -> Array:
    """The position of a value that is not 0 in 16 bits: of an unsigned code at least half a cell above 0, on the line
    of its decade."""
    y, table = np.asarray(y, np.float64), dynamic_map(signed).astype(np.float64)
    if signed:
        return position(y, signed)
    return np.where(y < table[1], np.maximum(1 - (table[1] - y) / (table[2] - table[1]), 0.5), position(y, signed))


def number16(codes: npt.NDArray[np.uint8], low: npt.NDArray[np.uint8], signed: bool) -> npt.NDArray[np.int64]:
    """The signed position that codes and low bytes stand for (csrc/core/code16.h), in units of 1/256."""
    return np.asarray(codes.astype(np.int64) * 256 + low - (zero_code(signed) * 256 + 128))


def decode16(
    codes: npt.NDArray[np.uint8],
    low: npt.NDArray[np.uint8],
    absmax: npt.NDArray[np.float32],
    signed: bool,
    root: bool = False,
) -> Rounded:
    """What codes and low bytes stand for. The quotient is a line in float32, one fused multiply-add with two rounded
    constants, each as large as 9 times the value at most."""
    number = number16(codes, low, signed)
    quotient = np.sign(number) * value_at(np.abs(number) / 256, signed)
    value = Rounded(quotient, 19 * UNIT * np.abs(quotient))
    value = value * Rounded.exact(per_element(absmax.astype(np.float64), codes.size))
    return value * value if root else value


def decode(codes: npt.NDArray[np.uint8], absmax: npt.NDArray[np.float32], signed: bool, root: bool = False) -> Rounded:
    """What the codes of a tensor stand for: table value times the block's absmax, one float32 product; of a root the
    square, another."""
    product = dynamic_map(signed)[codes].astype(np.float64) * per_element(absmax.astype(np.float64), codes.size)
    if root:
        product = product.astype(np.float32).astype(np.float64) ** 2
    return Rounded.once(product, np.zeros_like(product))


def encode(x: Array, signed: bool) -> tuple[npt.NDArray[np.uint8], Array]:
    """Codes and absmax of `x`: nearest entries; a positive second moment takes the smallest positive code at least."""
    absmax = block_max(x)
    scale = per_element(absmax, x.size)
    y = np.divide(x, scale, out=np.zeros_like(x), where=scale > 0)
    codes = nearest(dynamic_map(signed), y)
    if not signed:
        codes = np.where((x > 0) & (codes == 0), 1, codes).astype(np.uint8)
    return codes, absmax


def wrong_codes(
    codes: npt.NDArray[np.uint8], new: Rounded, signed: bool, absmax: Array | None = None
) -> npt.NDArray[np.intp]:
    """Positions whose code is not the nearest entry to any quotient that float32 may have computed for `new`.
    `absmax`: the scales, if they are not the largest magnitudes.

    The quotient y = x * (1 / absmax) has the error of x, the error of absmax (a maximum is as far off as its worst
    candidate) and two roundings. A code nearest to some y' within d of y is at most 2 d farther from y than the best.
    """
    top = block_max(new.value) if absmax is None else absmax
    top_error = per_element(block_max(new.error), new.value.size)
    top = per_element(top, new.value.size)
    x = np.where(top > 0, new.value, 0.0)
    safe = np.where(top > 0, top, 1.0)
    y = x / safe
    of_scale = np.where(y == 0, 0, top_error / safe + 2 * UNIT)  # 0 is 0 in any scale, and one of no bound
    d = new.error / safe + np.abs(y) * of_scale + code_slack(y)
    table = dynamic_map(signed).astype(np.float64)
    best = np.abs(table[nearest(dynamic_map(signed), y)] - y)
    good = np.abs(table[codes] - y) <= best + 2 * d
    if not signed:
        good = np.where(codes == 0, good & (new.value - new.error <= 0), good | (codes == 1) & (y < table[1]))
    return np.flatnonzero(~good)


# Dithered rounding (csrc/core/dither.h). The sequence: Kronecker's, over the step, from a start for each block.


def dither(t: int, blocks: npt.ArrayLike, state: int) -> npt.NDArray[np.float64]:
    """u of the 256 elements of each of these blocks at step `t`, in [0, 1); of the second state those of neighbours."""
    mixed = np.asarray(blocks, np.uint64) * 0x9E3779B1 & 0xFFFFFFFF
    mixed = (mixed ^ mixed >> np.uint64(15)) * np.uint64(0x85EBCA77)
    start = (mixed + np.uint64(t * 2447445414 & 0xFFFFFFFF) & np.uint64(0xFFFFFFFF)) >> np.uint64(16)
    elements = np.arange(BLOCK, dtype=np.uint64) ^ np.uint64(state)
    return ((start[:, None] + elements * np.uint64(40503)).astype(np.int64) & 0xFFFF) / 2.0**16


def largest_value(signed: bool) -> float:
    """What the largest magnitude of a block is stored as, over the absmax: the last value before 1."""
    return float(dynamic_map(signed)[254])


def position(y: npt.ArrayLike, signed: bool) -> Array:
    """Where a quotient from 0 to 1 lies between the values that are not negative: k is the k-th of them."""
    table = dynamic_map(signed).astype(np.float64)
    table = table[table >= 0]
    return np.interp(np.asarray(y, np.float64), table, np.arange(table.size))


def wrong_dithered_codes(
    codes: npt.NDArray[np.uint8],
    new: Rounded,
    signed: bool,
    u: Array,
    low_bytes: npt.NDArray[np.uint8] | None = None,
) -> npt.NDArray[np.intp]:
    """Positions whose code is not floor(position + u) for any quotient that float32 may have computed for `new`; with
    low bytes, whose number is not floor(256 * position + u), u having eight bits.

    The quotient y = x * (1 / (absmax * constant)) has the error of x, the error of absmax and four roundings. The
    position is rounded to a unit of 2^-16 from below and above, by one of three lines with two rounded constants, each
    as large as 256 at most: within two such units.
    """
    size = new.value.size
    top, top_error = (per_element(block_max(each), size) for each in (new.value, new.error))
    safe = np.where(top > 0, top, 1.0)
    y = np.abs(new.value) / safe * largest_value(signed)
    d = new.error / safe + y * np.where(y == 0, 0, top_error / safe + 4 * UNIT)  # 0 is 0 in any scale
    low, high = (_position(np.clip(y + sign * d, 0, largest_value(signed)), signed, low_bytes) for sign in (-1, 1))
    parts = 1 if low_bytes is None else 256
    u = u if low_bytes is None else np.floor(u * 256) / 256
    low, high = (np.floor((p + sign * 2.0**-15) * parts + u) for p, sign in ((low, -1), (high, 1)))
    highest = (254 - zero_code(signed)) * parts  # 1 stays unused
    index = codes.astype(np.int64) - zero_code(signed) if low_bytes is None else number16(codes, low_bytes, signed)
    low, high = np.minimum(low, highest), np.minimum(high, highest)
    good = (np.abs(index) >= low) & (np.abs(index) <= high)
    good |= (index == 0) & (np.abs(new.value) <= new.error)
    good &= (np.sign(index) * np.sign(new.value) >= 0) | (np.abs(new.value) <= new.error)
    good &= (index == 0) | (top > 0)
    return np.flatnonzero(~good)


def _position(y: Array, signed: bool, low_bytes: npt.NDArray[np.uint8] | None) -> Array:
    """Where a value that is not 0 lies: in an unsigned code at the smallest positive one at least, or in 16 bits half a
    cell below on the line of its decade."""
    if low_bytes is not None:
        return position16(y, signed)
    return position(y, signed) if signed else np.maximum(position(y, signed), 1)


# The rules. `p`, `g` and the moments are Rounded; the rest are Python numbers, as the caller gave them.


def adam(p: Rounded, g: Rounded, old: Moments, *, decoupled: bool = False, **h: Any) -> tuple[Rounded, Moments]:
    """arXiv 1412.6980, algorithm 1; weight decay in the gradient, or on the parameter (arXiv 1711.05101). AMSGrad:
    arXiv 1904.09237, algorithm 2, with the largest uncorrected v, as torch.optim."""
    lr, (beta1, beta2), t, decay = float(h["lr"]), h["betas"], h["t"], h["weight_decay"]
    if h.get("maximize", False):
        g = -g
    if decay and decoupled:
        p = p * (1 - lr * decay)
    elif decay:
        g = g + p * decay
    m = old["exp_avg"] * beta1 + g * (1 - beta1)
    v = old["exp_avg_sq"] * beta2 + g * g * (1 - beta2)
    new = {"exp_avg": m, "exp_avg_sq": v}
    if h.get("amsgrad", False):
        new["max_exp_avg_sq"] = v = old["max_exp_avg_sq"].at_least(v)
    # FLT_MIN: m = v = 0 with eps = 0 does not move the parameter, instead of 0 / 0.
    denominator = (v.sqrt() / (1 - beta2**t) ** 0.5 + h["eps"]).at_least(FLT_MIN)
    inverse = Rounded.exact(1.0) / denominator
    return p - m * inverse * (lr / (1 - beta1**t)), new


def adamw(p: Rounded, g: Rounded, old: Moments, **h: Any) -> tuple[Rounded, Moments]:
    """arXiv 1711.05101, algorithm 2."""
    return adam(p, g, old, decoupled=True, **h)


def lion(p: Rounded, g: Rounded, old: Moments, **h: Any) -> tuple[Rounded, Moments]:
    """arXiv 2302.06675, algorithm 2."""
    lr, (beta1, beta2), m = float(h["lr"]), h["betas"], old["exp_avg"]
    if h.get("maximize", False):
        g = -g
    if h["weight_decay"]:
        p = p * (1 - lr * h["weight_decay"])
    p = p - (m * beta1 + g * (1 - beta1)).sign() * lr
    return p, {"exp_avg": m * beta2 + g * (1 - beta2)}


def sgd(p: Rounded, g: Rounded, old: Moments, **h: Any) -> tuple[Rounded, Moments]:
    """torch.optim.SGD's documentation; Sutskever et al. 2013, section 2."""
    lr, momentum, decay = float(h["lr"]), h["momentum"], h["weight_decay"]
    if h.get("maximize", False):
        g = -g
    if decay:
        g = g + p * decay
    if not momentum:
        return p - g * lr, {}
    fresh = 1 - h["dampening"] if h["t"] > 1 else 1.0
    m = old["momentum_buffer"] * momentum + g * fresh
    return p - (g + m * momentum if h["nesterov"] else m) * lr, {"momentum_buffer": m}


def _decayed(p: Rounded, g: Rounded, h: dict[str, Any]) -> tuple[Rounded, Rounded]:
    """The parameter and the gradient that a rule of torch.optim works on: ascent, and weight decay of either kind."""
    if h.get("maximize", False):
        g = -g
    if h["weight_decay"] and h.get("decoupled_weight_decay", False):
        p = p * (1 - float(h["lr"]) * h["weight_decay"])
    elif h["weight_decay"]:
        g = g + p * h["weight_decay"]
    return p, g


def _quotient(a: Rounded, b: Rounded) -> Rounded:
    """a / b by the reciprocal; 0 where both are 0, as of a parameter that never had a gradient, with eps = 0."""
    return a * (Rounded.exact(1.0) / b.at_least(FLT_MIN))


def rmsprop(p: Rounded, g: Rounded, old: Moments, **h: Any) -> tuple[Rounded, Moments]:
    """torch.optim.RMSprop's documentation; Tieleman and Hinton 2012, lecture 6.5; centered: arXiv 1308.0850, equations
    38 to 41, but with eps outside of the root. A variance is not negative."""
    alpha, momentum = h["alpha"], h["momentum"]
    p, g = _decayed(p, g, h)
    new = {"square_avg": old["square_avg"] * alpha + g * g * (1 - alpha)}
    variance = new["square_avg"]
    if h["centered"]:
        new["grad_avg"] = old["grad_avg"] * alpha + g * (1 - alpha)
        variance = (variance - new["grad_avg"] * new["grad_avg"]).at_least(0.0)
    direction = _quotient(g, variance.sqrt() + h["eps"])
    if momentum:
        direction = new["momentum_buffer"] = old["momentum_buffer"] * momentum + direction
    return p - direction * float(h["lr"]), new


def adagrad(p: Rounded, g: Rounded, old: Moments, **h: Any) -> tuple[Rounded, Moments]:
    """torch.optim.Adagrad's documentation; Duchi, Hazan and Singer, JMLR 12 (2011)."""
    p, g = _decayed(p, g, h)
    total = old["sum"] + g * g
    rate = float(h["lr"]) / (1 + (h["t"] - 1) * h["lr_decay"])
    return p - _quotient(g, total.sqrt() + h["eps"]) * rate, {"sum": total}


def adadelta(p: Rounded, g: Rounded, old: Moments, **h: Any) -> tuple[Rounded, Moments]:
    """torch.optim.Adadelta's documentation; arXiv 1212.5701, algorithm 1."""
    rho, eps = h["rho"], h["eps"]
    p, g = _decayed(p, g, h)
    v = old["square_avg"] * rho + g * g * (1 - rho)
    delta = _quotient((old["acc_delta"] + eps).sqrt(), (v + eps).sqrt()) * g
    u = old["acc_delta"] * rho + delta * delta * (1 - rho)
    return p - delta * float(h["lr"]), {"square_avg": v, "acc_delta": u}


def adamax(p: Rounded, g: Rounded, old: Moments, **h: Any) -> tuple[Rounded, Moments]:
    """torch.optim.Adamax's documentation; arXiv 1412.6980, algorithm 2."""
    beta1, beta2 = h["betas"]
    p, g = _decayed(p, g, h)
    m = old["exp_avg"] * beta1 + g * (1 - beta1)
    u = (old["exp_inf"] * beta2).at_least(abs(g) + h["eps"])
    return p - _quotient(m, u) * (float(h["lr"]) / (1 - beta1 ** h["t"])), {"exp_avg": m, "exp_inf": u}


def nadam(p: Rounded, g: Rounded, old: Moments, **h: Any) -> tuple[Rounded, Moments]:
    """torch.optim.NAdam's documentation; Dozat 2016. The product of the momenta is kept in float32."""
    lr, (beta1, beta2), t = float(h["lr"]), h["betas"], h["t"]
    p, g = _decayed(p, g, h)
    now, following = (beta1 * (1 - 0.5 * 0.96 ** (step * h["momentum_decay"])) for step in (t, t + 1))
    product = old["mu_product"] * now
    m = old["exp_avg"] * beta1 + g * (1 - beta1)
    v = old["exp_avg_sq"] * beta2 + g * g * (1 - beta2)
    one = Rounded.exact(1.0)
    of_gradient = one * (lr * (1 - now)) / (one - product)
    of_momentum = one * (lr * following) / (one - product * following)
    direction = _quotient(g * of_gradient + m * of_momentum, v.sqrt() / (1 - beta2**t) ** 0.5 + h["eps"])
    return p - direction, {"exp_avg": m, "exp_avg_sq": v, "mu_product": product}


def radam(p: Rounded, g: Rounded, old: Moments, **h: Any) -> tuple[Rounded, Moments]:
    """torch.optim.RAdam's documentation; arXiv 1908.03265, algorithm 2, but rectified above a length of 5, not 4."""
    (beta1, beta2), t = h["betas"], h["t"]
    p, g = _decayed(p, g, h)
    m = old["exp_avg"] * beta1 + g * (1 - beta1)
    v = old["exp_avg_sq"] * beta2 + g * g * (1 - beta2)
    most = 2 / (1 - beta2) - 1
    length = most - 2 * t * beta2**t / (1 - beta2**t)
    rate = float(h["lr"]) / (1 - beta1**t)
    if length <= 5:
        return p - m * rate, {"exp_avg": m, "exp_avg_sq": v}
    rectification = ((length - 4) * (length - 2) * most / ((most - 4) * (most - 2) * length)) ** 0.5
    direction = _quotient(m, v.sqrt() + h["eps"])
    return p - direction * (rate * rectification * (1 - beta2**t) ** 0.5), {"exp_avg": m, "exp_avg_sq": v}


def ademamix(p: Rounded, g: Rounded, old: Moments, **h: Any) -> tuple[Rounded, Moments]:
    """arXiv 2409.03137, algorithm 1; alpha and the half-life of the slow moment grow linearly (section 3)."""
    lr, (beta1, beta2, beta3), t, alpha = float(h["lr"]), h["betas"], h["t"], h["alpha"]
    if h.get("maximize", False):
        g = -g

    def half_life(beta: float) -> float:
        return math.log(0.5) / math.log(beta) if beta else 0.0

    if h["t_alpha"]:
        alpha *= min(t / h["t_alpha"], 1.0)
    if h["t_beta3"]:
        part = min(t / h["t_beta3"], 1.0)
        beta3 = min(0.5 ** (1 / ((1 - part) * half_life(beta1) + part * half_life(beta3))), beta3)
    fast = old["exp_avg"] * beta1 + g * (1 - beta1)
    slow = old["exp_avg_slow"] * beta3 + g * (1 - beta3)
    v = old["exp_avg_sq"] * beta2 + g * g * (1 - beta2)
    momentum = fast * (1 / (1 - beta1**t)) + slow * alpha
    direction = _quotient(momentum, v.sqrt() / (1 - beta2**t) ** 0.5 + h["eps"])
    p = p * (1 - lr * h["weight_decay"]) if h["weight_decay"] else p
    return p - direction * lr, {"exp_avg": fast, "exp_avg_slow": slow, "exp_avg_sq": v}


def newton_schulz(x: Rounded, coefficients: tuple[float, float, float], steps: int, eps: float) -> Rounded:
    """kellerjordan.github.io/posts/muon, with all matrices in bfloat16: X / |X|, and the iterations."""
    row = Rounded(x.value.reshape(1, -1), x.error.reshape(1, -1))
    norm = (row @ row.T).sqrt().stored("bfloat16").at_least(eps).stored("bfloat16")
    x = (x / norm).stored("bfloat16")
    for _ in range(steps):
        x = newton_schulz_iteration(x, coefficients)
    return x


def newton_schulz_iteration(x: Rounded, coefficients: tuple[float, float, float]) -> Rounded:
    """a X + b X X' X + c (X X')^2 X, of the wider of X and X'. The products in a sum may be rounded too."""
    a, b, c = coefficients
    if x.value.shape[0] > x.value.shape[1]:
        return newton_schulz_iteration(x.T, coefficients).T
    gram = (x @ x.T).stored("bfloat16")
    factor = (gram * b + ((gram @ gram) * c).stored("bfloat16")).stored("bfloat16")
    return (x * a + (factor @ x).stored("bfloat16")).stored("bfloat16")


def muon(p: Rounded, g: Rounded, old: Moments, **h: Any) -> tuple[Rounded, Moments]:
    """kellerjordan.github.io/posts/muon, with torch.optim.Muon's momentum, decay and learning rates; of one matrix."""
    lr, momentum, (rows, columns) = float(h["lr"]), h["momentum"], p.value.shape
    if h.get("maximize", False):
        g = -g
    m = old["momentum_buffer"] * momentum + g * (1 - momentum)
    direction = m * momentum + g * (1 - momentum) if h["nesterov"] else m
    update = newton_schulz(direction.stored("bfloat16"), h["ns_coefficients"], h["ns_steps"], h["eps"])
    factor = {
        "original": max(1.0, rows / columns) ** 0.5,
        "match_rms_adamw": 0.2 * max(rows, columns) ** 0.5,
        "spectral_unclamped": (rows / columns) ** 0.5,
    }[h["adjust_lr_fn"] or "original"]
    return p * (1 - lr * h["weight_decay"]) - update * (lr * factor), {"momentum_buffer": m}


def _norm(x: Rounded) -> Rounded:
    """The norm of a tensor. Of float32 squares, each rounded, a sum by halves over 256 rounds 8 times more; then
    float64. What is off by e has a norm that is off by the norm of e at most."""
    value = float(np.sqrt((x.value**2).sum()))
    error = float(np.sqrt((x.error**2).sum()))
    return Rounded(np.asarray(value), np.asarray(error + 5 * UNIT * (value + error)))


def lamb(p: Rounded, g: Rounded, old: Moments, **h: Any) -> tuple[Rounded, Moments]:
    """arXiv 1904.00962, algorithm 2, with phi(x) = x; the ratio is 1 where one of the norms is 0."""
    lr, (beta1, beta2), t, decay = float(h["lr"]), h["betas"], h["t"], h["weight_decay"]
    if h.get("maximize", False):
        g = -g
    m = old["exp_avg"] * beta1 + g * (1 - beta1)
    v = old["exp_avg_sq"] * beta2 + g * g * (1 - beta2)
    direction = _quotient(m * (1 / (1 - beta1**t)), v.sqrt() / (1 - beta2**t) ** 0.5 + h["eps"])
    if decay:
        direction = direction + p * decay
    of_param, of_direction = _norm(p), _norm(direction)
    ratio = of_param / of_direction if of_param.value > 0 and of_direction.value > 0 else Rounded.exact(1.0)
    return p - direction * (ratio * lr), {"exp_avg": m, "exp_avg_sq": v}


def lars(p: Rounded, g: Rounded, old: Moments, **h: Any) -> tuple[Rounded, Moments]:
    """arXiv 1708.03888, algorithm 1, with the learning rate outside of the momentum; the ratio is 1 where the parameter
    is 0, or there is nothing to scale."""
    decay = h["weight_decay"]
    of_param = _norm(p)
    below = _norm(g) + of_param * decay if decay else _norm(g)
    ratio = of_param * h["trust_coefficient"] / below if of_param.value > 0 and below.value > 0 else Rounded.exact(1.0)
    if h.get("maximize", False):
        g = -g
    scaled = (g + p * decay if decay else g) * ratio
    return sgd(p, scaled, old, **{**h, "weight_decay": 0.0, "maximize": False})
