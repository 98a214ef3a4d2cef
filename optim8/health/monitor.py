"""Writes the health of an optimizer's state to TensorBoard, and warns where a moment does not survive 8 bits."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch._compile import _disable_dynamo

from optim8.health import advice, measures
from optim8.health.measures import ParameterHealth
from optim8.optim.base import BlockwiseOptimizer
from optim8.state import shards, symbols
from optim8.state.layout import bits_of, moments_of
from optim8.step import pending

ERROR_LIMIT = 0.1  # several times what moments of usual training show
_SAMPLE = 8192  # values of a parameter, 32 blocks: mean errors to about 1 % of themselves
_NOT_COMPILED = (
    "optim8.monitor: a program of one graph cannot hold a look at the state before each step. End the monitor with "
    "remove(), or compile without fullgraph=True."
)
_EDGES = list(range(257))  # one bin for each code


class Monitor:
    """What `monitor` returns: `latest` has the last result by parameter, with an advice, `remove()` ends it, as does
    the end of a `with` block."""

    def __init__(
        self, optimizer: BlockwiseOptimizer, writer: Any, every: int, limit: float, sample: int, names: dict[int, str]
    ) -> None:
        self.optimizer, self.writer, self.every, self.limit, self.sample = optimizer, writer, every, limit, sample
        self.latest: dict[str, ParameterHealth] = {}
        self._names = names
        self._steps = 0
        self._warned: set[tuple[str, str]] = set()
        self._handle = optimizer.register_step_pre_hook(self._before_step)

    def remove(self) -> None:
        """Stop watching. The writer stays open."""
        self._handle.remove()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if torch.compiler.is_dynamo_compiling() and symbols.is_one_graph():
            torch._dynamo.graph_break(msg=_NOT_COMPILED)
        return self._watch(args, kwargs)

    @_disable_dynamo
    def _watch(self, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        self._steps += 1
        if self._steps % self.every:
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._look()
            return None

        def with_look() -> Any:  # the gradients of this step are there only after the closure
            loss = closure()
            self._look()
            return loss

        others = {name: value for name, value in kwargs.items() if name != "closure"}
        return (args[0], with_look), others

    @_disable_dynamo
    @torch.no_grad()
    def _look(self) -> None:
        found_inf = getattr(self.optimizer, "found_inf", None)
        skipped = found_inf is not None and bool(found_inf.item())
        self.latest = {}
        pending.wait()
        for index, position, group, param, grad in measures.trained(self.optimizer):
            name, target = self._called(group, index, position, param)
            entry = self.optimizer.state.get(param) or {}
            looks = not skipped and bits_of(self.optimizer.moments, entry) == 8
            sampled, seen = measures.moments(self.optimizer, group, param, self.sample) if looks else (0, {})
            step = int(entry["step"]) + 1 if entry else 1
            advised = advice.advise(moments_of(self.optimizer.moments, entry), shards.local(param), seen, self.limit)
            health = ParameterHealth(name, measures.nonfinite(grad), grad.numel(), sampled, seen, advised)
            self.latest[name] = health
            self._write(health, step)
            self._warn(health, step, target)

    def _called(self, group: dict[str, Any], index: int, position: int, param: torch.Tensor) -> tuple[str, str]:
        """The name of a parameter, and how an override names it."""
        known = self._names.get(id(param))
        if known is not None:
            return known, f"{known!r}, module=model"
        if group.get("param_names"):
            return group["param_names"][position], repr(group["param_names"][position])
        return f"group {index} parameter {position}", f"optimizer.param_groups[{index}]['params'][{position}]"

    def _write(self, health: ParameterHealth, step: int) -> None:
        name, scalar = health.name, self.writer.add_scalar
        scalar(f"gradient_nonfinite/{name}", health.nonfinite, step)
        if health.advice is not None:
            scalar(f"advised_bits/{name}", health.advice.bits, step)
        for moment, of in health.moments.items():
            scalar(f"{moment}_error/{name}", of.error, step)
            scalar(f"{moment}_saturated/{name}", of.saturated, step)
            scalar(f"{moment}_unseen/{name}", of.unseen, step)
            scalar(f"{moment}_drift/{name}", of.drift, step)
            if of.smallest is not None:
                scalar(f"{moment}_at_smallest_code/{name}", of.smallest, step)
            scalar(f"{moment}_below_codes/{name}", of.below, step)
            if of.spread is not None:
                scalar(f"{moment}_spread/{name}", of.spread, step)
            self.writer.add_histogram(f"{moment}_codes/{name}", of.codes, step, bins=_EDGES)

    def _warn(self, health: ParameterHealth, step: int, target: str) -> None:
        for moment, of in health.moments.items():
            advised = health.advice
            if advised is None or of.error <= self.limit or (health.name, moment) in self._warned:
                continue
            self._warned.add((health.name, moment))
            warnings.warn(
                f"optim8.monitor: {moment} of {health.name!r} has a relative quantization error of {of.error:.1%} at "
                f"step {step}, limit {self.limit:.1%}. To keep its state in {advised.bits} bits, which takes "
                f"{advised.added:,} bytes more: optim8.override({target}, optim_bits={advised.bits}).",
                stacklevel=2,
            )


def monitor(
    optimizer: torch.optim.Optimizer,
    writer: Any,
    every: int = 100,
    *,
    model: torch.nn.Module | None = None,
    limit: float = ERROR_LIMIT,
    sample: int = _SAMPLE,
) -> Monitor:
    """Watch what 8 bits do to an optimizer's state, and write it to TensorBoard.

    Before every `every`-th step, it writes for each parameter with 8-bit state the relative quantization error of its
    moments, the share of codes at the ends of the table, the share of values that the step changes by less than half a
    code (rounding to nearest loses these changes), the drift of the mean magnitude by rounding, the share of values
    below the smallest code, a histogram of the codes, and for moments that are never negative the share of positive
    values at the smallest code and the spread: what 1 % of the values, each over the largest of its block, do not
    exceed. From these it advises a precision for each parameter, and writes its bits; `latest` has it with the bytes
    that it takes. For every parameter it writes the number of gradient elements that are NaN or infinite. It computes
    the moments on a copy, so training does not change. It waits for a GPU at those steps only.

    Args:
        optimizer: one of optim8's.
        writer: a torch.utils.tensorboard.SummaryWriter, or anything with its `add_scalar` and `add_histogram`.
        every: steps between two looks, at least 1.
        model: gives the names; else those of an optimizer made from `named_parameters()`, else places in its groups.
        limit: of the relative error, in (0, 1]; a moment above it causes one warning, which names the parameter, the
            override to use and what that takes.
        sample: how many values of a larger parameter to look at, in blocks spread evenly; at least 256.

    Returns:
        a handle: `.latest`, `.remove()`; usable in a `with` statement.

    Raises:
        TypeError, ValueError: an argument cannot be honoured.

    Examples:
        >>> import torch, optim8
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> model = torch.nn.Linear(64, 64)
        >>> optimizer = optim8.AdamW8bit(model.parameters())
        >>> watch = optim8.monitor(optimizer, SummaryWriter("runs/health"), every=100, model=model)
    """
    if not isinstance(optimizer, BlockwiseOptimizer):
        raise TypeError(f"optim8.monitor: optimizer must be one of optim8's, got {type(optimizer).__name__}.")
    for method in ("add_scalar", "add_histogram"):
        if not callable(getattr(writer, method, None)):
            raise TypeError(
                f"optim8.monitor: writer must have {method}, as torch.utils.tensorboard.SummaryWriter has, got "
                f"{type(writer).__name__}."
            )
    for name, value, least in (("every", every, 1), ("sample", sample, 256)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"optim8.monitor: {name} must be a whole number of at least {least}, got {value!r}.")
    if not 0 < limit <= 1:
        raise ValueError(f"optim8.monitor: limit must be in (0, 1], got {limit!r}.")
    names = {} if model is None else {id(param): name for name, param in model.named_parameters()}
    return Monitor(optimizer, writer, every, limit, sample, names)
