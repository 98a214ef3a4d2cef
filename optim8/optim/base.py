"""The base of every optimizer. It fulfils torch.optim's contract; a subclass only declares its rule and defaults."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from threading import RLock
from typing import Any, ClassVar

import torch
from torch.optim.optimizer import ParamsT

from optim8 import _native, rules
from optim8.checkpoint import copying, load, save
from optim8.optim.optimizer import refuse_hooks
from optim8.optim.summary import summary
from optim8.optim.update import Update
from optim8.paging import Store
from optim8.paging.pager import pager_of
from optim8.rules import Moments
from optim8.state.states import States
from optim8.step import arguments, hypers, matrices, overrides
from optim8.step.memory import Memory


class BlockwiseOptimizer(Update):
    """An optimizer whose step is one native call over all its tensors, with state in 8, 16 or 32 bits.

    A subclass names its rule (a line of csrc/core/rules/all.h) and passes its defaults up.
    """

    always_paged: ClassVar[bool] = False

    # fused=True sets it, as in torch.optim. GradScaler.step then calls the step even where a gradient is infinite: it
    # hands over its scale and what it found (grad_scale, found_inf) and does not read them, since that would wait for
    # a GPU. Otherwise it unscales the gradients itself and leaves such a step out. Libraries that clip read this too.
    _step_supports_amp_scaling = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        refuse_hooks(cls)

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        owner = type(self).__name__
        _native.cpu()  # a missing build is an error here, not at the first step
        defaults = arguments.complete(owner, defaults)
        pager = pager_of(owner, defaults.pop("paged", None), self.always_paged)
        hypers.normalize_group(owner, rules.rule(self.rule), defaults)
        self.memory, self.state_checked, self.known_overrides = Memory(), False, None
        super().__init__(params, defaults)
        self._step_supports_amp_scaling = bool(defaults.get("fused"))
        self.state = States(self.state)
        if pager is not None:
            self._open(Store(owner, self.rule, pager, [p for group in self.param_groups for p in group["params"]]))
        overrides.register(self)

    def _open(self, store: Store) -> None:
        """Keep state where `store` says from now on, and take over what an earlier run left there."""
        self.memory = store
        store.watch(self.param_groups, self.state)
        try:
            store.check_reach(param for group in self.param_groups for param in group["params"])
            load.resume(self, 0)
        except BaseException:
            store.abandon()
            raise
        weakref.finalize(self, store.close)

    @property
    def moments(self) -> Moments:
        """The states of the rule, in order, and of its variants."""
        return rules.rule(self.rule).moments

    @property
    def turn(self) -> Any:
        """The lock of the thread that steps or loads: state and scratch must not change while native code uses them."""
        return self.__dict__.setdefault("_turn", RLock())  # setdefault: two threads that ask first get the same

    def __getstate__(self) -> dict[str, Any]:
        return copying.pickle_state(self, super().__getstate__())

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copying.copy_optimizer(self, super().__getstate__(), memo)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(copying.read_state(self, state))
        copying.complete(self)
        if "defaults" in state:  # a copy or a pickle
            self._step_supports_amp_scaling = bool(self.defaults.get("fused"))
        overrides.register(self)

    def __repr__(self) -> str:
        return summary(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch.optim does; its options are checked before anything changes.

        Raises:
            ValueError: an option or a parameter cannot be honoured.
        """
        owner, count = type(self).__name__, len(self.param_groups)
        super().add_param_group(param_group)
        group = self.param_groups[count]
        try:
            hypers.normalize_group(owner, rules.rule(self.rule), group)
            hypers.check_params(owner, count, group)
            if rules.variant(self.rule, group).gives_direction:
                matrices.check_group(owner, count, group)
            self.memory.check_reach(group["params"])
        except (TypeError, ValueError):
            del self.param_groups[count]
            raise
        self.added_capturable.append(bool(group.get("capturable")))
        load.resume(self, count)

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

    # Schedulers wrap a step without this mark, to set what Update._check sets, in code that torch.compile does not
    # follow.
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's: groups, and state by the position of its parameter. Overrides are not in it.

        State of DTensors is given as DTensors that torch.distributed.checkpoint can reshard; their scales are then in
        the form of tiles (docs/distributed.md), which load_state_dict understands with or without DTensors.

        Raises:
            ValueError: parameters are those of FullyShardedDataParallel, and their state may be 8-bit.
        """
        self.restore_options()
        save.prepare(self)
        return save.complete(self, super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, bit for bit, or convert what another library's optimizer gave.

        State saved here keeps its precision, and brings back what others keep in it, on the parameter's device. Dicts
        of torch.optim's namesake and of the libraries in docs/migrate.md are recognised: their state is converted to
        the precision that `precision` tells; codes of the same table and block size are taken over as
        they are. The whole dict is checked before the optimizer changes. Blocks run in memory order: if a parameter
        lies otherwise in memory than it did, its codes are quantized anew. The state of a channels-last parameter
        records its order (`dim_order`), so you may make its codes contiguous on the way, as safetensors asks.

        Raises:
            TypeError: it is no dict.
            ValueError: the dict does not fit; names the first key that does not.
        """
        load.load_state_dict(self, state_dict)
