"""transformers' Trainer, and those made from it (TRL, sentence-transformers): `optim=` names that run on optim8.

The names of bitsandbytes' optimizers and of torchao's 8-bit AdamW. The Trainer keeps its other names.
"""

from __future__ import annotations

import ast
import functools
import inspect
import weakref
from typing import Any

import torch

from optim8 import optim
from optim8.integrations.hooks import after_import
from optim8.integrations.names import in_small_letters
from optim8.integrations.notice import say
from optim8.optim.override import override_module_parameter
from optim8.text import size_text

_WHO = "optim8.integrations.transformers"
# Options of torchao's optimizer in `optim_args`: the values that change nothing, and what is here instead.
_OF_TORCHAO = {
    "block_size": (256, "Blocks have 256 values here."),
    "bf16_stochastic_round": (False, "Write param_rounding=dithered."),
}
_in_32_bits: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


def install() -> None:
    """Let the Trainer take its `optim=` names from optim8, now or when the program imports it."""
    after_import("transformers.trainer", _patch)


def optimizer_class(name: str) -> type[optim.BlockwiseOptimizer] | None:
    """The class for one of the Trainer's names, such as "paged_adamw_8bit"; None for what stays the Trainer's own."""
    bare = name.replace("_bnb", "").replace("_torch", "").replace("_", "")
    found = in_small_letters().get(bare)
    of_torch = found is not None and hasattr(torch.optim, found.__name__)  # "rmsprop" is torch's, "rmsprop_bnb" is not
    return None if of_torch and "bnb" not in name and not bare.endswith("bit") else found


def optimizer_arguments(cls: type[optim.BlockwiseOptimizer], arguments: Any) -> dict[str, Any]:
    """Arguments of an optimizer from TrainingArguments, as the Trainer chooses them for bitsandbytes.

    `optim_args="key=value, ..."` may name every argument of the optimizer, and beta1, beta2 and beta3.

    Raises:
        ValueError: `optim_args` names an argument that the optimizer has not, or is not of that form.
    """
    known = inspect.signature(cls).parameters
    given = _read(cls, arguments.optim_args)
    result: dict[str, Any] = {"lr": arguments.learning_rate}
    if "betas" in known:
        betas = [arguments.adam_beta1, arguments.adam_beta2, *known["betas"].default[2:]]
        result["betas"] = tuple(given.pop(f"beta{i + 1}", beta) for i, beta in enumerate(betas))
        if "eps" in known:
            result["eps"] = arguments.adam_epsilon
    for name, value in given.items():
        neutral, advice = _OF_TORCHAO.get(name, (None, f"It has: {', '.join(list(known)[1:-1])}."))
        if name in known:
            result[name] = value
        elif name not in _OF_TORCHAO or value != neutral:
            raise ValueError(f"{_WHO}: optim_args: {cls.__name__} takes no {name}={value}. {advice}")
    return result


def _read(cls: type, text: str | None) -> dict[str, Any]:
    """`key=value, ...` with values as Python writes them; what is no such value is a string."""
    result: dict[str, Any] = {}
    for part in (text or "").replace(" ", "").split(","):
        name, equals, value = part.partition("=")
        if part and not equals:
            raise ValueError(f"{_WHO}: optim_args: {cls.__name__} needs key=value, key=value, ..., got {text!r}.")
        try:
            result[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            result[name] = {"true": True, "false": False}.get(value, value)
    result.pop("", None)
    return result


def keep_embeddings_in_32_bits(model: torch.nn.Module) -> None:
    """The Trainer's rule for bitsandbytes' 8-bit optimizers: embeddings have 32-bit state. A later override wins."""
    embeddings = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    for module in embeddings:
        if module not in _in_32_bits:
            _in_32_bits.add(module)
            override_module_parameter(_WHO, module, "weight", {"optim_bits": 32}, idle=False)
    weights = {id(module.weight): module.weight for module in embeddings if module.weight.requires_grad}
    if weights:
        values = sum(weight.numel() for weight in weights.values())
        say(
            f"embeddings have 32-bit state, as in the Trainer with bitsandbytes: {len(weights)} of them, "
            f"some {size_text(3 * values)} more for each state than in 8 bits. To have 8 bits there too, call "
            "optim8.override(embedding, optim_bits=8) when the Trainer has made its optimizer."
        )


def _patch(module: Any) -> None:
    trainer = module.Trainer
    original = trainer.get_optimizer_cls_and_kwargs
    if original.__module__ == __name__:
        return  # a second call of install

    @functools.wraps(original)
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        name = str(getattr(args.optim, "value", args.optim))
        cls = optimizer_class(name)
        if cls is None:
            return original(args, model)  # type: ignore[no-any-return]
        kwargs = optimizer_arguments(cls, args)
        if model is not None and "8bit" in name and "torch" not in name:  # torchao's optimizer has no such rule
            keep_embeddings_in_32_bits(model)
        say(f"optim={name!r} is optim8.optim.{cls.__name__}.")
        return cls, kwargs

    get_optimizer_cls_and_kwargs.__module__ = __name__
    trainer.get_optimizer_cls_and_kwargs = staticmethod(get_optimizer_cls_and_kwargs)
