"""The machinery of every optimizer: groups, state, the step, checkpoints. A subclass is a declaration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from functools import cached_property
from threading import RLock
from typing import Any

import torch
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT

from optim8 import _native, codec
from optim8.optim import arrivals, checkpoint, formats, options, overrides, reset, sharded, states
from optim8.optim.formats import own
from optim8.optim.given import States
from optim8.optim.paged import PagedState
from optim8.optim.sharded import Part
from optim8.optim.summary import summary
from optim8.optim.windows import Windows, is_capturing
from optim8.paging import launches
from optim8.paging.pager import pager_of


class BlockwiseOptimizer(PagedState):
    """An optimizer whose step is one native call over all its tensors, with state in 8 or 32 bits.

    A subclass names its rule (one of csrc/core/rules/all.h) and the rule's states, and passes its defaults up.
    """

    # With fused=True as in torch.optim: GradScaler.step calls the step also where a gradient is infinite, and hands
    # over its scale and what it found (grad_scale, found_inf) instead of looking at them, which would wait for a GPU.
    # Otherwise it unscales the gradients itself and leaves such a step out. Libraries that clip look at this too.
    _step_supports_amp_scaling = False

    _known_overrides: overrides.Resolved | None = None
    _state_seen = False  # whether all state was made or looked at here

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        owner = type(self).__name__
        _native.cpu()  # a missing build is an error here, not at the first step
        defaults = options.completed(owner, defaults)
        pager = pager_of(owner, defaults.pop("paged", None), self.always_paged)
        options.normalize_group(owner, defaults)
        super().__init__(params, defaults)
        self._step_supports_amp_scaling = bool(defaults.get("fused"))
        self.state = States(self.state)
        self._open_store(pager)
        overrides.register(self)

    @cached_property
    def _table(self) -> Any:
        """Native scratch of a step, kept for its memory; nothing of it is saved or copied with the optimizer."""
        return _native.cpu().StepTable()

    @property
    def _turn(self) -> Any:
        """Held by the thread that steps or loads: native code may not see state or scratch change meanwhile."""
        return self.__dict__.setdefault("_turns", RLock())  # setdefault: two threads that ask first get the same

    @cached_property
    def _windows(self) -> Windows:
        """What state dicts show of sharded state."""
        return Windows(self._turn)

    def __getstate__(self) -> dict[str, Any]:
        self._windows.sync()
        return super().__getstate__()

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedState:
        self._windows.sync()
        return super().__deepcopy__(memo)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "defaults" in state:  # a copy or a pickle
            self._step_supports_amp_scaling = bool(self.defaults.get("fused"))
        overrides.register(self)
        for group in self.param_groups:
            for name, value in options.EXTRA_DEFAULTS.items():
                group.setdefault(name, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch.optim does; its options are checked before anything changes.

        Raises:
            ValueError: an option or a parameter cannot be honoured.
        """
        count = len(self.param_groups)
        super().add_param_group(param_group)
        group = self.param_groups[count]
        try:
            options.normalize_group(type(self).__name__, group)
            options.check_params(type(self).__name__, count, group)
            if self._store is not None:
                self._store.check_reach(group["params"])
        except (TypeError, ValueError):
            del self.param_groups[count]
            raise
        self._take_kept(count)

    def precision(self, param: torch.Tensor) -> str:
        """How the state of `param` is kept, or will be once it has had a gradient: "8bit" or "32bit".

        Raises:
            ValueError: the optimizer does not have this parameter.
        """
        self._adopt()
        self._resolved()
        if self.state.get(param):
            return self._precision_now({}, param)
        for group in self.param_groups:
            if any(param is candidate for candidate in group["params"]):
                return self._precision_now(group, param)
        raise ValueError(f"{type(self).__name__}.precision: the tensor must be a parameter of this optimizer.")

    def _precision_now(self, group: dict[str, Any], param: torch.Tensor) -> str:
        """`precision` of a parameter of a group, without a look for new overrides."""
        in_8_bits = self._is_8bit(param) if self.state.get(param) else self._wants_8bit(group, param)
        return "8bit" if in_8_bits else "32bit"

    def __repr__(self) -> str:
        return summary(self)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss anew and returns it, as for torch.optim.

        Returns:
            What the closure returned, else None.

        Raises:
            ValueError: a parameter, gradient or state cannot be stepped; names the parameter. Nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    # Native calls cannot be traced. The closure stays outside: what it compiles stays compiled.
    @_disable_dynamo
    def _update(self) -> None:
        with self._turn:
            try:
                self._update_alone()
            finally:
                self._table.clear()  # lets go of the gradients

    def _update_alone(self) -> None:
        relaid: list[dict[int, torch.Tensor]] = [{} for _ in self.param_groups]
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found_inf is not None and found_inf.device.type == "cpu" and found_inf.item():
            return
        self._windows.sync()
        if not self._state_seen and not is_capturing():
            self._check_scales()
        if self._store is not None:
            self._store.check_params(self.param_groups)
            self._check_others()
        self._adopt()
        parts = self._parts(scale, found_inf)
        with sharded.LocalStep(type(self).__name__, parts, self.state) as local:
            table, wanted = self._gather(local, relaid)
            if any(missing.gaps for missing in wanted):
                local.close_gaps([missing.gaps for missing in wanted])
                table, wanted = self._gather(local, relaid)
            if any(w.state or w.layout or w.moved or w.step for w in wanted):
                self._supply(parts, local, relaid, wanted)
                table, _ = self._gather(local, relaid)
            self._check_distinct(parts, local, table)
            run = _native.run_step
            if self._store is not None:
                self._store.prepare(self.param_groups, self.state)
                run = self._store.run_step
            try:
                run(table, type(self).__name__, scale, found_inf)
            finally:
                local.copy_back()
        self._windows.show()
        if scale is not None:
            self._unscale_gradients(scale)

    def _unscale_gradients(self, scale: torch.Tensor) -> None:
        """As torch's fused optimizers: after a step that was handed a scale, gradients are without it."""
        by_device: dict[torch.device, list[torch.Tensor]] = {}
        for group in self.param_groups:
            for grad in (sharded.local(param.grad) for param in group["params"] if param.grad is not None):
                by_device.setdefault(grad.device, []).append(grad)
        for device, grads in by_device.items():
            torch._foreach_div_(grads, scale.to(device, non_blocking=True))

    def _check_scales(self) -> None:
        """Look once at state that was there before the first step: nobody knows whose hands it went through."""
        for at, group in enumerate(self.param_groups):
            for index, param in enumerate(group["params"]):
                entry = self.state.get(param) or {}
                where = f"{type(self).__name__}: {options.called(group, index)} of group {at}: state"
                for moment in self.moments:
                    codes, absmax = entry.get(moment.codes), entry.get(moment.absmax)
                    if not (type(codes) is type(absmax) is torch.Tensor and codes.dtype == torch.uint8):
                        continue  # of what else is wrong the step tells itself
                    if absmax.shape == (codec.blocks(codes.numel()),) and codes.stride() == states.dense_stride(codes):
                        states.check_scales(where, moment, codec.flat(codes), absmax)
        self._state_seen = True

    def _check_distinct(self, parts: list[Part], local: sharded.LocalStep, table: Any) -> None:
        """Raise ValueError where two parameters are the same memory: threads would step it twice at once."""
        same = table.same_memory()
        if same is None:
            return
        places = {id(p): (at, i) for at, params, _ in local.parts for i, p in enumerate(params)}
        one, other = (places[id(table.params[row])] for row in same)
        names = [options.called(self.param_groups[at], i) + f" of group {at}" for at, i in (one, other)]
        raise ValueError(
            f"{type(self).__name__}: {names[1]} has the memory of {names[0]}: a step would change it twice at once. "
            "Tie them by sharing one Parameter, and pass it once."
        )

    def _supply(
        self, parts: list[Part], local: sharded.LocalStep, relaid: list[dict[int, torch.Tensor]], wanted: list[Any]
    ) -> None:
        """What a step found missing, in the order in which the gather looks: it tells of a parameter's state once
        its gradient is right, and of its count of steps once its state is there."""
        for (at, params, _), missing in zip(local.parts, wanted, strict=True):
            relaid[at].update({i: _in_layout_of(params[i]) for i in missing.layout})
        # State belongs to the optimizer's own parameters, and what is gathered, to their local shards.
        owner = type(self).__name__
        for (at, params, _), missing in zip(parts, self._gather(local, relaid)[1], strict=True):
            _native.check_not_capturing(owner, [params[i] for i in (*missing.state, *missing.moved, *missing.step)])
            self._allocate(self.param_groups[at], [params[i] for i in missing.state])
            self._convert([("", params[i], self._is_8bit(params[i])) for i in missing.moved])
        local.refresh()
        for (_, params, _), missing in zip(parts, self._gather(local, relaid)[1], strict=True):
            _native.check_not_capturing(owner, [params[i] for i in missing.step])
            states.move_steps([(params[i], self.state[params[i]]) for i in missing.step])

    def _hyper(self, group: dict[str, Any], scale: torch.Tensor | None, found_inf: torch.Tensor | None) -> Any:
        """The group's scalars; what lives on a device stays there."""
        owner = type(self).__name__
        options.normalize_group(owner, group)  # a user or a scheduler may have edited it
        formats.groups.check(f"{owner}: a parameter group", self.rule, group)
        if group.get("capturable") and any(param.device.type == "cpu" for param in group["params"]):
            raise ValueError(f"{owner}: capturable=True needs CUDA parameters, got one on cpu. Use capturable=False.")
        lr = group["lr"]
        on_device = isinstance(lr, torch.Tensor) and lr.device.type != "cpu"
        if on_device:
            for index, param in enumerate(group["params"]):
                if param.device != lr.device:
                    raise ValueError(
                        f"{owner}: lr on {lr.device} needs all parameters of its group there, got "
                        f"{options.called(group, index)} on {param.device}. Use a number, or a group for each device."
                    )
            if lr.dtype != torch.float32:
                raise ValueError(f"{owner}: lr on {lr.device} must be float32, got {lr.dtype}. Use lr.float().")
        amp_on_device = found_inf is not None and found_inf.device.type != "cpu"
        if amp_on_device and any(param.device.type == "cpu" for param in group["params"]):
            raise ValueError(f"{owner}: a GradScaler on {found_inf.device} needs parameters there, got one on cpu.")  # type: ignore[union-attr]
        return _native.cpu().Hyper(
            lr=0.0 if on_device else float(lr),
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            eps=float(group.get("eps", 0.0)),
            weight_decay=float(group["weight_decay"]),
            maximize=bool(group["maximize"]),
            gradient_scale=1.0 if scale is None or scale.device.type != "cpu" else 1.0 / float(scale),
            count_on_device=bool(group.get("capturable")) or on_device or amp_on_device,
            device_lr=lr.data_ptr() if on_device else 0,
        )

    def _parts(self, scale: torch.Tensor | None, found_inf: torch.Tensor | None) -> list[Part]:
        """The groups; those with overridden parameters in several parts, each with its own scalars."""
        resolved = self._resolved()
        if resolved is None or not resolved.by_id:
            return [(i, g["params"], self._hyper(g, scale, found_inf)) for i, g in enumerate(self.param_groups)]
        for group in self.param_groups:
            options.normalize_group(type(self).__name__, group)
        return [
            (i, params, self._hyper({**group, **changes} if changes else group, scale, found_inf))
            for i, (group, split) in enumerate(zip(self.param_groups, resolved.parts, strict=True))
            for changes, params in split
        ]

    def _gather(self, local: sharded.LocalStep, relaid: Sequence[dict[int, torch.Tensor]]) -> tuple[Any, list[Any]]:
        """All tensors of a step as one native table, and for each part what is still missing."""
        table = self._table
        table.clear()  # of a gather that found something missing
        if self._store is not None:
            table.allow_host(self._store.pinned_spans)
        owner = type(self).__name__
        wanted = [
            table.add(params, state, self.rule, hyper, owner, at, relaid[at], self.param_groups[at].get("param_names"))
            for (at, params, hyper), state in zip(local.parts, local.states, strict=True)
        ]
        return table, wanted

    def _allocate(self, group: dict[str, Any], wanted: Sequence[torch.Tensor]) -> None:
        """Zero state for parameters of a group, all of one device in one go."""
        by_device: dict[torch.device, list[torch.Tensor]] = {}
        for param in wanted:
            by_device.setdefault(param.device, []).append(param)
        for params in by_device.values():
            # What is 8-bit depends on the whole parameter; its state is that of the local shard.
            shards = [(sharded.local(param), self._wants_8bit(group, param)) for param in params]
            entries = states.allocate(self.moments, shards, self._store)
            for param, entry in zip(params, entries, strict=True):
                self.state.put(param, entry)

    def _adopt(self) -> None:
        """Bring state that came from outside into the form of this optimizer, as load_state_dict does.

        Raises:
            ValueError: it does not fit; nothing was changed.
        """
        if type(self.state) is not States:  # a user's own dict
            self.state = States(self.state, self.state)
            if self._store is not None:
                self._store.state = self.state
        if not self.state.given:
            return
        owner = type(self).__name__
        entries: list[tuple[str, torch.Tensor, dict[str, Any], bool]] = []
        for at, group in enumerate(self.param_groups):
            for i, param in enumerate(group["params"]):
                entry = self.state.get(param) if param in self.state.given else None
                if not entry or sharded.is_dtensor(param):  # shards are given by nobody
                    continue
                entry = states.under_present_names(self.moments, entry)
                self.state[param] = entry
                in_8_bits = self.moments[0].absmax in entry or self._wants_8bit(group, param)
                if not own.is_own(self.moments, entry, in_8_bits):
                    entries.append((f"{owner}: the state of parameter {i} of group {at}", param, entry, in_8_bits))
        ours = [at for at in entries if self.moments[0].absmax in at[2]]
        for part in (ours, [at for at in entries if self.moments[0].absmax not in at[2]]):
            known = formats.of_states([entry for _, _, entry, _ in part])
            if known is None:  # the step says what it lacks
                continue
            if known is not own.FORMAT:
                formats.common.check_rule(owner, self.rule)
            for param, entry in checkpoint.adopted(self.moments, known, part, self._store):
                self.state.put(param, entry)
        if entries and self._store is not None:
            self._store.keep_only(self.state.values())
        self.state.given.clear()

    def _convert(self, wanted: Sequence[tuple[str, torch.Tensor, bool]]) -> None:
        """Lay out the states of (name for a report, parameter, whether in 8 bits) anew for the parameters."""
        by_device: dict[torch.device, list[tuple[str, torch.Tensor, dict[str, Any], bool]]] = {}
        for name, param, in_8_bits in wanted:
            by_device.setdefault(param.device, []).append((name, param, self.state[param], in_8_bits))
        if wanted:
            launches.settle()
        for of_device in by_device.values():
            shards = [(name, sharded.local(param), entry, in_8_bits) for name, param, entry, in_8_bits in of_device]
            fresh = checkpoint.converted(self.moments, shards, self._store)
            for (_, param, _, _), entry in zip(of_device, fresh, strict=True):
                self.state.put(param, entry)
        if wanted and self._store is not None:
            self._store.keep_only(self.state.values())

    def _is_8bit(self, param: torch.Tensor) -> bool:
        return self.moments[0].absmax in self.state[param]

    def _resolved(self) -> overrides.Resolved | None:
        """The overrides of this optimizer, or None where none was ever made. Where they have changed, existing state
        is brought to the precision that they ask for."""
        if overrides.none_made():
            return None
        known = self._known_overrides
        if known is not None and known.holds(self.param_groups):
            return known
        resolved = overrides.resolve(type(self).__name__, self.param_groups)
        self._known_overrides = resolved
        wrong = []
        for group in self.param_groups:
            for param in group["params"]:
                changes = resolved.by_id.get(id(param), {})
                if self.state.get(param) and not changes.keys().isdisjoint(options.EXTRA_DEFAULTS):
                    in_8_bits = self._wants_8bit(group, param)
                    if in_8_bits != self._is_8bit(param):
                        wrong.append((f"override of a parameter {tuple(param.shape)} ", param, in_8_bits))
        self._convert(wrong)
        return resolved

    def overridden(self, param: torch.Tensor) -> dict[str, Any]:
        """The options that `param` has otherwise than its group (optim8.override)."""
        resolved = self._resolved()
        return {} if resolved is None else dict(resolved.by_id.get(id(param), {}))

    def _wants_8bit(self, group: dict[str, Any], param: torch.Tensor) -> bool:
        """options.wants_8bit, with the overrides that _resolved has found."""
        known = self._known_overrides
        changes = known.by_id.get(id(param), {}) if known is not None else {}
        return options.wants_8bit({**group, **changes} if changes else group, param)

    @torch.no_grad()
    def reset_state(self, params: torch.Tensor | Iterable[torch.Tensor] | None = None) -> None:
        """Forget what the state of parameters has learnt: their next step is a first one, bit for bit.

        Zeroing state by hand would not do: 8-bit state consists of codes, and code 0 is not the value 0. State stays
        where it lies (in a file, in a CUDA graph) unless it has another precision than new state would have. What
        others keep with a parameter's state stays as it is.

        Args:
            params: parameters of this optimizer, one or several; None: all.

        Raises:
            TypeError, ValueError: something else than parameters of this optimizer; nothing was reset.
        """
        chosen = reset.chosen(f"{type(self).__name__}.reset_state", self.param_groups, params)
        with self._turn:
            self._windows.sync()
            self._resolved()
            launches.settle()
            stateful = [(param, group) for param, group in chosen if self.state.get(param)]
            with self._rewriting():
                for param, group in stateful:
                    entry, in_8_bits = self.state[param], self._wants_8bit(group, param)
                    if states.fits(self.moments, entry, sharded.local(param), in_8_bits, self._store):
                        reset.in_place(self.moments, entry, in_8_bits)
                    else:
                        self._allocate(group, [param])
                        self.state[param].update(states.others(self.moments, entry))

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's: groups, and state by the position of its parameter. Overrides are not in it.

        State of DTensors is given as DTensors that torch.distributed.checkpoint can reshard; their scales are then in
        the form of tiles (docs/distributed.md), which load_state_dict understands with or without DTensors.

        Raises:
            ValueError: parameters are those of FullyShardedDataParallel, and their state may be 8-bit.
        """
        self._windows.sync()
        self._note_state_dict()
        self._adopt()
        self._resolved()
        launches.settle()
        sharded.check_can_save(type(self).__name__, self.param_groups)
        params = [param for group in self.param_groups for param in group["params"]]
        packed = super().state_dict()
        groups = [options.saved(group) for group in packed["param_groups"]]
        state = {
            key: own.with_dim_order(self.moments, entry) if isinstance(entry, dict) else entry
            for key, entry in packed["state"].items()
        }
        packed = {**packed, "state": state, "param_groups": groups}
        return sharded.saved_state_dict(type(self).__name__, self.moments, params, packed, self._windows)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, bit for bit, or convert what another library's optimizer gave.

        What others keep in a parameter's state comes back with a dict of our own, on the parameter's device.
        State saved here keeps its precision. Dicts of torch.optim's Adam and AdamW, bitsandbytes, torchao and
        lion-pytorch are recognised (docs/migrate.md): their state comes to the precision that `precision` says; codes
        of the same table and block size are taken over as they are. The dict is checked whole before the optimizer
        changes. Codes of a parameter that lies otherwise in memory are quantized anew, since blocks run in memory
        order; the state of a channels-last parameter says its order (`dim_order`), so its codes may be made contiguous
        on the way, as safetensors asks.

        Raises:
            TypeError: it is no dict.
            ValueError: the dict does not fit; names the first key that does not.
        """
        owner = f"{type(self).__name__}.load_state_dict"
        if not isinstance(state_dict, dict):
            raise TypeError(
                f"{owner}: state_dict must be a dict, as state_dict() gives it, got {type(state_dict).__name__}."
            )
        launches.settle()
        self._windows.sync()
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            if changed is not None:
                state_dict = changed
        state_dict = arrivals.sort(owner, self.moments, self.param_groups, self.state, state_dict)
        known = formats.recognise(owner, self.rule, state_dict)
        saved = [
            known.read_group(f"{owner}: param_groups[{index}]", self.rule, group)
            for index, group in enumerate(state_dict["param_groups"])
        ]
        groups = checkpoint.merged_groups(owner, self.param_groups, deepcopy(saved))
        for group in groups:
            group.update({**options.EXTRA_DEFAULTS, **group})
            options.normalize_group(owner, group)
        with self._turn:
            self._resolved()
            state = checkpoint.loaded_state(
                owner, self.moments, known, state_dict, groups, self._wants_8bit, self._store, self.state
            )
            self.__setstate__({"state": state, "param_groups": groups})
            self._known_overrides = None
            self._state_seen = True
            if self._store is not None:
                self._store.end_loading(self.param_groups, self.state)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)


def _in_layout_of(param: torch.Tensor) -> torch.Tensor:
    grad = param.grad
    if grad is None:
        raise RuntimeError("the gradient of a parameter vanished while it was being stepped.")
    copy = torch.empty_strided(tuple(param.shape), param.stride(), dtype=grad.dtype, device=grad.device)
    return copy.copy_(grad)
