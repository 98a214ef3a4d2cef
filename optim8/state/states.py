"""State that others put into an optimizer themselves, without load_state_dict.

torch.distributed.optim.ZeroRedundancyOptimizer loads this way: it writes each saved entry into the state of the
optimizer that it wraps, whatever library it is of.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any


class States(defaultdict[Any, Any]):
    """The states of an optimizer by parameter, which remember the parameters whose state came from outside.

    To deepcopy and pickle it is a plain defaultdict.
    """

    def __init__(self, states: dict[Any, Any], given: Iterable[Any] = ()) -> None:
        super().__init__(dict, states)
        self.given = set(given)

    def __setitem__(self, key: Any, entry: Any) -> None:
        super().__setitem__(key, entry)
        self.given.add(key)

    def put(self, key: Any, entry: dict[str, Any]) -> None:
        """Set a state that is in the optimizer's own form."""
        super().__setitem__(key, entry)
        self.given.discard(key)

    def __reduce__(self) -> tuple[Any, ...]:
        return defaultdict, (dict,), None, None, iter(self.items())

    def __copy__(self) -> States:
        return States(self, self.given)

    copy = __copy__
