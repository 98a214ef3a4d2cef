"""The dynamic 8-bit code: its table, and the way from values to codes and back. Optimizer state and `functional` share
it, so that both give the same bits."""

from __future__ import annotations

import torch

from optim8 import _native

# Values of one absmax in optimizer state: csrc/core/codec.h defines it. 256 serves a tree without a compiled module.
BLOCK: int = getattr(_native.cpu_or_none(), "step_block", 256)
_PART = 2**12 * BLOCK  # values that _use_last_value looks at in one go
_CPU = torch.device("cpu")
_tables: dict[tuple[bool, torch.device], torch.Tensor] = {}


def code_table(signed: bool, device: torch.device) -> torch.Tensor:
    """The value of each code, float32 [256], sorted; made once for each device.

    Nobody may write to it: whoever hands it to a user clones it.
    """
    table = _tables.get((signed, device))
    if table is None:
        with torch.inference_mode(False):  # a table that is made in inference mode would serve nowhere else
            if device == _CPU:
                table = torch.tensor(_native.cpu().dynamic_map(signed), dtype=torch.float32, device=_CPU)
            else:
                table = code_table(signed, _CPU).to(device)
        if type(table) is torch.Tensor:  # not one of a mode that fakes or traces
            _tables[signed, device] = table
    return table


def blocks(size: int, blocksize: int = BLOCK) -> int:
    """The number of blocks of `size` values."""
    return -(-size // blocksize)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a dense tensor in memory order, as a view of one dimension."""
    return tensor.as_strided((tensor.numel(),), (1,))


def square_root(values: torch.Tensor) -> torch.Tensor:
    """The square roots of float32 values, rounded correctly, as a step has them. torch.sqrt on a CPU may be an ulp off:
    where it goes through MKL (2.13 of PyTorch on an AMD Zen 5) about every sixth value is."""
    roots = values.clone()
    for part in torch.split(flat(roots), _PART):
        part.copy_(part.double().sqrt_())
    return roots


def encode(
    who: str,
    values: torch.Tensor,
    table: torch.Tensor,
    blocksize: int,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    keep_positive: bool = False,
) -> None:
    """Fill codes and absmax of contiguous values. Sizes, dtypes and devices are the caller's to check.

    Args:
        who: the caller's name, for messages.
        values: float32, bfloat16 or float16.
        table: float32 [256], sorted.
        blocksize: values of one absmax.
        codes: uint8, of as many elements as values.
        absmax: float32, one for each block.
        keep_positive: a positive value never becomes 0.
    """
    module = _native.module_for(values.device, who)
    module.quantize_blockwise(values, table, blocksize, codes, absmax, _native.threads(), keep_positive=keep_positive)


def decode(
    who: str, codes: torch.Tensor, absmax: torch.Tensor, table: torch.Tensor, blocksize: int, values: torch.Tensor
) -> None:
    """Fill contiguous values from codes and absmax; the arguments are those of `encode`."""
    module = _native.module_for(codes.device, who)
    module.dequantize_blockwise(codes, absmax, table, blocksize, values, _native.threads())


def dequantize(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    *,
    signed: bool,
    table: torch.Tensor | None = None,
    blocksize: int = BLOCK,
) -> torch.Tensor:
    """State in float32, of the shape and strides of its codes; the table is the dynamic code unless given."""
    out = torch.empty_strided(tuple(codes.shape), codes.stride(), dtype=torch.float32, device=codes.device)
    table = code_table(signed, codes.device) if table is None else table.to(codes.device).contiguous()
    decode("optim8", flat(codes), absmax, table, blocksize, flat(out))
    return out


def quantize(
    values: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, *, signed: bool, as_step: bool = False
) -> None:
    """Fill codes and absmax of state from float32 values of the same shape and strides, with the nearest codes. A
    positive value of an unsigned state never becomes 0.

    The largest magnitude of a block keeps its value, and quantizing what was dequantized changes nothing: it gets the
    code of 1, or that of the last value before, as after a step with dithered rounding, where the block shows that it
    comes from there or where it is negative.
    `as_step`: quantize as a step with rounding="nearest" does. That loses 0.7 % of a largest magnitude that is
    negative: there is no code for -1.
    """
    table = code_table(signed, values.device)
    values, codes = flat(values), flat(codes)
    encode("optim8", values, table, BLOCK, codes, absmax, keep_positive=not signed)
    if as_step:
        return
    for at in range(0, values.numel(), _PART):
        part = slice(at, at + _PART)
        _use_last_value(table, values[part], codes[part], absmax[at // BLOCK : (at + _PART) // BLOCK], signed)


def _use_last_value(
    table: torch.Tensor, values: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, signed: bool
) -> None:
    """Quantize those blocks anew whose largest magnitude is to have the last code before 1, or the lowest."""
    missing = -values.numel() % BLOCK
    rows, old = (torch.nn.functional.pad(each, (0, missing)).view(-1, BLOCK) for each in (values, codes))
    # Each block gets one more value, the largest, which sets its scale.
    scales = absmax / table[254]
    longer = torch.cat((rows, scales[:, None]), dim=1)
    new, new_absmax = torch.empty_like(longer, dtype=torch.uint8), torch.empty_like(scales)
    encode("optim8", longer.view(-1), table, BLOCK + 1, new.view(-1), new_absmax, keep_positive=not signed)
    new = new[:, :BLOCK]
    size = rows.isfinite() * torch.ones_like(rows)
    size.view(-1)[values.numel() :] = 0

    def error(codes: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
        return ((table[codes.int()] * absmax[:, None] - rows.nan_to_num(0, 0, 0)).abs() * size).sum(dim=1)

    # Half: by far, since either form may have been rounded to bfloat16 on the way.
    chosen = error(new, new_absmax) < 0.5 * error(old, absmax)
    if signed:
        chosen |= (rows == -absmax[:, None]).any(dim=1)
    chosen &= (absmax > 0) & new_absmax.isfinite()
    codes.copy_(torch.where(chosen[:, None], new, old).view(-1)[: codes.numel()])
    absmax.copy_(torch.where(chosen, new_absmax, absmax))


def quantize16(
    values: torch.Tensor, codes: torch.Tensor, low: torch.Tensor, absmax: torch.Tensor, *, signed: bool
) -> None:
    """Fill codes, low bytes and absmax of state in 16 bits from float32 values of the same shape and strides, with the
    nearest positions (csrc/core/code16.h). A positive value of an unsigned state never becomes 0."""
    host = [tensor.to(_CPU) for tensor in (flat(values).nan_to_num(0, 0, 0), flat(codes), flat(low), absmax)]
    numbers = torch.zeros(absmax.numel(), dtype=torch.int32)  # u does not depend on them here
    _native.cpu().keep_state(*host, signed, numbers, 1.0, 0, False)
    for goal, made in zip((flat(codes), flat(low), absmax), host[1:], strict=True):
        if made.data_ptr() != goal.data_ptr():
            goal.copy_(made)


def dequantize16(codes: torch.Tensor, low: torch.Tensor, absmax: torch.Tensor, *, signed: bool) -> torch.Tensor:
    """State in 16 bits in float32, of the shape and strides of its codes."""
    out = torch.empty_strided(tuple(codes.shape), codes.stride(), dtype=torch.float32)
    host = [tensor.to(_CPU) for tensor in (flat(codes), flat(low), absmax)]
    _native.cpu().restore_state(*host, signed, flat(out))
    return out.to(codes.device)


def quantize_dithered(
    values: torch.Tensor, blocks: torch.Tensor, *, signed: bool, step: int, place: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and absmax as a step with dithered rounding stores them in 8 bits.

    Args:
        values: float32 of one dimension, finite, in whole blocks but for the last.
        blocks: int64, the numbers of these blocks in their parameter.
        signed: whether the state's code has negative values.
        step: the number of the step, from 1.
        place: of the state in its rule.

    Returns:
        uint8 codes and float32 absmax by block, on the device of the values.
    """
    codes, absmax = torch.empty(values.numel(), dtype=torch.uint8), torch.empty(blocks.numel(), dtype=torch.float32)
    host, numbers = values.to(_CPU).contiguous(), blocks.to(_CPU, torch.int32)
    _native.cpu().keep_state(host, codes, None, absmax, signed, numbers, float(step), place, True)
    return codes.to(values.device), absmax.to(values.device)
