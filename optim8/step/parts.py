"""What one step works on: parameters that share their scalars, with local and dense tensors in the place of others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from optim8.state.layout import dense_grad
from optim8.state.shards import dtensor_class, first_of, is_dtensor, local
from optim8.step.norms import Reduce, over_ranks


@dataclass
class Part:
    """Parameters of a group that are stepped with the same scalars.

    group: index of the group.
    params: a list as long as the group's; a placeholder without gradient keeps the place of each that is not stepped.
    options: native StepOptions.
    names: of the group's parameters, or None.
    grads: by index, gradients that are taken instead of a tensor's own.
    firsts: by index, where a local shard begins in its parameter, in values.
    given: the options as a group has them.
    """

    group: int
    params: list[torch.Tensor]
    options: Any
    names: list[str] | None = None
    grads: dict[int, torch.Tensor] = field(default_factory=dict)
    firsts: dict[int, int] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)


class LocalStep:
    """The parts of a step as native code takes them, and for each the states of its parameters.

    Where there are no DTensors these are the optimizer's own objects. A local shard stands in for its DTensor, and a
    dense copy for a tensor with gaps.

    Args:
        owner: names the optimizer, for messages.
        parts: with the optimizer's own parameters.
        state: of the optimizer.
    """

    def __init__(self, owner: str, parts: Sequence[Part], state: dict[Any, Any]) -> None:
        self.parts: list[Part] = []
        self.states: list[dict[Any, Any]] = []
        self._whole, self._state = parts, state
        self._sharded: list[torch.Tensor] = []  # the DTensors that are stepped
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []  # (tensor with gaps, dense copy)
        dtensor = dtensor_class()
        for part in parts:
            if dtensor is not None and dtensor in map(type, part.params):
                part = self._localized(f"{owner}: parameter {{}} of group {part.group}", part)
            self.parts.append(part)
        self.refresh()

    def refresh(self) -> None:
        """Look up the states of the parameters anew."""
        self.states = [
            self._state
            if part.params is whole.params
            else {own: self._state[p] for own, p in zip(part.params, whole.params, strict=True) if p in self._state}
            for part, whole in zip(self.parts, self._whole, strict=True)
        ]

    def wholes(self, number: int) -> Sequence[torch.Tensor]:
        """The optimizer's own parameters of a part."""
        return self._whole[number].params

    def whole(self, number: int, index: int) -> torch.Tensor:
        """The optimizer's own parameter at an index of a part."""
        return self._whole[number].params[index]

    def close_gaps(self, number: int, indices: Iterable[int]) -> None:
        """Have dense copies stand in for the tensors with gaps at these indices of a part; call `refresh` then."""
        part = self.parts[number]
        params, grads = list(part.params), dict(part.grads)
        for index in indices:
            param = params[index]
            grads[index] = self._grad(part, index)
            params[index] = copy = param.detach().clone()
            grads[index] = dense_grad(copy, grads[index])
            self._copies.append((param, copy))
        self.parts[number] = replace(part, params=params, grads=grads)

    def lay_out(self, number: int, indices: Iterable[int]) -> None:
        """Use copies of the gradients at these indices of a part, which have the strides of the parameters."""
        part = self.parts[number]
        for index in indices:
            part.grads[index] = dense_grad(part.params[index], self._grad(part, index))

    @staticmethod
    def _grad(part: Part, index: int) -> torch.Tensor:
        grad = part.grads.get(index, part.params[index].grad)
        if grad is None:
            raise RuntimeError("the gradient of a parameter vanished while it was being stepped.")
        return grad

    def copy_back(self) -> None:
        """Write the stepped dense copies back into the tensors with gaps."""
        for param, copy in self._copies:
            param.copy_(copy)

    def reduce_over_ranks(self, params: Sequence[torch.Tensor]) -> Reduce | None:
        """What adds up over ranks the norms of these tensors, which are of the parts; None: all of them are whole."""
        if not self._sharded:
            return None
        whole = {
            id(own): param
            for part, of_whole in zip(self.parts, self._whole, strict=True)
            for own, param in zip(part.params, of_whole.params, strict=True)
        }
        return over_ranks([whole[id(param)] for param in params])

    def mark_stepped(self) -> None:
        """Tell autograd that the DTensors have changed, as an in-place operation does."""
        if self._sharded:
            torch.autograd.graph.increment_version(self._sharded)

    def _localized(self, who: str, part: Part) -> Part:
        params, grads, firsts = list(part.params), dict(part.grads), {}
        for index, param in enumerate(part.params):
            if is_dtensor(param):
                params[index], firsts[index] = local(param), first_of(param)
                grad: Any = part.grads.get(index, param.grad)
                if grad is not None:
                    grads[index] = _local_grad(who.format(index), param, grad)
                    self._sharded.append(param)
        return replace(part, params=params, grads=grads, firsts=firsts)


def _local_grad(who: str, param: Any, grad: Any) -> torch.Tensor:
    if not is_dtensor(grad):
        raise ValueError(f"{who} is a DTensor, so its gradient must be one, got a plain tensor.")
    if grad.placements != param.placements:  # such as one that is still to be summed over ranks
        grad = grad.redistribute(param.device_mesh, param.placements)
    return local(grad)
