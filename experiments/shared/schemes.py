"""Ways to keep Adam's moments in 8 bits, to be compared: a code, and how many values share an absmax."""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCKSIZES = (64, 128, 256, 512, 1024, 2048, 4096)
CODES = ("linear", "quantile", "dynamic")
OURS = "optim8 AdamW8bit"  # dynamic, blocks of 256, dithered; of the second moment the root

Moments = dict[str, Tensor]


def _fixed_code(name: str, signed: bool) -> Tensor:
    from optim8 import functional

    return functional.create_linear_map(signed) if name == "linear" else functional.create_dynamic_map(signed)


def quantile_code(x: Tensor, blocksize: int | None) -> Tensor:
    """The code whose values are equally often the nearest: midpoints of 257 quantiles of the normalized `x`.

    Estimated from the tensor itself, as nothing that is known before can be; blocks share the code of their tensor.
    """
    rows = _rows(x, blocksize)
    scales = rows.abs().amax(1, keepdim=True)
    normalized = torch.where(scales > 0, rows / scales, rows).flatten()[: x.numel()].sort().values
    at = torch.linspace(0, 1, 257, dtype=torch.float64) * (x.numel() - 1)
    quantiles = normalized[at.round().long()]
    return (quantiles[1:] + quantiles[:-1]) / 2


def _rows(x: Tensor, blocksize: int | None) -> Tensor:
    """The values of `x`, a row for each block, the last one filled up with zeros."""
    if blocksize is None:
        return x.reshape(1, -1)
    return torch.nn.functional.pad(x.flatten(), (0, -x.numel() % blocksize)).view(-1, blocksize)


def round_trip(x: Tensor, code: Tensor, blocksize: int | None) -> Tensor:
    """Quantizes `x`, float32, with this code and decodes it; without a block size the whole tensor has one absmax."""
    from optim8 import functional

    if blocksize is not None:
        return functional.dequantize_blockwise(*functional.quantize_blockwise(x, code=code, blocksize=blocksize))
    # Blocks of 63 values and the tensor's largest magnitude: then every block has the tensor's absmax.
    rows = _rows(x, 63)
    rows = torch.cat([rows, x.abs().max().expand(len(rows), 1)], dim=1)
    back = functional.dequantize_blockwise(*functional.quantize_blockwise(rows, code=code, blocksize=64))
    return back[:, :-1].flatten()[: x.numel()].view_as(x)


def round_trip_of_state(moments: Moments) -> Moments:
    """The moments after a step of optim8's optimizers has stored them: dithered, and the second as its root."""
    from optim8 import codec, rules

    found = {}
    for place, moment in enumerate(rules.every()["adamw"].moments):
        values = moments[moment.name]
        kept = (codec.square_root(values) if moment.root else values).reshape(-1)
        numbers = torch.arange(codec.blocks(kept.numel()))
        codes, absmax = codec.quantize_dithered(kept, numbers, signed=moment.signed, step=1, place=place)
        decoded = codec.dequantize(codes, absmax, signed=moment.signed).view_as(values)
        found[moment.name] = decoded.square() if moment.root else decoded
    return found


def schemes(moments: Moments) -> Iterator[tuple[str, int | None, Moments]]:
    """Code, block size (None: tensor-wise) and what becomes of the moments, for every scheme."""
    for name in CODES:
        for blocksize in (None, *BLOCKSIZES):
            found = {}
            for key, signed in (("exp_avg", True), ("exp_avg_sq", False)):
                x = moments[key]
                code = quantile_code(x, blocksize) if name == "quantile" else _fixed_code(name, signed)
                found[key] = round_trip(x, code, blocksize)
            yield name, blocksize, found
    yield OURS, 256, round_trip_of_state(moments)
