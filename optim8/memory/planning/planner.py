"""The memory that a training needs for parameters, gradients and optimizer state, before anything is allocated."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from optim8 import optim, rules
from optim8.memory.models.model import Model, Parameter, dtype_of, read
from optim8.memory.planning import layout
from optim8.memory.planning.activations import Loss, activation_bytes, check_loss
from optim8.memory.planning.layout import Bytes
from optim8.memory.planning.peers import PEERS
from optim8.memory.planning.plans import STATE, Plan, Row, budget_bytes
from optim8.optim.base import BlockwiseOptimizer
from optim8.paging import Store
from optim8.paging.pager import Pager, pager_of

SHARDINGS = ("ddp", "fsdp")
_ALIASES = {name.removeprefix("torch-"): name for name in PEERS if name.startswith("torch-")}
_WORTH_A_NOTE = 0.1  # of the bytes of state
_TRACED = "Activations are those of the CPU's operators; what CUDA's save and take for themselves may differ."
OURS: dict[str, type[BlockwiseOptimizer]] = {
    name.lower(): getattr(optim, name) for name in sorted(optim.__all__, key=str.lower) if name.endswith("8bit")
}


def plan(
    model_or_config: Any,
    optimizer: Any = "adamw8bit",
    *,
    dtype: torch.dtype | str | None = None,
    grad_dtype: torch.dtype | str | None = None,
    master_copies: bool = False,
    world_size: int = 1,
    sharding: str = "ddp",
    min_8bit_size: int | None = None,
    optim_bits: int | None = None,
    master_bits: int | None = None,
    embeddings_in_32_bits: bool = False,
    paged: bool | Pager | None = None,
    device: str | None = None,
    budget: int | str | None = None,
    loss: Loss | None = None,
    beside: bool = True,
) -> Plan:
    """Bytes for parameters, gradients and optimizer state of a training, from sizes alone.

    Nothing is allocated. The code that lays state out in training lays it out on the meta device here, so the bytes are
    those of the training. A plan leaves out buffers for communication and, without `loss`, activations.

    Args:
        model_or_config: one of these. A parameter that is used twice counts once; a frozen one has neither gradient nor
            state.

            - a module, on any device;
            - a Hugging Face style config, as a dict, an object with `to_dict` or the path of its JSON: of a model of
              configs.FAMILIES, or of any model that transformers, if it is installed, can build on the meta device;
            - `{"parameters": {name: shape}}`;
            - the path (or paths) of a safetensors file, of which plan reads the header;
            - the folder of a model, of which plan reads config.json, or without one the safetensors files;
            - a name on the Hugging Face hub whose config.json is in the local cache (plan downloads nothing).
        optimizer: "adam8bit", "adamw8bit", "lion8bit", "pagedadam8bit", "pagedadamw8bit", "pagedlion8bit", or a class
            of optim8; an optimizer of optim8 that holds the module's parameters, whose groups and options then count;
            or another library's: "torch-adamw" (or "adamw"), "bitsandbytes-adamw8bit", "bitsandbytes-lion8bit",
            "torchao-adamw8bit", "flashoptim-adamw", "flashoptim-lion" (with 24 bits of 16-bit weights).
        dtype: of the parameters; None for the dtype that the model, config or file states, else float32.
        grad_dtype: of the gradients; None for the dtype of the parameters.
        master_copies: count a float32 copy of every narrower parameter; the optimizer then steps the copies.
        world_size: number of devices.
        sharding: "ddp", each device holds everything; "fsdp", each holds a part of every parameter, cut along the
            first dimension as `torch.distributed.fsdp.fully_shard` does. What is 8-bit depends on the whole parameter.
        min_8bit_size, optim_bits: as for the optimizer; None for its defaults. By these, tensors of fewer than 4096
            values, as adapters of LoRA often are, have float32 state; the plan notes it where that is a good part.
        master_bits: as for the optimizer: 24 or 32 keep what 16-bit parameters lack of a weight, as state.
        embeddings_in_32_bits: plan float32 state for embeddings, as transformers' Trainer keeps it with bitsandbytes'
            names (`optim="lion_8bit"`). Where `model_or_config` has only names, those say what is an embedding.
        paged: True, or an optim8.paging.Pager with budgets, as for the optimizer.
        device: "cuda" or "cpu", where the parameters are; None for the device of the module, "cuda" for sizes alone.
        budget: memory of a device, bytes or a text such as "24GiB". Paged state has there what parameters, gradients
            and buffers leave of it. Without a budget, paged state of CUDA parameters is planned in host memory, unless
            the pager has a device_budget.
        loss: to plan activations too: a function that computes the loss of one step with the module that it is given,
            as in `lambda model: model(inputs).mean()`. It is traced, with its backward, by the operators of the CPU,
            on tensors that take no memory: so inputs are on the CPU, or made in it. Gradients are None when it begins.
            Checkpointing counts as the module does it.
        beside: plan the optimizers of torch, bitsandbytes, torchao and FlashOptim as well, for the printed table; and,
            where parameters are narrower than float32, torch's with float32 master copies: the 16 bytes a parameter of
            mixed precision.

    Returns:
        The plan of one device; of the fullest one where they differ.

    Raises:
        TypeError, ValueError, FileNotFoundError: an argument cannot be honoured; the message names it.

    Examples:
        >>> import torch, optim8
        >>> plan = optim8.memory.plan(torch.nn.Linear(256, 256), "adamw8bit")
        >>> plan.bytes["codes"], plan.bytes["absmax"], plan.bytes["state32"]
        (131072, 2048, 2056)
    """
    request = {name: value for name, value in locals().items() if name != "beside"}
    model = read(model_or_config, None if dtype is None else dtype_of(dtype))
    device = device or model.device or "cuda"
    _check(model, world_size, sharding, device)
    held = [shard(parameter, world_size if sharding == "fsdp" else 1) for parameter in model.parameters]
    trained = [parameter for parameter in held if parameter.trainable]
    stepped = [torch.float32 if master_copies and p.dtype.itemsize < 4 else p.dtype for p in trained]
    grads = None if grad_dtype is None else dtype_of(grad_dtype)
    tier = "device" if device == "cuda" else "host"
    rows = {
        ("parameters", tier): sum(p.nbytes for p in held),
        ("float32 master copies", tier): sum(
            p.size * wide.itemsize for p, wide in zip(trained, stepped) if wide != p.dtype
        ),
        ("gradients", tier): sum(p.size * (grads or p.dtype).itemsize for p in trained),
        ("model's buffers", tier): model.buffer_bytes,
    }
    if loss is not None:
        check_loss(loss, model_or_config, model.sharded or (sharding == "fsdp" and world_size > 1))
        rows["activations", tier] = activation_bytes(model_or_config, loss, None if dtype is None else dtype_of(dtype))
    options = {"min_8bit_size": min_8bit_size, "optim_bits": optim_bits, "master_bits": master_bits}
    given = {name: value for name, value in options.items() if value is not None}
    free = 0 if budget is None else max(0, budget_bytes(budget) - sum(rows.values()))
    wide = [p for p in trained if embeddings_in_32_bits and p.embedding]
    state = _state(optimizer, held, trained, stepped, given, wide, paged, device, free)
    rows |= state.bytes
    found = tuple(Row(kind, tier, count) for (kind, tier), count in rows.items() if count)
    return Plan(
        model.title,
        state.label,
        found,
        world_size,
        sharding,
        sum(p.whole.numel() for p in model.parameters),
        len(model.parameters),
        sum(p.size for p in held),
        tuple(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters})),
        device,
        _beside(_of_others(request), state, stepped, [r for r in found if r.kind == "activations"]) if beside else (),
        request,
        (*model.notes, *_on_small(state), *([_TRACED] if loss is not None and device == "cuda" else [])),
    )


def shard(parameter: Parameter, count: int) -> Parameter:
    """The largest of `count` parts of a parameter: rows of the first dimension, rounded up."""
    if count == 1 or not parameter.local:
        return parameter
    local = (-(-parameter.local[0] // count), *parameter.local[1:])
    return replace(parameter, local=local)


def _check(model: Model, world_size: Any, sharding: str, device: str) -> None:
    if sharding not in SHARDINGS:
        raise ValueError(f"optim8.memory.plan: sharding must be one of {', '.join(SHARDINGS)}, got {sharding!r}.")
    if isinstance(world_size, bool) or not isinstance(world_size, int) or world_size < 1:
        raise ValueError(f"optim8.memory.plan: world_size must be a whole number of at least 1, got {world_size!r}.")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"optim8.memory.plan: device must be 'cpu' or 'cuda', got {device!r}.")
    if model.sharded and world_size > 1 and sharding == "fsdp":
        raise ValueError(
            "optim8.memory.plan: the model's parameters are sharded already (DTensor), and planned as they are. "
            "Leave world_size and sharding out."
        )


@dataclass(frozen=True)
class _State:
    """The planned state of one optimizer."""

    label: str
    moments: int  # of the rule
    bytes: Bytes
    small: Sequence[int] = ()  # sizes of the tensors that are too small for 8-bit state


def _on_small(state: _State) -> list[str]:
    """A note on tensors that are too small for 8-bit state, where their state is a good part of all state."""
    small, total = state.small, sum(count for (kind, _), count in state.bytes.items() if kind in STATE)
    nbytes = state.moments * 4 * sum(small)
    if nbytes <= _WORTH_A_NOTE * total:
        return []
    return [
        f"{len(small)} tensors of fewer values than min_8bit_size keep float32 state: {sum(small):,} values, "
        f"{nbytes / total:.0%} of the bytes of state. With min_8bit_size=0 their state is 8-bit too."
    ]


def _of_others(request: dict[str, Any]) -> dict[str, Any]:
    """The request without what belongs to our optimizers, and without the loss, whose trace is the same for all."""
    own = ("min_8bit_size", "optim_bits", "master_bits", "paged", "embeddings_in_32_bits", "loss")
    return {**request, **dict.fromkeys(own)}


def _beside(
    request: dict[str, Any], state: _State, stepped: Sequence[torch.dtype], activations: Sequence[Row]
) -> tuple[Plan, ...]:
    """The same training with each optimizer that does the same, and with torch's."""
    names = [] if state.label.startswith("optim8") else ["adamw8bit" if state.moments == 2 else "lion8bit"]
    names += [name for name, peer in PEERS.items() if peer.moments == state.moments or name == "torch-adamw"]
    plans = [plan(**{**request, "optimizer": name}, beside=False) for name in names]
    if any(dtype.itemsize < 4 for dtype in stepped):
        mixed = plan(**{**request, "optimizer": "torch-adamw", "master_copies": True}, beside=False)
        plans.insert(names.index("torch-adamw") + 1, replace(mixed, optimizer=f"{mixed.optimizer}, float32 master"))
    return tuple(replace(other, rows=(*other.rows, *activations)) for other in plans if other.optimizer != state.label)


def _state(
    optimizer: Any,
    held: Sequence[Parameter],
    trained: Sequence[Parameter],
    stepped: Sequence[torch.dtype],
    options: dict[str, Any],
    wide: Sequence[Parameter],
    paged: bool | Pager | None,
    device: str,
    free: int,
) -> _State:
    if isinstance(optimizer, str):
        optimizer = _ALIASES.get(optimizer.lower(), optimizer)
    if isinstance(optimizer, str) and optimizer.lower() in PEERS:
        if options or paged or wide:
            named = {"paged": paged, "embeddings_in_32_bits": wide}
            given = ", ".join([*options, *(name for name, value in named.items() if value)])
            raise ValueError(f"optim8.memory.plan: {given} belongs to optim8's optimizers, not to {optimizer}.")
        peer = PEERS[optimizer.lower()]
        by_kind = peer.state([(p.size, wide) for p, wide in zip(trained, stepped)])
        return _State(peer.label, peer.moments, {(kind, _tier(kind, device)): n for kind, n in by_kind.items()})
    cls = OURS.get(optimizer.lower()) if isinstance(optimizer, str) else optimizer
    if isinstance(cls, BlockwiseOptimizer):
        if options or paged is not None or wide:
            raise ValueError("optim8.memory.plan: options and paged are the optimizer's own already. Leave them out.")
        ours, groups, pager = cls, cls.param_groups, _pager_of(cls)
    elif isinstance(cls, type) and issubclass(cls, BlockwiseOptimizer):
        pager = pager_of("optim8.memory.plan", paged, cls.always_paged)
        pairs = zip(trained, stepped)
        meta = [torch.empty(p.whole.shape, dtype=dtype, device="meta", requires_grad=True) for p, dtype in pairs]
        ours = cls([{"params": meta}], **options)  # refuses what training would refuse
        groups = []
        for options_of, members in (({}, [p for p in trained if p not in wide]), ({"optim_bits": 32}, wide)):
            names = {"params": [p.whole for p in members], "param_names": [p.name for p in members]}
            groups.append({**ours.param_groups[0], **options_of, **names})
    else:
        near = difflib.get_close_matches(str(optimizer).lower(), [*OURS, *PEERS], 1)
        raise ValueError(
            f"optim8.memory.plan: optimizer must be one of {', '.join([*OURS, *PEERS])}, or an optimizer of optim8 or "
            f"its class, got {optimizer!r}.{f' Do you mean {near[0]!r}?' if near else ''}"
        )
    frozen = {id(p.whole) for p in held if not p.trainable}
    requests, small = layout.state_requests(ours, groups, {id(p.whole): p.local for p in held}, frozen)
    label = f"optim8 {type(ours).__name__}" + (" paged" if pager is not None and not ours.always_paged else "")
    nbytes = layout.state_bytes(requests, pager, device, free)
    return _State(label, len(rules.variant(ours.rule, ours.defaults).moments), nbytes, small)


def _tier(kind: str, device: str) -> str:
    return "device" if device == "cuda" and kind != "step counts" else "host"


def _pager_of(optimizer: BlockwiseOptimizer) -> Pager | None:
    return optimizer.memory.pager if isinstance(optimizer.memory, Store) else None
