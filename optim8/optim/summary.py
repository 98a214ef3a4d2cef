"""What an optimizer says of itself when it is printed."""

from __future__ import annotations

from collections import Counter
from typing import Any

from optim8.paging import Store
from optim8.state.mapped import tensors_of
from optim8.step import hypers, supply
from optim8.text import size_text


def summary(optimizer: Any) -> str:
    """Class and options of the groups as torch.optim writes them, without the parameters' names, then how many
    parameters have state in which precision, its bytes, and where it lives if it is paged. Changes nothing."""
    lines = [f"{type(optimizer).__name__} ("]
    counts: Counter[str] = Counter()
    tiers: Counter[str] = Counter()
    for number, group in enumerate(optimizer.param_groups):
        lines.append(f"Parameter Group {number}")
        lines += [f"    {key}: {group[key]}" for key in sorted(group) if key not in ("params", "param_names")]
        for param in group["params"]:
            entry: dict[str, Any] = optimizer.state.get(param) or {}
            tensors = tensors_of(entry)
            if tensors:
                tier, _ = optimizer.memory.place_of(max(tensors, key=lambda t: t.nbytes))
                tiers[tier] += sum(tensor.nbytes for tensor in tensors)
            kind = f"{supply.bits_now(optimizer, group, param)}bit" if tensors or param.requires_grad else "frozen"
            counts[kind] += 1
    said = {**{f"{bits}bit": f"in {bits} bits" for bits in hypers.BITS}, "frozen": "frozen"}
    parameters = ", ".join(f"{counts[kind]} {text}" for kind, text in said.items() if counts[kind])
    size = size_text(sum(tiers.values())) if tiers else "none yet"
    lines.append(f"State: {size}; parameters: {parameters or 'none'}")
    if isinstance(optimizer.memory, Store):
        places = ", ".join(f"{size_text(tiers[tier])} on {tier}" for tier in sorted(tiers)) or "nothing yet"
        lines.append(f"Paged: {places}; {optimizer.memory.pager!r}")
    return "\n".join([*lines, ")"])
