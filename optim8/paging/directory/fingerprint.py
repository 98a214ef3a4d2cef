"""A short text that tells the values of a parameter from those of another step, without reading all of them."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import torch

SAMPLE = 4096  # elements


def of(tensor: torch.Tensor) -> str | None:
    """The dtype and a checksum (CRC-32) of a tensor's values, whatever its strides: of all of up to SAMPLE elements, of
    as many of a longer one, evenly spaced from the first to the last. None where the values are not at hand: on another
    device than the CPU, or without memory.
    """
    tensor = tensor.detach()
    size = tensor.numel()
    if tensor.device.type != "cpu" or (size > 0 and tensor.untyped_storage().nbytes() == 0):
        return None
    if size > SAMPLE:
        places = torch.arange(SAMPLE, dtype=torch.int64, device="cpu") * (size - 1) // (SAMPLE - 1)
        tensor = tensor[torch.unravel_index(places, tensor.shape)]
    # Contiguous tensors of 0 or 1 element may have any stride; a clone has 1.
    values = tensor.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return f"{str(tensor.dtype).removeprefix('torch.')} {zlib.crc32(values.numpy().tobytes()):08x}"


def dtype_in(fingerprint: str) -> str:
    """The dtype that a fingerprint tells of."""
    return fingerprint.partition(" ")[0]


def of_all(params: Sequence[tuple[torch.Tensor, bool]]) -> dict[int, str]:
    """The fingerprints of parameters (values, whether they count) whose values are at hand, by position."""
    texts = {place: of(param) for place, (param, counts) in enumerate(params) if counts}
    return {place: text for place, text in texts.items() if text is not None}


def match(fingerprints: Mapping[int, str], params: Sequence[torch.Tensor]) -> bool:
    """Whether there is a parameter to compare, and all that there are have these fingerprints."""
    now = {place: of(params[place]) for place in fingerprints if place < len(params)}
    compared = [text == fingerprints[place] for place, text in now.items() if text is not None]
    return bool(compared) and all(compared)
