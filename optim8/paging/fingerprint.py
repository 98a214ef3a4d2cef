"""A short text that tells the values of a parameter from those of another step, without reading all of them."""

from __future__ import annotations

import zlib

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
        places = torch.arange(SAMPLE, device="cpu") * (size - 1) // (SAMPLE - 1)
        tensor = tensor[torch.unravel_index(places, tensor.shape)]
    # Contiguous tensors of 0 or 1 element may have any stride; a clone has 1.
    values = tensor.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return f"{str(tensor.dtype).removeprefix('torch.')} {zlib.crc32(values.numpy().tobytes()):08x}"


def dtype_in(fingerprint: str) -> str:
    """The dtype that a fingerprint tells of."""
    return fingerprint.partition(" ")[0]
