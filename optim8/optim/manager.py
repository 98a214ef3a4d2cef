"""bitsandbytes' way to spell overrides."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from optim8.optim import override as overriding
from optim8.step import overrides
from optim8.step.overrides import OverrideHandle


class GlobalOptimManager:
    """Overrides by the calls of `bitsandbytes.optim.GlobalOptimManager`; `optim8.override` does the same and more.

    Examples:
        >>> import torch, optim8 as bnb
        >>> model = torch.nn.Sequential(torch.nn.Embedding(100, 64), torch.nn.Linear(64, 100))
        >>> manager = bnb.optim.GlobalOptimManager.get_instance()
        >>> manager.register_parameters(model.parameters())
        >>> manager.override_config(model[0].weight, "optim_bits", 32)
        >>> optimizer = bnb.optim.Adam8bit(model.parameters())
        >>> [optimizer.precision(p) for p in model.parameters()]
        ['32bit', '8bit', '32bit']
    """

    _instance: GlobalOptimManager | None = None
    _handles: list[OverrideHandle]

    def __init__(self) -> None:
        raise RuntimeError("GlobalOptimManager: there is one for the process. Call GlobalOptimManager.get_instance().")

    @classmethod
    def get_instance(cls) -> GlobalOptimManager:
        """The manager of the process."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance._handles = []
        return cls._instance

    def initialize(self) -> None:
        """Begin anew: end every override that was made through the manager. Those of `optim8.override` stay."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def register_parameters(self, params: Iterable[Any]) -> None:
        """Accept parameters or groups. You need not register any: an override belongs to the tensor itself,
        also after `model.to(...)`.

        Raises:
            TypeError: these are no parameters.
        """
        for item in params:
            inner = item["params"] if isinstance(item, dict) else [item]
            for param in [inner] if isinstance(inner, torch.Tensor) else inner:
                tensor = param[1] if isinstance(param, tuple) else param
                if not isinstance(tensor, torch.Tensor):
                    kind = type(tensor).__name__
                    raise TypeError(f"register_parameters: params must be parameters or groups of them, got a {kind}.")

    def override_config(
        self,
        parameters: torch.Tensor | Iterable[torch.Tensor],
        key: str | None = None,
        value: Any = None,
        key_value_dict: dict[str, Any] | None = None,
    ) -> None:
        """Override one option (`key`, `value`) or several (`key_value_dict`) of one parameter or several.

        Raises:
            ValueError: an option is unknown or its value not possible; the call uses both forms, or neither.
        """
        who = "override_config"
        if (key is None) == (key_value_dict is None):
            raise ValueError(f"{who}: pass either key and value, or key_value_dict.")
        changes = overriding.checked(who, {key: value} if key is not None else dict(key_value_dict or {}))
        tensors = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        if not tensors:
            raise ValueError(f"{who}: parameters must be at least one parameter, got none.")
        for tensor in tensors:
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{who}: parameters must be parameters, got a {type(tensor).__name__}.")
        found = [overriding.of_tensor(who, tensor) for tensor in tensors]  # all are checked before any is added
        self._handles += [overrides.add(changes, find) for find in found]

    def register_module_override(self, module: torch.nn.Module, param_name: str, config: dict[str, Any]) -> None:
        """Override options of the parameter that `module` has under a name.

        Raises:
            ValueError: the module has no such parameter, or an option is unknown or its value not possible.
        """
        who = "register_module_override"
        self._handles.append(overriding.override_module_parameter(who, module, param_name, config))
