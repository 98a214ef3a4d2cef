"""The step of parameters that are matrices: their native step leaves a direction, which is orthogonalized as a whole.

It runs bucket by bucket, over parameters of equal shape: native code makes the new state and writes the directions into
scratch memory, torch's matrix products orthogonalize them, and then the parameters move. So there is scratch for one
bucket at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from optim8 import rules
from optim8.state.layout import PARAM_LOW, STEP, dense, dense_grad
from optim8.state.shards import is_dtensor, local
from optim8.step import arrays, hypers, orthogonal, ranks
from optim8.step.parts import Part
from optim8.step.scaling import Scaling
from optim8.step.weight_options import counts_steps

# Bytes of the directions of a bucket, but for one that has a single parameter. Enough for kernels to have work, and
# little beside the parameters of a model that needs 8-bit state.
BUCKET_BYTES = 2**26

# Makes the new states of the parameters at these indices of a part, and writes their directions into the tensors. The
# gradients, and where a shard begins, are given by the place among these tensors.
Emit = Callable[[list[torch.Tensor], list[int], dict[int, torch.Tensor], dict[int, int]], None]


def check_group(owner: str, group_index: int, group: dict[str, Any]) -> None:
    """Raise ValueError where a parameter of a group is neither a matrix nor a stack of matrices."""
    for index, param in enumerate(group["params"]):
        if param.ndim not in (2, 3):
            raise ValueError(
                f"{owner}: {hypers.name_of(group, index)} of group {group_index} must be a matrix (2-D) or a stack of "
                f"matrices (3-D, one for each expert), got {tuple(param.shape)}. Put it into a group with "
                "use_muon=False, as optim8.muon_groups(model) does."
            )


def check_shapes(owner: str, part: Part, whole: Sequence[torch.Tensor]) -> None:
    """Raise ValueError where a parameter that a part is about to step is no such tensor: its group may have become one
    for matrices since it was added."""
    stepped = [param for i, param in enumerate(whole) if part.grads.get(i, part.params[i].grad) is not None]
    if any(param.ndim not in (2, 3) for param in stepped):
        check_group(owner, part.group, {"params": list(whole), "param_names": part.names})


@dataclass(frozen=True)
class Bucket:
    """Parameters of a part with the same shape and strides, which lie over the same ranks.

    indices: in the part.
    params: the optimizer's own, which may be DTensors.
    shards: what a step works on in their place: local, without gaps.
    """

    indices: list[int]
    params: list[torch.Tensor]
    shards: list[torch.Tensor]


def buckets(part: Part, whole: Sequence[torch.Tensor]) -> Iterator[Bucket]:
    """The parameters of a part that have a gradient, in buckets. Every rank of a mesh makes the same ones.

    Args:
        part: with local shards.
        whole: the optimizer's own parameters, in the order of the part.
    """
    alike: dict[Any, list[int]] = {}
    for index, (param, shard) in enumerate(zip(whole, part.params, strict=True)):
        if part.grads.get(index, shard.grad) is not None:
            over = (param.device_mesh, tuple(param.placements)) if is_dtensor(param) else None  # type: ignore[attr-defined]
            key = tuple(param.shape), over, shard.device, *((shard.stride(),) if over is None else ())
            alike.setdefault(key, []).append(index)
    for indices in alike.values():
        count = max(1, BUCKET_BYTES // max(1, whole[indices[0]].numel() * torch.bfloat16.itemsize))
        for first in range(0, len(indices), count):
            chosen = indices[first : first + count]
            yield Bucket(chosen, [whole[i] for i in chosen], [part.params[i] for i in chosen])


def step(
    part: Part,
    whole: Sequence[torch.Tensor],
    scaling: Scaling,
    emit: Emit,
    state: Mapping[Any, dict[str, Any]],
    pinned_spans: Sequence[tuple[int, int]] = (),
) -> None:
    """Step the parameters of a part that have a gradient.

    Args:
        part: with local shards; all its parameters were checked and have state.
        whole: the optimizer's own parameters, in the order of the part.
        scaling: where it has found an infinity on a device, nothing moves.
        emit: makes the new states, and writes directions into stand-ins.
        state: of the optimizer.
        pinned_spans: host memory that CUDA kernels may use.
    """
    # On the CPU one has looked already (Scaling.skips).
    found = None if scaling.found_inf is None or scaling.found_inf.device.type == "cpu" else scaling.found_inf
    for bucket in buckets(part, whole):
        flat, directions = _scratch(bucket, found is not None)
        grads = {}
        for at, index in enumerate(bucket.indices):
            grad = part.grads.get(index, part.params[index].grad)
            assert grad is not None
            # A step takes gradients of the dtype of what it steps, which is bfloat16 here, or float32.
            grads[at] = grad.float() if grad.dtype == torch.float16 else grad
        firsts = {at: part.firsts[index] for at, index in enumerate(bucket.indices) if index in part.firsts}
        emit(directions, bucket.indices, grads, firsts)
        del grads
        if bucket.params[0].numel() == 0:
            continue
        # The old parameters are read and written here, in place of native code.
        targets = [local(param) if is_dtensor(param) else param.detach() for param in bucket.params]
        updates = _updates(bucket, flat, directions, part.given)
        del flat, directions
        shape = tuple(bucket.params[0].shape)
        if counts_steps(part.given):
            entries = [state[param] for param in bucket.params]
            begins = [firsts.get(at, 0) for at in range(len(targets))]
            move_weights(targets, updates, part.given, shape, found, entries, begins, pinned_spans)
        else:
            move(targets, updates, part.given, shape, found)


def _scratch(bucket: Bucket, may_stay: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Memory for the directions of a bucket, in one piece, and of each parameter its part, which lies as the shard."""
    size = bucket.shards[0].numel()
    # A step that finds out on the device that nothing may move leaves the memory as it is.
    make = torch.zeros if may_stay else torch.empty
    flat = make(len(bucket.shards) * size, dtype=torch.bfloat16, device=bucket.shards[0].device)
    return flat, [flat.as_strided(each.shape, each.stride(), at * size) for at, each in enumerate(bucket.shards)]


def _updates(
    bucket: Bucket, flat: torch.Tensor, directions: Sequence[torch.Tensor], options: dict[str, Any]
) -> list[torch.Tensor]:
    """The orthogonalized directions, of each parameter its local shard."""
    param, count = bucket.params[0], len(bucket.params)
    rows, columns = param.shape[-2:]
    if not is_dtensor(param):
        stack = flat.as_strided((count, *param.shape), (param.numel(), *bucket.shards[0].stride()))
        return list(_orthogonalized(stack.reshape(-1, rows, columns), options).view(count, *param.shape))
    wholes = [ranks.gather(each, of) for each, of in zip(directions, bucket.params, strict=True)]
    stack = torch.stack(wholes)
    updates = ranks.spread(stack.view(-1, rows, columns), param, lambda share: _orthogonalized(share, options))
    return [ranks.cut(each, of) for each, of in zip(updates.view_as(stack), bucket.params, strict=True)]


def _orthogonalized(stack: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """A stack of matrices, orthogonalized. One larger than a bucket some at a time and in place: an iteration needs
    several times their memory."""
    coefficients, steps, eps = options["ns_coefficients"], options["ns_steps"], float(options["eps"])
    if stack.nbytes <= BUCKET_BYTES:
        return orthogonal.orthogonalize(stack, coefficients, steps, eps)
    for some in torch.split(stack, max(1, BUCKET_BYTES // max(1, stack[:1].nbytes))):
        some.copy_(orthogonal.orthogonalize(some, coefficients, steps, eps))
    return stack


def move(
    targets: Sequence[torch.Tensor],
    updates: Sequence[torch.Tensor],
    options: dict[str, Any],
    shape: Sequence[int],
    found_inf: torch.Tensor | None = None,
) -> None:
    """p = (1 - lr * weight_decay) p - lr * factor * update, in float32, rounded once to the parameter's dtype.

    Args:
        targets: the parameters, or their local shards.
        updates: for each its update, of the same shape.
        options: lr, weight_decay, adjust_lr_fn.
        shape: of the whole parameters.
        found_inf: float32 of one element; where it is not 0, nothing moves.
    """
    decay = options["weight_decay"]
    lr, length = _lengths(targets[0], options, shape, found_inf)
    for target, update in zip(targets, updates, strict=True):
        wide = target.float()  # itself where it is float32
        if float(decay) != 0:
            wide.mul_(1 - lr * float(decay))
        if isinstance(length, torch.Tensor):
            wide.sub_(update * length)
        else:
            wide.add_(update, alpha=-length)
        if wide is not target:
            target.copy_(wide)


def _lengths(
    target: torch.Tensor, options: dict[str, Any], shape: Sequence[int], found_inf: torch.Tensor | None
) -> Any:
    """The learning rate, and that times the factor of a matrix; on the device where one of them is."""
    lr = options["lr"]
    if not (isinstance(lr, torch.Tensor) and lr.device.type != "cpu"):
        lr = float(lr)
    if found_inf is not None:
        lr = torch.where(found_inf.to(target.device) == 0, lr, 0.0)
    return lr, lr * orthogonal.lr_factor(options["adjust_lr_fn"], shape)


def move_weights(
    targets: Sequence[torch.Tensor],
    updates: Sequence[torch.Tensor],
    options: dict[str, Any],
    shape: Sequence[int],
    found_inf: torch.Tensor | None,
    entries: Sequence[Mapping[str, Any]],
    firsts: Sequence[int],
    pinned_spans: Sequence[tuple[int, int]],
) -> None:
    """The same for weights that are dithered, or wider than their parameters: native steps of gradient descent.

    Args:
        targets, updates, options, shape, found_inf: as for `move`.
        entries: the states of the parameters, in which this step is counted.
        firsts: where each target begins in its parameter, in values.
        pinned_spans: host memory that CUDA kernels may use.
    """
    lr, length = map(float, _lengths(targets[0], options, shape, found_inf))
    # p - length * (update + decay * p)
    decay = lr * float(options["weight_decay"]) / length if length else 0.0
    keeps_nothing = next(rule for rule in rules.every().values() if not rule.moments and not rule.has_norms)
    descent = rules.rule(keeps_nothing.family)
    given: dict[str, Any] = {hyper.name: hyper.default for hyper in descent.hypers}
    given |= {"lr": length, "weight_decay": decay, "maximize": False, "capturable": False, "params": []}
    native = hypers.step_options("Muon8bit", descent, {**options, **given}, None, None)
    for target, update, entry, first in zip(targets, updates, entries, firsts, strict=True):
        whole, low = dense(target), entry.get(PARAM_LOW)
        before = {STEP: torch.tensor(float(local(entry[STEP])) - 1)}
        if low is not None:
            before[PARAM_LOW] = low
        grad = dense_grad(whole, update.float())
        arrays.step_array("Muon8bit", native, whole, grad, before, pinned_spans=pinned_spans, first=first)
        if whole is not target:
            target.copy_(whole)
