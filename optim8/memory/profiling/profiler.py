"""Records the memory of a running training by step, phase and kind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from optim8.memory.profiling import sources
from optim8.memory.profiling.profiles import Profile, Record
from optim8.optim import BlockwiseOptimizer
from optim8.paging import Store
from optim8.state import shards
from optim8.state.allocation import DISK
from optim8.step.memory import Memory

_FLUSH = 500  # marks after which the profiler reads the source, so that the source need not hold more
FORWARD, BACKWARD, STEP, BETWEEN = "forward", "backward", "step", "between"


class profile(Profile):
    """Records the memory of a training, for each optimizer step and phase.

    Forward begins with the call of the model, and ends when the gradient reaches the model's output; so a loss that is
    computed outside the model counts as forward. Backward ends with the backward pass. Step is the optimizer's step.
    All other time is "between". Micro-batches before a step are phases of that step.

    Kinds: parameters; gradients; optimizer state by tier; activations: all else that has come since forward began;
    other: all else that was there before. The profiler measures them at the end of each phase. The peak is the most in
    use at any moment of the phase.

    Args:
        model: the module that is called.
        optimizer: its optimizer, of optim8 or any other.
        source: "cuda": torch's allocator on the model's GPU; the profiler resets its peak
            (`torch.cuda.max_memory_allocated`) at every phase. "allocations": torch's CPU allocator, through torch's
            profiler. "rss": the resident set of the process. None: "cuda" or "allocations", by the model's device.

    Raises:
        ValueError, TypeError: an argument cannot be honoured.
        RuntimeError: the source cannot be used; raised at the start of the block.

    Examples:
        >>> import torch, optim8
        >>> model = torch.nn.Linear(512, 512)
        >>> optimizer = optim8.AdamW8bit(model.parameters())
        >>> with optim8.memory.profile(model, optimizer) as prof:
        ...     model(torch.ones(1, 512)).sum().backward()
        ...     optimizer.step()
        >>> [record.phase for record in prof.records]
        ['between', 'forward', 'backward', 'between', 'step', 'between']
        >>> prof.records[-1].kinds["gradients"]
        1050624
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, source: str | None = None) -> None:
        if not isinstance(model, torch.nn.Module) or not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                "optim8.memory.profile: needs a torch.nn.Module and a torch.optim.Optimizer, got "
                f"{type(model).__name__} and {type(optimizer).__name__}."
            )
        self._model, self._optimizer = model, optimizer
        first = next(model.parameters(), None)
        self._device = torch.device("cpu") if first is None else first.device
        self._source = sources.source_for(source, self._device)
        super().__init__(self._source.name, self._source.meaning, type(model).__name__, type(optimizer).__name__)
        self._hooks: list[Any] = []
        self._output_hooks: list[Any] = []
        self._open: list[_Mark] = []  # whose readings the source still has
        self._step, self._phase, self._in_step, self._running = 0, BETWEEN, False, False
        self._walk = _Walk(model)
        self._known: list[torch.nn.Parameter] = []
        self._parameters: dict[str, int] = {}
        self._state: dict[str, int] = {}
        self._mapped = self._mapped_before = 0  # bytes of files that hold state
        self._base: int | None = None  # bytes of no known kind when forward began
        self._base_step = -1

    def __enter__(self) -> profile:
        if self._running or self.records:
            raise RuntimeError("optim8.memory.profile: one block only; make another profile for another block.")
        self._measure_state()
        self._mapped_before = self._mapped
        known = self._kinds()
        counted = sum(count for kind, count in known.items() if self._is_counted(kind))
        self._source.start(counted, [p.grad for p in self._model.parameters() if p.grad is not None])
        self._open.append(_Mark(0, "", BETWEEN, known, self._mapped))
        self._running = True
        self._hooks = [
            self._model.register_forward_pre_hook(self._on_forward),
            self._model.register_forward_hook(self._on_output),
            self._optimizer.register_step_pre_hook(self._on_step),
            self._optimizer.register_step_post_hook(self._after_step),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        self._running = False
        for hook in [*self._hooks, *self._output_hooks]:
            hook.remove()
        self._hooks, self._output_hooks = [], []
        self._mark(BETWEEN)
        self._read(last=True)

    def _on_forward(self, *_: Any) -> None:
        self._mark(FORWARD)

    def _on_output(self, _module: Any, _inputs: Any, output: Any) -> None:
        for tensor in _tensors(output):
            if tensor.requires_grad:
                self._output_hooks.append(tensor.register_hook(self._on_gradient))  # type: ignore[no-untyped-call]

    def _on_gradient(self, _gradient: torch.Tensor) -> None:
        if self._running and self._phase == FORWARD:
            self._mark(BACKWARD)
            torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)

    def _after_backward(self) -> None:
        if self._running and self._phase == BACKWARD:
            self._mark(STEP if self._in_step else BETWEEN)  # inside a step: of a closure

    def _on_step(self, *_: Any) -> None:
        self._in_step = True
        self._mark(STEP)

    def _after_step(self, *_: Any) -> None:
        self._measure_state()
        self._mark(BETWEEN)
        self._in_step = False
        self._step += 1
        for hook in self._output_hooks:
            hook.remove()
        self._output_hooks = []
        if len(self._open) > _FLUSH:
            self._read(last=False)

    def _mark(self, phase: str) -> None:
        """A phase ends here and `phase` begins."""
        self._source.mark()
        self._open.append(_Mark(self._step, self._phase, phase, self._kinds(), self._mapped))
        self._phase = phase

    def _kinds(self) -> dict[str, int]:
        gradients = _nbytes(p.grad for p in self._known)
        return {**self._parameters, "gradients": gradients, **self._state}

    def _measure_state(self) -> None:
        """Measure what only a step changes: the parameters, and bytes of them and of optimizer state by tier."""
        self._known = self._walk.parameters()
        self._parameters = {"parameters": _nbytes(self._known)}
        self._state = {f"state ({tier})": count for tier, count in _tiers(self._optimizer).items()}
        memory = _memory_of(self._optimizer)
        segments = memory.segments if isinstance(memory, Store) else []
        self._mapped = sum(segment.memory.numel() for segment in segments if segment.tier == DISK)

    def _is_counted(self, kind: str) -> bool:
        """Whether the source counts this kind: it does not count state in a file, or in RAM beside a GPU."""
        return kind != "state (disk)" and (kind != "state (host)" or self._device.type == "cpu")

    def _read(self, last: bool) -> None:
        """Make records of the marks since the last call."""
        for (level, peak), mark in zip(self._source.readings(last), self._open, strict=True):
            if self.source == "allocations":  # it counts a mapped file as memory
                level -= mark.mapped - self._mapped_before
                peak = max(level, peak - mark.mapped + self._mapped_before)
            rest = level - sum(count for kind, count in mark.kinds.items() if self._is_counted(kind))
            if self._base is None or (mark.begins == FORWARD and mark.step != self._base_step):
                self._base, self._base_step = rest, mark.step if mark.begins == FORWARD else -1
            if mark.ends:
                above = max(0, rest - self._base)
                kinds = {**mark.kinds, "activations": above, "other": rest - above}
                self.records.append(Record(mark.step, mark.ends, peak, level, kinds))
        self._open.clear()


@dataclass(frozen=True)
class _Mark:
    """Where one phase ends and another begins, and the bytes of the known kinds and of mapped files there."""

    step: int
    ends: str
    begins: str
    kinds: dict[str, int]
    mapped: int


class _Walk:
    """The parameters of a model. It walks the modules again only when one has other children, which takes a fraction of
    the time; the profiler asks in every step."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._modules: list[torch.nn.Module] = []
        self._children: list[torch.nn.Module | None] | None = None

    def parameters(self) -> list[torch.nn.Parameter]:
        """The same list as `list(model.parameters())`."""
        if self._children is None or self._present() != self._children:
            self._modules = list(self._model.modules())
            self._children = self._present()
        found = (param for module in self._modules for param in module._parameters.values() if param is not None)
        return list({id(param): param for param in found}.values())

    def _present(self) -> list[torch.nn.Module | None]:
        return [child for module in self._modules for child in module._modules.values()]


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)


def _nbytes(tensors: Iterable[torch.Tensor | None]) -> int:
    """Bytes of these tensors in this process. It runs several times a step, so plain tensors skip the question whether
    they are shards."""
    return sum(
        tensor.nbytes if type(tensor) in _PLAIN else shards.local(tensor).nbytes
        for tensor in tensors
        if tensor is not None
    )


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _memory_of(optimizer: torch.optim.Optimizer) -> Memory:
    """Where an optimizer's state lives; that of other libraries, beside the parameters."""
    return optimizer.memory if isinstance(optimizer, BlockwiseOptimizer) else Memory()


def _tiers(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of an optimizer's state by tier."""
    memory = _memory_of(optimizer)
    tensors = [
        value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, torch.Tensor)
    ]
    by_tier: dict[str, list[torch.Tensor]] = {}
    for tensor in tensors:
        part = tensor if type(tensor) in _PLAIN else shards.local(tensor)
        tier, _ = memory.place_of(part)
        by_tier.setdefault(tier, []).append(part)
    return {tier: _nbytes(parts) for tier, parts in by_tier.items()}
