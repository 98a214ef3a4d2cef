"""The parameters of a model in two groups: hidden matrices for Muon, the others for AdamW."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

# The names of a module that maps to classes or tokens, in the libraries of models. One within a block that is repeated
# (whose path has a number before) is something else.
_HEADS = frozenset(
    ("lm_head", "head", "heads", "output", "output_layer", "out_head", "classifier", "score", "unembed", "embed_out")
)
_ADAMW = {"betas": (0.9, 0.999), "eps": 1e-8}


def muon_groups(
    model: nn.Module,
    *,
    hidden: Iterable[str] = (),
    apart: Iterable[str] = (),
    adamw: Mapping[str, Any] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Parameter groups for optim8.Muon8bit: the hidden matrices of a model, and all that AdamW is better for.

    It looks at layers, not at the number of dimensions: an embedding is a matrix too. Hidden matrices are the weights
    of torch.nn.Linear, of torch.nn.MultiheadAttention (`in_proj_weight` as one matrix, as torch.optim.Muon takes it)
    and of transformers' Conv1D, and parameters of three dimensions of a module whose `num_experts` is their first.

    The head is not among them: what `model.get_output_embeddings()` gives where there is such a method, a layer that
    shares its weight with an embedding, and the last torch.nn.Linear of a module named as heads are (lm_head, head,
    heads, output, output_layer, out_head, classifier, score, unembed, embed_out) outside of repeated blocks; where none
    of these is found, the last torch.nn.Linear of the model. Embeddings, the head, norms, biases, convolutions and the
    parameters of layers that are not known go to AdamW, which suits anything.

    The groups have the names of their parameters: read them to see what was found. To correct it, name parameters or
    modules in `hidden` or `apart`.

    Args:
        model: whose parameters, each once, come back, under the names of `model.named_parameters()`.
        hidden: names of parameters, or of modules with all their parameters of two or three dimensions, that are to be
            orthogonalized all the same, such as the last layer of an encoder that has no head.
        apart: names of those for AdamW. Where both fit, the longer name decides.
        adamw: options of AdamW's group, such as lr or weight_decay; betas are (0.9, 0.999) and eps 1e-8 unless told.
        **options: options of Muon's group, such as lr.

    Returns:
        The groups that are not empty: hidden matrices with use_muon=True, the others with use_muon=False, with named
        parameters.

    Raises:
        ValueError: a name of `hidden` or `apart` fits no parameter or stands in both, or one of `hidden` is no matrix.

    Examples:
        >>> import torch, optim8
        >>> model = torch.nn.Sequential(torch.nn.Embedding(90, 64), torch.nn.Linear(64, 64), torch.nn.Linear(64, 90))
        >>> groups = optim8.muon_groups(model, lr=0.02, adamw={"lr": 3e-4})
        >>> [[name for name, _ in group["params"]] for group in groups]
        [['1.weight'], ['0.weight', '1.bias', '2.weight', '2.bias']]
        >>> optimizer = optim8.Muon8bit(groups)
    """
    asked = _asked(model, list(hidden), list(apart))
    found = _hidden(model) - _of_heads(model)
    split: dict[bool, list[tuple[str, nn.Parameter]]] = {True: [], False: []}
    for name, param in model.named_parameters():
        split[asked.get(name, id(param) in found)].append((name, param))
    muon = {"params": split[True], "use_muon": True, **options}
    others = {"params": split[False], "use_muon": False, **_ADAMW, **(adamw or {})}
    return [group for group in (muon, others) if group["params"]]


def _asked(model: nn.Module, hidden: list[str], apart: list[str]) -> dict[str, bool]:
    """By the name of a parameter whether the caller wants it orthogonalized."""
    both = set(hidden) & set(apart)
    if both:
        raise ValueError(f"muon_groups: {min(both)!r} stands in hidden and in apart. Leave it out of one of them.")
    params = dict(model.named_parameters())
    asked: dict[str, bool] = {}
    for given in sorted((*hidden, *apart), key=len):
        names = [name for name in params if name == given or name.startswith(f"{given}.")]
        if not names:
            raise ValueError(
                f"muon_groups: {given!r} must be the name of a parameter or of a module with parameters, as "
                "model.named_parameters() gives them, got one that the model does not have."
            )
        if given in apart:
            asked.update(dict.fromkeys(names, False))
            continue
        matrices = [name for name in names if params[name].ndim in (2, 3)]
        if not matrices:
            shape = tuple(params[names[0]].shape)
            raise ValueError(
                f"muon_groups: {given!r} in hidden must be or have a matrix, or a stack of them, got {shape}. "
                "Leave it out: AdamW steps it."
            )
        asked.update(dict.fromkeys(matrices, True))
    return asked


def _hidden(model: nn.Module) -> set[int]:
    """The matrices of layers that map activations to activations, by id."""
    return {id(param) for module in model.modules() for param in _matrices(module) if param is not None}


def _matrices(module: nn.Module) -> Iterator[nn.Parameter | None]:
    own = module._parameters
    if isinstance(module, nn.MultiheadAttention):
        yield from (own.get(f"{part}proj_weight") for part in ("in_", "q_", "k_", "v_"))
    elif isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":  # transformers' has the weight of a Linear
        weight = own.get("weight")
        yield weight if weight is not None and weight.ndim == 2 else None
    elif not isinstance(module, nn.Embedding | nn.EmbeddingBag):
        count = getattr(module, "num_experts", None)
        yield from (param for param in own.values() if param is not None and param.ndim == 3 and param.size(0) == count)


def _of_heads(model: nn.Module) -> set[int]:
    """The weights of the layers that map to tokens or classes, and of embeddings, by id."""
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    embedded = {id(module.weight) for module in embeddings}
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    tell = getattr(model, "get_output_embeddings", None)  # of models of transformers
    told = tell() if callable(tell) else None
    heads = [] if told is None else [m for m in told.modules() if isinstance(m, nn.Linear)]
    heads += [module for module in linear.values() if id(module.weight) in embedded]
    named: dict[str, nn.Linear] = {}
    for name, module in linear.items():
        path = name.split(".")
        at = next((i for i, part in enumerate(path) if part in _HEADS or part.isdigit()), len(path))
        if at < len(path) and path[at] in _HEADS:
            named[".".join(path[: at + 1])] = module  # the last one of a head of several layers stays
    heads += named.values()
    return embedded | {id(module.weight) for module in heads or list(linear.values())[-1:]}
