"""A step of any subset of an optimizer's parameters: gather, supply what is missing, run."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, TypeAlias

import torch

from optim8 import _native, codec, rules
from optim8.rules import Rule
from optim8.state.allocation import move_steps
from optim8.state.layout import PARAM_LOW, bits_of, dense, dense_grad, master_bits_of, moments_of
from optim8.state.moments import Codes, source_of
from optim8.state.moments import values as values_of
from optim8.state.shards import local
from optim8.state.weights import join
from optim8.step import arrays, hypers, matrices, run, supply
from optim8.step.norms import check_whole
from optim8.step.parts import LocalStep, Part
from optim8.step.scaling import UNSCALED, Scaling
from optim8.step.supply import Stateful
from optim8.step.weight_options import PLAIN_WEIGHTS

Grads: TypeAlias = Mapping[int, torch.Tensor]  # by id of a parameter


class Stepper:
    """Steps an optimizer, which it is handed in each call: it keeps native scratch memory and nothing else."""

    def __init__(self) -> None:
        self._table = _native.cpu().StepTable()

    def step(
        self,
        optimizer: Stateful,
        params: Collection[torch.Tensor] | None = None,
        scaling: Scaling = UNSCALED,
        grads: Grads | None = None,
    ) -> None:
        """Update every parameter that has a gradient.

        Args:
            params: of the optimizer; None: all.
            grads: by id of the parameter, gradients that are taken instead of its own.

        Raises:
            ValueError: a parameter, gradient or state cannot be stepped; names the parameter. Nothing was changed.
        """
        owner, has_norms = type(optimizer).__name__, rules.rule(optimizer.rule).has_norms
        if has_norms:
            check_whole(owner, (param for group in optimizer.param_groups for param in group["params"]))
        with self.gathered(optimizer, params, scaling, grads) as local_step:
            memory, any_rows = optimizer.memory, len(self._table) > 0
            with_matrices = self._without_matrices(optimizer, local_step)
            reduce = local_step.reduce_over_ranks(self._table.params) if has_norms else None
            memory.prepare(optimizer.param_groups, optimizer.state)
            with memory.stepping(owner) if any_rows else nullcontext():
                try:
                    memory.run_step(self._table, owner, scaling, reduce)
                finally:
                    local_step.copy_back()
                for number in with_matrices:
                    part, wholes = local_step.parts[number], local_step.wholes(number)
                    emit = self._emit(optimizer, local_step, number, scaling)
                    matrices.step(part, wholes, scaling, emit, optimizer.state, memory.pinned_spans)
            local_step.mark_stepped()

    @contextmanager
    def gathered(
        self,
        optimizer: Stateful,
        params: Collection[torch.Tensor] | None = None,
        scaling: Scaling = UNSCALED,
        grads: Grads | None = None,
    ) -> Iterator[LocalStep]:
        """All tensors of a step in the native table, checked, with state for every gradient, for the `with` block."""
        try:
            parts = self._parts(optimizer, params, scaling, grads)
            local_step = LocalStep(type(optimizer).__name__, parts, optimizer.state)
            lacks = self._gather(optimizer, local_step)
            for _ in range(2):  # that state lies otherwise than a tensor with gaps shows only beside its dense copy
                if not any(each.gaps or each.state or each.layout or each.moved or each.step for each in lacks):
                    break
                _supply(optimizer, local_step, lacks)
                lacks = self._gather(optimizer, local_step)
            self._check_distinct(optimizer, local_step)
            yield local_step
        finally:
            self._table.clear()  # lets go of the gradients

    def preview(
        self,
        optimizer: Stateful,
        group: dict[str, Any],
        param: torch.Tensor,
        blocks: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The moments as they are, and as the next step would make them before they are quantized; nothing changes.

        Args:
            group: the options of the parameter, those of its group or its own.
            param: has a gradient, and state.
            blocks: int64; the whole blocks of 256 values to look at, None: all of the local shard.
            scale: of a GradScaler, or None.

        Returns:
            For each moment its float32 values, of one dimension, before and after. Where moments depend on norms of the
            parameter, those of the local shard count for it.
        """
        whole, grad, entry = dense(local(param)), param.grad, optimizer.state[param]
        if grad is None:
            raise ValueError(f"{type(optimizer).__name__}: a preview of a step needs a gradient.")
        grad = local(grad)
        grad = grad if grad.stride() == whole.stride() else dense_grad(whole, grad)
        # float32 holds every weight exactly, and moments do not depend on how it is rounded.
        values, gradient = _sample(whole, blocks), _sample(grad, blocks).float()
        low = None if PARAM_LOW not in entry else _sample(local(entry[PARAM_LOW]), blocks)
        values = values.float() if low is None else join(values, low)
        group = {**group, **PLAIN_WEIGHTS}
        state: dict[str, torch.Tensor] = {"step": local(entry["step"]).clone()}
        state.update({scalar.name: local(entry[scalar.name]).clone() for scalar in optimizer.moments.scalars})
        moments = moments_of(optimizer.moments, entry)
        for moment in moments:
            # Paged state of a GPU's parameter is in memory of the host.
            source = source_of(moment, {key: local(entry[key]) for key in moment.keys if key in entry})
            if isinstance(source, Codes):
                absmax = source.absmax if blocks is None else source.absmax[blocks.to(source.absmax.device)]
                low = None if source.low is None else _sample(source.low, blocks)
                source = replace(source, codes=_sample(source.codes, blocks), absmax=absmax, low=low)
            else:
                source = _sample(source, blocks)
            state[moment.name] = values_of(moment, source, whole.device)
        rule = rules.rule(optimizer.rule)
        before = {moment.name: state[moment.name].clone() for moment in moments}
        options, who = hypers.step_options(type(optimizer).__name__, rule, group, scale, None), "preview of a step"
        sums = None
        if rule.has_norms and blocks is not None:
            own = {key: local(value) for key, value in entry.items() if isinstance(value, torch.Tensor)}
            own.update(
                (key, own[key].clone()) for key in state.keys() & own.keys() - {moment.name for moment in moments}
            )
            sums = arrays.measure_array(who, options, whole, grad, own, scale, optimizer.memory.pinned_spans)
        arrays.step_array(who, options, values, gradient, state, scale, sums)
        return before, {moment.name: state[moment.name] for moment in moments}

    def _parts(
        self,
        optimizer: Stateful,
        params: Collection[torch.Tensor] | None,
        scaling: Scaling,
        grads: Grads | None = None,
    ) -> list[Part]:
        """The groups; those with overridden parameters in several parts, each with its own scalars."""
        owner, rule = type(optimizer).__name__, rules.rule(optimizer.rule)
        resolved = supply.resolve(optimizer)
        chosen = None if params is None else {id(param) for param in params}
        parts = []
        for at, group in enumerate(optimizer.param_groups):
            split: Sequence[tuple[dict[str, Any], list[torch.Tensor]]] = [({}, group["params"])]
            if resolved is not None and resolved.by_id:
                hypers.normalize_group(owner, rule, group)
                split = resolved.parts[at]
            for changes, of_part in split:
                given = {**group, **changes} if changes else group
                options = _options(owner, rule, given, scaling)
                members = of_part if chosen is None else _only(of_part, chosen)
                taken = {i: grads[id(p)] for i, p in enumerate(members) if id(p) in grads} if grads else {}
                parts.append(Part(at, members, options, group.get("param_names"), taken, given=given))
        return parts

    def _gather(self, optimizer: Stateful, local_step: LocalStep, without: Collection[int] = ()) -> list[Any]:
        """Fill the table, and return for each part what is still missing; `without`: parts that are left out."""
        self._clear(optimizer)
        owner = type(optimizer).__name__
        return [
            self._table.add(part.params, state, part.options, owner, part.group, part.grads, part.names, part.firsts)
            for number, (part, state) in enumerate(zip(local_step.parts, local_step.states, strict=True))
            if number not in without
        ]

    def _clear(self, optimizer: Stateful) -> None:
        self._table.clear()
        if optimizer.memory.pinned_spans:
            self._table.allow_host(optimizer.memory.pinned_spans)

    def _without_matrices(self, optimizer: Stateful, local_step: LocalStep) -> list[int]:
        """Take the parts out of the table whose native step gives directions, now that they are checked: it must not
        write these into the parameters. Returns the numbers of these parts.

        Raises:
            ValueError: one has a parameter that is no matrix; nothing was changed.
        """
        found = [
            number for number, part in enumerate(local_step.parts) if rules.every()[part.options.rule].gives_direction
        ]
        for number in found:
            matrices.check_shapes(type(optimizer).__name__, local_step.parts[number], local_step.wholes(number))
        if found:
            self._gather(optimizer, local_step, found)
        return found

    def _emit(self, optimizer: Stateful, local_step: LocalStep, number: int, scaling: Scaling) -> matrices.Emit:
        """The native step of parameters of a part, over tensors that stand in for them."""
        part, state, owner = local_step.parts[number], local_step.states[number], type(optimizer).__name__
        # Directions are rounded once; what the weights have beyond 16 bits is for their own step.
        options = _options(owner, rules.rule(optimizer.rule), {**part.given, **PLAIN_WEIGHTS}, scaling)

        def emit(
            directions: list[torch.Tensor], indices: list[int], grads: dict[int, torch.Tensor], firsts: dict[int, int]
        ) -> None:
            self._clear(optimizer)
            entries = {each: state[part.params[index]] for each, index in zip(directions, indices, strict=True)}
            self._table.add(directions, entries, options, owner, part.group, grads, None, firsts)
            optimizer.memory.run_step(self._table, owner, scaling)
            self._table.clear()

        return emit

    def _check_distinct(self, optimizer: Stateful, local_step: LocalStep) -> None:
        """Raise ValueError where two parameters are the same memory: threads would step it twice at once."""
        same = self._table.same_memory()
        if same is None:
            return
        places = {id(p): (part.group, i) for part in local_step.parts for i, p in enumerate(part.params)}
        one, other = (places[id(self._table.params[row])] for row in same)
        groups = optimizer.param_groups
        names = [hypers.name_of(groups[at], i) + f" of group {at}" for at, i in (one, other)]
        raise ValueError(
            f"{type(optimizer).__name__}: {names[1]} has the memory of {names[0]}: a step would change it twice at "
            "once. Tie them by sharing one Parameter, and pass it once."
        )


def _supply(optimizer: Stateful, local_step: LocalStep, lacks: Sequence[Any]) -> None:
    """Make what a step found missing, so that the next gather lacks nothing."""
    owner, moments = type(optimizer).__name__, optimizer.moments
    new: list[tuple[dict[str, Any], torch.Tensor]] = []
    moved: list[tuple[torch.Tensor, int, int]] = []
    to_device: list[torch.Tensor] = []
    for number, (part, lack) in enumerate(zip(local_step.parts, lacks, strict=True)):
        group = optimizer.param_groups[part.group]
        # State belongs to the optimizer's own parameters, and what is gathered, to their local shards.
        own = {i: local_step.whole(number, i) for i in (*lack.state, *lack.moved, *lack.step, *lack.gaps)}
        run.check_not_capturing(owner, [own[i] for i in (*lack.state, *lack.moved, *lack.step)])
        local_step.lay_out(number, lack.layout)
        local_step.close_gaps(number, lack.gaps)
        new += [(group, own[i]) for i in lack.state]
        lying = [(own[i], optimizer.state[own[i]]) for i in lack.moved]
        moved += [(param, bits_of(moments, entry), master_bits_of(entry)) for param, entry in lying]
        # The count of new state is made on the CPU.
        counted = [i for i in lack.state if part.options.count_on_device and own[i].device.type != "cpu"]
        to_device += [own[i] for i in (*lack.step, *counted)]
    supply.allocate_states(optimizer, new)
    supply.convert_states(optimizer, moved)
    move_steps([(param, optimizer.state[param]) for param in to_device], moments)
    local_step.refresh()


def _options(owner: str, rule: Rule, group: dict[str, Any], scaling: Scaling) -> Any:
    return hypers.step_options(owner, rule, group, scaling.scale, scaling.found_inf)


def _only(params: Sequence[torch.Tensor], chosen: set[int]) -> list[torch.Tensor]:
    """The list with a placeholder without gradient for each parameter that is not chosen."""
    nothing = torch.empty(0, dtype=torch.float32)
    return [param if id(param) in chosen else nothing for param in params]


def _sample(tensor: torch.Tensor, blocks: torch.Tensor | None) -> torch.Tensor:
    flat = codec.flat(tensor)
    if blocks is None:
        return flat.clone()
    size = flat.numel() // codec.BLOCK * codec.BLOCK
    return flat[:size].view(-1, codec.BLOCK)[blocks.to(flat.device)].view(-1)
