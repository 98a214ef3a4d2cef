"""The docstring of an optimizer: what all have in common stands here once."""

from __future__ import annotations

_BEGIN = "params: parameters, named parameters or groups, as for torch.optim. float32, bfloat16 or float16."
_COMMON = """\
maximize: ascend instead of descend.
foreach, fused: accepted; every step is one fused call over all tensors, whatever they say. Under GradScaler,
    fused=True lets the step take the scale itself, as in torch.optim.
capturable: for CUDA parameters only.
differentiable: must be False.
min_8bit_size: tensors of fewer values keep 32-bit state, whatever `optim_bits` says.
optim_bits: 8; 16, for state of a block that spreads or changes more than 8 bits can follow; or 32 for float32.
rounding: of state in 8 and 16 bits: "dithered" keeps changes of less than half a code in the mean, and so follows
    32-bit state; "nearest", for comparison, is what other libraries do, and loses them (docs/numerics.md).
master_bits: of bfloat16 and float16 weights. 16: the parameter is all there is, and loses what is less than half its
    last bit. 24, 32: the state `param_low` has 8 or 16 bits more, and a step reads and writes both, so that small
    steps add up; with 32 they do as in float32 (docs/bfloat16.md).
param_rounding: of 16-bit weights: "nearest", or "dithered", which is right in the mean and takes no memory. Weights of
    24 bits are dithered always, those of 32 are not rounded.
paged: True keeps state in a memory-mapped file; an optim8.paging.Pager says where it lives, under which budget.
**kwargs: what bitsandbytes' optimizers also take: `args`, `is_paged`; `percentile_clipping`, `block_wise`,
    `max_unorm` and `skip_zeros` with the values that change nothing."""
_END = """\
    Raises:
        ValueError: an argument cannot be honoured.
        TypeError: an argument is unknown, or no number where one is needed.
"""


def docstring(summary: str, arguments: str, states: str) -> str:
    """The docstring of an optimizer.

    Args:
        summary: what it is, and the source.
        arguments: those of its own, a line each, as in an Args section.
        states: the names of its states, in words.
    """
    lines = [_BEGIN, *arguments.strip().splitlines(), *_COMMON.splitlines()]
    return "\n".join(
        [
            summary,
            "",
            "    Args:",
            *(f"        {line.rstrip()}" for line in lines),
            "",
            "    Each but `paged` can be set by parameter group. State: `step`, and for each of",
            f"    {states} uint8 codes with one float32 `_absmax` for each 256 values (in 16 bits low bytes too), or",
            "    float32.",
            "",
            _END,
        ]
    )
