"""The operator torch.ops.optim8.step: one step of an optimizer, for whatever records or replaces torch's operations.

    step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, Tensor[] numbers, str[] plans, int recorder) -> ()

The lists are those of step.record. `recorder` names the optimizer that a program without guards was recorded of
(make_fx), or is 0: while that optimizer lives, a run refuses options that it no longer has.

Its kernel is the eager step over the tensors that it is given. An eager step calls native code directly.
"""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from optim8.state.states import States
from optim8.step import overrides, record
from optim8.step.memory import Memory
from optim8.step.stepper import Stepper

_library = torch.library.Library("optim8", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, Tensor[] numbers, str[] plans, int recorder) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_recorders: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers_of: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def recorder_of(optimizer: Any) -> int:
    """The number of an optimizer in programs that are recorded of it. It is drawn, so that a program of another process
    does not meet an optimizer here."""
    number = _numbers_of.setdefault(optimizer, secrets.randbits(62) + 1)
    _recorders[number] = optimizer
    return number


class _NoRoom(Memory):
    """Memory in which no state is made: what an operator made would be lost behind it."""

    def allocate(self, tier: str, device: torch.device, arenas: Any) -> None:
        raise RuntimeError(
            "optim8::step: a recorded step needs state that lies as the parameters do, as when it was recorded, got "
            "other strides. Record it again."
        )


def _step(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    states: Sequence[torch.Tensor],
    numbers: Sequence[torch.Tensor],
    plans: Sequence[str],
    recorder: int,
) -> None:
    reader = record.Reader(params=params, grads=grads, states=states, numbers=numbers)
    groups: list[dict[str, Any]] = []
    entries: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
    grad_of: dict[int, torch.Tensor] = {}
    optimizer = _recorders.get(recorder)
    read = [record.read(plan) for plan in plans if plan]
    for plan in read:
        given = reader.numbers(plan)
        rows = list(reader.rows(plan))
        if optimizer is not None:
            _check_options(optimizer, plan, given)
        options = {**plan["options"], **{name: _plain(value) for name, value in given.items()}}
        names = [name for _, name in plan["rows"]]
        for changes, members in plan["parts"]:
            chosen = [rows[row] for row in members]
            group = {**options, **changes, "params": [param for param, _, _ in chosen]}
            groups.append({**group, "param_names": [names[row] for row in members]})
            for param, grad, entry in chosen:
                entries[param], grad_of[id(param)] = entry, grad
    reader.end()
    if not read:
        return
    before = {param: dict(entry) for param, entry in entries.items()}
    replica = record.replica_of(read[0]["owner"], read[0]["rule"])(
        groups, States(entries), _NoRoom(), overrides.nothing(groups)
    )
    with torch.no_grad():
        Stepper().step(replica, grads=grad_of)
        for param, entry in before.items():  # a count may have moved beside its parameter
            for key, tensor in entry.items():
                if replica.state[param][key] is not tensor:
                    tensor.copy_(replica.state[param][key])


def _fake_step(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    states: Sequence[torch.Tensor],
    numbers: Sequence[torch.Tensor],
    plans: Sequence[str],
    recorder: int,
) -> None:
    """Check what a step checks of shapes and dtypes."""
    reader = record.Reader(params=params, grads=grads, states=states, numbers=numbers)
    for plan in (record.read(text) for text in plans if text):
        reader.numbers(plan)
        for (_, name), (param, grad, _) in zip(plan["rows"], reader.rows(plan), strict=True):
            if grad.shape != param.shape or grad.dtype not in (param.dtype, torch.float32):
                raise ValueError(
                    f"{plan['owner']}: {name} of group {plan['group']} needs a gradient of its shape, of its own dtype "
                    f"or float32: parameter {param.dtype} {tuple(param.shape)}, gradient {grad.dtype} "
                    f"{tuple(grad.shape)}. Cast the gradient."
                )
    reader.end()


def _plain(value: Any) -> Any:
    """Numbers on the CPU as floats; what lives on a device stays there."""
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return value.item() if isinstance(value, torch.Tensor) and value.device.type == "cpu" else value


def _check_options(optimizer: Any, plan: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise RuntimeError where a recorded program would step with options that its optimizer had once."""
    group = optimizer.param_groups[plan["group"]]
    now = {**group, **record.group_options(optimizer, group)}
    was = {**plan["options"], **{name: _plain(given[name]) for name in plan["fixed"]}}
    for name in given.keys() - plan["fixed"]:
        if not any(isinstance(each, torch.Tensor) for each in record.each_number(now[name])):
            was[name] = given[name]  # it was a tensor, which changed along
    for name, old in was.items():
        new = now[name]
        if isinstance(new, torch.Tensor) or (list(new) if isinstance(new, tuple) else new) != (
            list(old) if isinstance(old, tuple) else old
        ):
            raise RuntimeError(
                f"{plan['owner']}: the program was recorded with {name}={old!r} in group {plan['group']}, and the "
                f"optimizer has {new!r} now, which a recorded program does not see. Record it again; or make {name} a "
                "tensor before it is recorded, and change that in place."
            )


for _key in ("CPU", "CUDA"):
    _library.impl("step", _step, _key)  # type: ignore[no-untyped-call]
torch.library.register_fake("optim8::step", _fake_step, lib=_library)
