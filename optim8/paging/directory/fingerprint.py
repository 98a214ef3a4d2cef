"""Fingerprints: short texts by which the values of a parameter differ from those of another step."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import torch

from optim8.paging.directory.journal import Journal
from optim8.paging.directory.records import Records

SAMPLE = 4096  # elements


def of(tensor: torch.Tensor) -> str | None:
    """The dtype and a checksum (CRC-32) of a tensor's values, whatever its strides. A tensor of more than SAMPLE
    elements is read at SAMPLE places, evenly spaced from the first to the last. None where the values cannot be read:
    on another device than the CPU, or without memory.
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
    """The dtype in a fingerprint."""
    return fingerprint.partition(" ")[0]


def of_all(params: Sequence[tuple[torch.Tensor, bool]]) -> dict[int, str]:
    """The fingerprints, by position, of parameters (values, whether they count) whose values can be read."""
    texts = {place: of(param) for place, (param, counts) in enumerate(params) if counts}
    return {place: text for place, text in texts.items() if text is not None}


def match(fingerprints: Mapping[int, str], params: Sequence[torch.Tensor]) -> bool:
    """Whether all parameters that can be compared have these fingerprints, and there is at least one."""
    now = {place: of(params[place]) for place in fingerprints if place < len(params)}
    compared = [text == fingerprints[place] for place, text in now.items() if text is not None]
    return bool(compared) and all(compared)


def of_last_step(records: Records, journal: Journal) -> dict[int, str]:
    """The fingerprints, by position, that a directory holds of the parameters that its last step left: all of
    params.json, or those of a few where nothing was flushed after the step; none where the state was loaded."""
    advice = "Restore it, or resume with Pager(..., changed_params=True): then no parameters are compared."
    content = records.read_json("params.json", {"steps": int, "params": dict}, advice)
    # After a power cut the file may be an older one than the journal knows.
    if content is None or not journal.has_params or content["steps"] != journal.steps:
        return journal.witness
    with records.parsing("params.json", advice):
        return {int(place): str(text) for place, text in content["params"].items()}
