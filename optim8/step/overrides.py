"""Options of single parameters, over those of their group.

An override is kept by the process, not by an optimizer, and refers to its target weakly: it may be made before the
optimizer, and it goes away with the parameter or module. Each optimizer looks up which of its parameters are meant
when something has changed; without any override, a step does not look at all.
"""

from __future__ import annotations

import operator
import warnings
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

Groups: TypeAlias = list[dict[str, Any]]
Find: TypeAlias = Callable[[Groups], dict[int, torch.Tensor] | None]


@dataclass(eq=False)
class _Override:
    """One call of `override`.

    find: given an optimizer's groups, which may hold the names to match, finds the parameters that are meant, by id;
        None once the target is gone.
    glob: the pattern, where names are those of optimizers.
    idle: whether nobody has looked for it, so that it may be for nothing.
    """

    options: dict[str, Any]
    find: Find
    glob: str = ""
    idle: bool = True


class OverrideHandle:
    """What `override` returns: `remove()` ends it, and so does leaving a `with` block."""

    def __init__(self, made: _Override) -> None:
        self._made = made

    def remove(self) -> None:
        """End the override. Hyper-parameters follow the group again; state stays in the precision that it has."""
        if self._made in _made:
            _made.remove(self._made)
            _changed()

    def __enter__(self) -> OverrideHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


_made: list[_Override] = []
_generation = 0
era = "0"  # the same as a text: a program of torch.compile is for one text, and may be for any number
_optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def _changed() -> None:
    global _generation, era
    _generation += 1
    era = str(_generation)


def register(optimizer: torch.optim.Optimizer) -> None:
    """Make an optimizer's names known to the patterns."""
    _optimizers.add(optimizer)


def add(changes: dict[str, Any], find: Find, glob: str = "", *, idle: bool = True) -> OverrideHandle:
    """Make an override from its parts; without `idle` it may be for nothing."""
    made = _Override(changes, find, glob, idle)
    _made.append(made)
    _changed()
    return OverrideHandle(made)


@dataclass
class Resolved:
    """Which parameters of an optimizer are overridden, and how.

    lists: for each group, its list of parameters and a copy.
    by_id: the changed options of a parameter, by its id.
    parts: for each group, its parameters split by options: (changed options, list as long as the group's, in which
        a placeholder without gradient stands for the parameters of other parts). Empty where nothing is overridden.
    """

    generation: int
    lists: list[tuple[list[torch.Tensor], list[torch.Tensor]]]
    by_id: dict[int, dict[str, Any]] = field(default_factory=dict)
    parts: list[list[tuple[dict[str, Any], list[torch.Tensor]]]] = field(default_factory=list)

    def holds(self, groups: Groups) -> bool:
        """Whether overrides and parameters are what they were."""
        if self.generation != _generation or len(groups) != len(self.lists):
            return False
        for group, (seen, copy) in zip(groups, self.lists, strict=True):
            if group["params"] is not seen or len(seen) != len(copy):
                return False
            if self.by_id and not all(map(operator.is_, seen, copy)):
                return False
        return True


def nothing(groups: Groups) -> Resolved:
    """What is resolved for groups that have the changed options already."""
    return Resolved(_generation, [(group["params"], list(group["params"])) for group in groups])


def none_made() -> bool:
    """Whether nothing was ever overridden in this process."""
    return _generation == 0


def resolve(owner: str, groups: Groups) -> Resolved:
    """Look up the overrides of these groups.

    Raises:
        ValueError: a pattern matches no name of any optimizer, or an option is not one of this optimizer.
    """
    by_id: dict[int, dict[str, Any]] = {}
    present = {id(param): group for group in groups for param in group["params"]}
    for made in list(_made):
        ids = made.find(groups)
        if ids is None:  # its target is gone
            _made.remove(made)
            continue
        if made.idle and not ids.keys() & present.keys():
            _check_idle(owner, made, groups)
        made.idle = False
        for i in ids.keys() & present.keys():
            for name in made.options:
                if name not in present[i]:
                    raise ValueError(f"{owner}: an override sets {name}, which is no option of this optimizer.")
            by_id[i] = {**by_id.get(i, {}), **made.options}
    resolved = Resolved(_generation, [(g["params"], list(g["params"])) for g in groups], by_id)
    if by_id:
        resolved.parts = [_split(group["params"], by_id) for group in groups]
    return resolved


def _check_idle(owner: str, made: _Override, groups: Groups) -> None:
    """Report an override that concerns no parameter of any optimizer."""
    for other in _optimizers:
        theirs = {id(param) for group in other.param_groups for param in group["params"]}
        if theirs & (made.find(other.param_groups) or {}).keys():
            return
    if not made.glob:
        # One made for a later optimizer may be right, and so may one of parameters that are not trained.
        waiting = [tuple(param.shape) for param in (made.find(groups) or {}).values() if param.requires_grad]
        if waiting:
            shapes = ", ".join(map(str, waiting[:5]))
            warnings.warn(
                f"override: no optimizer has any of the parameters that are meant (shapes {shapes}). It waits for one "
                "that has.",
                stacklevel=2,
            )
        return
    names = [name for group in groups for name in group.get("param_names", ())]
    if not names:
        raise ValueError(
            f"{owner}: the override of {made.glob!r} matches parameter names, and this optimizer knows none. "
            "Make it from model.named_parameters(), or pass module=model to override."
        )
    raise ValueError(
        f"{owner}: the override of {made.glob!r} matches no parameter name; there are {', '.join(names)}. "
        "Correct the pattern, or end it with handle.remove()."
    )


def _split(
    params: list[torch.Tensor], by_id: dict[int, dict[str, Any]]
) -> list[tuple[dict[str, Any], list[torch.Tensor]]]:
    nothing = torch.empty(0, dtype=torch.float32)
    parts: list[tuple[dict[str, Any], list[torch.Tensor]]] = []
    for at, param in enumerate(params):
        changes = by_id.get(id(param), {})
        part = next((list_ for options_, list_ in parts if _same(options_, changes)), None)
        if part is None:
            part = [nothing] * len(params)
            parts.append((changes, part))
        part[at] = param
    return parts


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    # A tensor (lr) equals only itself, since its owner may change it in place.
    return a.keys() == b.keys() and all(a[k] is b[k] or (_plain(a[k]) and a[k] == b[k]) for k in a)


def _plain(value: Any) -> bool:
    parts: Iterable[Any] = value if isinstance(value, tuple) else (value,)
    return not any(isinstance(part, torch.Tensor) for part in parts)
