"""The update of an optimizer: one native call, or where torch's operations are recorded or replaced, one operator."""

from __future__ import annotations

from typing import Any

import torch
from torch._compile import _disable_dynamo

from optim8.checkpoint import load
from optim8.checkpoint.adopt import adopt_states
from optim8.checkpoint.formats import groups as foreign_groups
from optim8.checkpoint.windows import Windows
from optim8.optim.access import StateAccess
from optim8.rules import rule
from optim8.state import symbols
from optim8.state.layout import count_keys
from optim8.state.shards import local
from optim8.step import hypers, norms, operator, overrides, record, scaling, supply
from optim8.step.stepper import Stepper


class Update(StateAccess):
    """An optimizer with a step that torch can record."""

    state_checked: bool  # whether all state was made or looked at here
    _was_compiled = False  # whether torch.compile has followed a step

    @property
    def stepper(self) -> Stepper:
        """The object that steps the parameters. It is neither saved nor copied with the optimizer."""
        known: Stepper | None = self.__dict__.get("_stepper")
        return self.__dict__.setdefault("_stepper", Stepper()) if known is None else known

    @property
    def windows(self) -> Windows:
        """The tiles of sharded state that state dicts hold."""
        known: Windows | None = self.__dict__.get("_windows")
        return self.__dict__.setdefault("_windows", Windows(self.turn)) if known is None else known

    def restore_options(self) -> None:
        """Put back what torch.compile leaves in groups on a CPU: it takes them for capturable, and where a program
        changes a group in any way, it writes that into the group too."""
        if self._was_compiled:
            for was, group in zip(self.added_capturable, self.param_groups):
                if not was and group.get("capturable") and any(param.device.type == "cpu" for param in group["params"]):
                    group["capturable"] = False

    @property
    def added_capturable(self) -> list[bool]:
        """Which groups were capturable when they were added."""
        known: list[bool] = self.__dict__.setdefault("_added_capturable", [])
        return known

    def _update(self) -> None:
        if torch.compiler.is_dynamo_compiling():
            # Where the graph may break nothing is gained by a program, which compiles something for every tensor, and
            # looks at each of them before each run.
            if symbols.is_one_graph():
                self._compile()
            else:
                self._update_here(is_compiled=True)
        elif not _is_watched(self.param_groups) or not self._record():
            self._update_here()

    @_disable_dynamo
    def _update_here(self, is_compiled: bool = False) -> None:
        """Step by native code, which torch does not see."""
        self._was_compiled = self._was_compiled or is_compiled
        scales = scaling.of(self)
        if scales.skips:
            return
        with self.turn:
            self._check()
            self.stepper.step(self, scaling=scales)
            self.windows.show()
            scales.unscale(self.param_groups)

    def _check(self) -> None:
        """Look at what others may have changed since the last step."""
        self._opt_called = True  # schedulers warn where it is missing
        self.restore_options()
        self.windows.sync()
        load.check_before_step(self)
        adopt_states(self)
        for group in self.param_groups:
            foreign_groups.check(f"{type(self).__name__}: a parameter group", self.rule, group)

    def _record(self) -> bool:
        """Step by the operator, under a mode or with FakeTensors. False: it must be native code, which has memory to
        work on, and the modes that are on can do without seeing it.

        Raises:
            RuntimeError: it cannot be the operator, and native code will not do.
        """
        stepped = [param for group in self.param_groups for param in group["params"] if param.grad is not None]
        if not stepped:
            return True
        first = local(stepped[0])
        is_symbol = symbols.is_symbol(first)
        reason = self._obstacle() or ("" if is_symbol else symbols.obstacle_of_memory())
        if reason:
            if is_symbol or symbols.needs_no_memory():
                raise RuntimeError(f"{type(self).__name__}: this step cannot be recorded: {reason}")
            return False
        with self.turn, symbols.modes_of(first):
            self._supply(is_symbol)
        params: list[torch.Tensor] = []
        grads: list[torch.Tensor] = []
        states: list[torch.Tensor] = []
        numbers: list[torch.Tensor] = []
        plans = []
        with symbols.mode_of(first):
            for group in self.param_groups:
                plan = record.record_group(self, group, params, grads, states)
                if plan:
                    plans.append(plan)
                    numbers += record.numbers_of(group, record.number_names(self.rule))
            numbers = [symbols.beside(first, number) for number in numbers]
            recorder = 0 if symbols.proxy_mode() is None else operator.recorder_of(self)
            torch.ops.optim8.step(params, grads, states, numbers, plans, recorder)
        return True

    def _compile(self) -> None:
        """Step by the operator, in a program of torch.compile, which follows this code and reports a graph break, with
        its reason, as an error."""
        params: list[torch.Tensor] = []
        grads: list[torch.Tensor] = []
        states: list[torch.Tensor] = []
        numbers: list[torch.Tensor] = []
        plans: list[str] = []
        reason = ""
        if getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None:
            reason = _SCALED
        for group in self.param_groups:
            flags: list[str] = []
            values: list[Any] = []
            reason = reason or self._init_group(group, overrides.era, flags, values)
            for name, value in zip(flags, values):
                if group[name] != value:  # what the program has done by now, which only its end brings to the group
                    reason = _CHANGED
        for group in self.param_groups:
            found: tuple[list[Any], ...] = ([], [], [], [], [])
            if not reason:
                reason = self._init_group(
                    group, overrides.era, [], [], found[0], found[1], found[2], found[3], found[4]
                )
            if not reason:
                params += found[0]
                grads += found[1]
                states += found[2]
                plans += found[3]
                numbers += record.numbers_of(group, found[4])
        if reason:
            torch._dynamo.graph_break(msg=reason)
        torch.ops.optim8.step(params, grads, states, numbers, plans, 0)

    def _init_group(
        self,
        group: dict[str, Any],
        era: str,
        flags: list[str],
        values: list[Any],
        params: list[torch.Tensor] | None = None,
        grads: list[torch.Tensor] | None = None,
        states: list[torch.Tensor] | None = None,
        plans: list[str] | None = None,
        names: list[str] | None = None,
    ) -> str:
        """Fill the lists with what the operator takes of a group: what torch.compile calls while it compiles a step, by
        this name, instead of following it. It takes the tensors for inputs of the program, and looks before each run
        whether groups and state are what they were.

        Args:
            group: one of the optimizer's.
            era: of the overrides. A program is for one.
            flags, values: options that are no numbers, and what they are outside of the program.
            params, grads, states: the tensors; None: no state is made.
            plans: the plan, where there is something to step.
            names: then also the options whose numbers the operator takes.

        Returns:
            Why the step cannot be in a program; "": it can.
        """
        reason = self._obstacle()
        if reason:
            return reason
        if params is None or grads is None or states is None or plans is None or names is None:
            try:
                with self.turn:  # states have other keys behind this, and torch.compile remembers keys from here on
                    self._check()
                    supply.resolve(self)
            except Exception as error:  # it would be one of torch.compile's own
                return f"{error}"
            self._was_compiled = True
            plain = {k: v for k, v in record.group_options(self, group).items() if not isinstance(v, tuple)}
            flags += [name for name in plain if name != "capturable"]
            values += [plain[name] for name in flags]
            return ""
        try:
            with self.turn:
                self._supply(is_symbol=False)
                plan = record.record_group(self, group, params, grads, states)
        except Exception as error:  # it would be one of torch.compile's own
            return f"{error}"
        if plan:
            plans.append(plan)
            names += record.number_names(self.rule)
        return ""

    def _supply(self, is_symbol: bool) -> None:
        """Have state for every gradient, checked."""
        self._check()
        supply.resolve(self)
        if rule(self.rule).has_norms:
            norms.check_whole(type(self).__name__, (p for group in self.param_groups for p in group["params"]))
        if not is_symbol:
            with self.stepper.gathered(self):
                return
        pairs = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        supply.allocate_states(
            self, [(group, p) for group, p in pairs if not self.state.get(p) and supply.keeps_state(self, group, p)]
        )
        for group, param in pairs:
            if hypers.counts_on_device(supply.options_of(self, group, param)):
                entry = self.state.get(param) or {}
                entry.update({key: entry[key].to(param.device) for key in count_keys(self.moments) if key in entry})

    def _obstacle(self) -> str:
        """Why a step of this optimizer cannot be an operator; "": it can."""
        if self.memory.is_paged:
            return (
                "its state is paged, and moves between tiers in a step, which a program cannot hold. Use paged=False, "
                "or leave the step outside of what is compiled or recorded."
            )
        if scaling.of(self) != scaling.UNSCALED:
            return _SCALED
        if not overrides.none_made():
            changes = overrides.resolve(type(self).__name__, self.param_groups).by_id.values()
            if any(isinstance(value, torch.Tensor) for each in changes for value in each.values()):
                return (
                    "an override gives a parameter a tensor as an option, which a program cannot hold. Use a number, "
                    "or a group of its own with that tensor."
                )
        proxy = symbols.proxy_mode()
        for at, group in enumerate(self.param_groups):
            for index, param in enumerate(group["params"]):
                # Of a fake shard there is no step, only state.
                is_fake = proxy is None and symbols.fake_mode_of(local(param)) is not None
                if not symbols.is_plain(param) and not is_fake:
                    return (
                        f"parameter {index} of group {at} must be a plain tensor, got a {type(param).__name__}, whose "
                        "step needs other ranks or another library. Leave the step outside of what is compiled or "
                        "recorded."
                    )
        return ""


_SCALED = (
    "a GradScaler has left its scale to the step (fused=True), which waits for what it found. Use fused=False, so that "
    "the scaler takes the scale out itself, or leave the step outside of what is compiled or recorded."
)


_CHANGED = (
    "the program changes an option of a parameter group that is no number, and then steps. Change it outside of what "
    "is compiled."
)


def _is_watched(groups: list[dict[str, Any]]) -> bool:
    """Whether a mode sees torch's operations now, or the parameters are FakeTensors: one look, however many they are.
    A fake one among others is an error of the step."""
    if torch._C._len_torch_dispatch_stack() > 0:
        return True
    first = next((param for group in groups for param in group["params"]), None)
    return first is not None and symbols.fake_mode_of(first) is not None
