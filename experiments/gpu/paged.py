"""Paged steps on a GPU: the link to pinned host memory, steps with state on both sides of it, the same with copies in
place of kernels that use the memory of the host, and a training whose float32 Adam state does not fit the memory it is
given. Prints what it finds as `ROW` and JSON, row by row.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import optim8
from gpu.measure import give, median_ms
from optim8.paging import Pager

TENSORS = 64
BUCKETS = 16  # of copied state
SLOTS = 2  # of device memory for it: while one is stepped, the other one is filled
STEPS = 10  # of the training


def measure_link(size: int, quick: bool) -> float:
    """Bytes a second over the link, to the device, from it, and both ways at once; gives the last."""
    hosts = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    devices = [torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2)]
    other = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def to_device() -> None:
        devices[0].copy_(hosts[0], non_blocking=True)

    def from_device() -> None:
        hosts[1].copy_(devices[1], non_blocking=True)

    def both() -> None:
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            from_device()
        to_device()
        torch.cuda.current_stream().wait_stream(other)

    ways: list[tuple[str, Callable[[], None], int]] = [
        ("link, to the device", to_device, size),
        ("link, from the device", from_device, size),
        ("link, both ways at once", both, 2 * size),
    ]
    rate = 0.0
    for name, copy, moved in ways:
        milliseconds = median_ms([copy], quick)
        rate = moved / (1e-3 * milliseconds)
        give({"subject": name, "ms": milliseconds, "link_bytes_per_second": rate})
    return rate


def measure_paged_steps(numel: int, link: float, quick: bool) -> None:
    """AdamW8bit with its state beside the parameters, half of it in pinned host memory, and all of it there."""
    for dtype in (torch.float32, torch.bfloat16):
        params = [Parameter(torch.randn(numel // TENSORS, device="cuda", dtype=dtype)) for _ in range(TENSORS)]
        for p in params:
            p.grad = torch.randn_like(p) * 1e-2
        plain = optim8.AdamW8bit(params)
        plain.step()
        state = sum(value.nbytes for entry in plain.state.values() for value in entry.values())
        give(
            {
                "subject": f"resident, without a pager, {str(dtype)[6:]}",
                "ms": median_ms([plain.step], quick),
                "state_bytes": state,
            }
        )
        del plain
        for share in (0.0, 0.5, 1.0):
            row: dict[str, Any] = {"subject": f"{share:.0%} paged, {str(dtype)[6:]}", "state_bytes": state}
            try:
                pager = Pager(device_budget=round((1 - share) * state) + 4096)
                optimizer = optim8.AdamW8bit(params, paged=pager)
                optimizer.step()
                tiers = optimizer.placement().bytes_by_tier()
                row.update(bytes_by_tier=tiers, ms=median_ms([optimizer.step], quick))
                if "host" in tiers:  # read and written
                    row["of_link"] = 2 * tiers["host"] / (1e-3 * row["ms"]) / link
                del optimizer
            except Exception as error:  # the others say something without it
                row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
            give(row)
            gc.collect()
            torch.cuda.empty_cache()


class Copied:
    """What the other way to page would cost: state is copied to the device bucket by bucket, on a stream of its own,
    stepped there and copied back on a third stream. To measure, not to use: each bucket is an optimizer's state, which
    stays on the device, and buckets wait for each other as if there were memory for two."""

    def __init__(self, params: list[Parameter]) -> None:
        size = len(params) // BUCKETS
        self.buckets = [optim8.AdamW8bit(params[at : at + size]) for at in range(0, len(params), size)]
        self.there: list[list[Tensor]] = []
        for optimizer in self.buckets:
            optimizer.step()
            values = [value for entry in optimizer.state.values() for value in entry.values()]
            self.there.append([value for value in values if value.numel() > 1])  # not the counts of steps
        self.here = [[torch.empty(v.shape, dtype=v.dtype, pin_memory=True) for v in part] for part in self.there]
        for part, on_device in zip(self.here, self.there, strict=True):
            self._copy(part, on_device)
        self.in_stream, self.out_stream = torch.cuda.Stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.events = [[torch.cuda.Event() for _ in range(3)] for _ in self.buckets]  # type: ignore[no-untyped-call]

    @staticmethod
    def _copy(to: list[Tensor], of: list[Tensor]) -> None:
        for goal, source in zip(to, of, strict=True):
            goal.copy_(source, non_blocking=True)

    def step(self) -> None:
        current = torch.cuda.current_stream()
        self.in_stream.wait_stream(current)
        for b, optimizer in enumerate(self.buckets):
            arrived, stepped, left = self.events[b]
            with torch.cuda.stream(self.in_stream):
                if b >= SLOTS:
                    self.in_stream.wait_event(self.events[b - SLOTS][2])
                self._copy(self.there[b], self.here[b])
                arrived.record()
            current.wait_event(arrived)
            optimizer.step()
            stepped.record()
            with torch.cuda.stream(self.out_stream):
                self.out_stream.wait_event(stepped)
                self._copy(self.here[b], self.there[b])
                left.record()
        current.wait_stream(self.out_stream)


def measure_copied_steps(numel: int, link: float, quick: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        params = [Parameter(torch.randn(numel // TENSORS, device="cuda", dtype=dtype)) for _ in range(TENSORS)]
        for p in params:
            p.grad = torch.randn_like(p) * 1e-2
        copied = Copied(params)
        moved = 2 * sum(value.nbytes for part in copied.here for value in part)
        milliseconds = median_ms([copied.step], quick)
        torch.cuda.synchronize()
        pairs = [pair for parts in zip(copied.here, copied.there, strict=True) for pair in zip(*parts, strict=True)]
        give(
            {
                "subject": f"100% paged, through copies, {str(dtype)[6:]}",
                "ms": milliseconds,
                "of_link": moved / (1e-3 * milliseconds) / link,
                "state_came_back": all(torch.equal(here, there.cpu()) for here, there in pairs),
            }
        )
        del copied, params
        gc.collect()
        torch.cuda.empty_cache()


def _trained(make: Callable[[list[Parameter]], torch.optim.Optimizer], width: int, layers: int) -> list[float]:
    """The losses of a model that learns to give fixed random outputs."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(width, width, bias=False, device="cuda") for _ in range(layers)])
    inputs, outputs = (torch.randn(64, width, device="cuda") for _ in range(2))
    optimizer = make(list(model.parameters()))
    losses: list[Tensor] = []
    for _ in range(STEPS):
        loss = torch.nn.functional.mse_loss(model(inputs), outputs)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.detach())
    return [float(loss) for loss in losses]


def measure_training(width: int, layers: int) -> None:
    """The allocator of the device is given room for parameters, gradients and half of their float32 Adam state."""
    gc.collect()
    torch.cuda.empty_cache()
    parameters = 4 * layers * width * width
    room = 3 * parameters + (256 << 20)  # parameters, gradients, half the state; the rest for what a step takes beside
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.mem_get_info()[1])
    makes: dict[str, Callable[[list[Parameter]], torch.optim.Optimizer]] = {
        "torch AdamW": lambda params: torch.optim.AdamW(params, lr=1e-4, fused=True),
        "optim8 PagedAdamW8bit": lambda params: optim8.PagedAdamW8bit(params, lr=1e-4, paged=Pager(device_budget=0)),
    }
    for name, make in makes.items():
        row: dict[str, Any] = {"subject": f"training under {room >> 20} MiB, {name}", "room_bytes": room}
        torch.cuda.reset_peak_memory_stats()
        try:
            losses = _trained(make, width, layers)
            row.update(losses=losses, learns=losses[-1] < losses[0])
        except torch.OutOfMemoryError as error:
            row["error"] = f"does not fit: {str(error)[:120]}"
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
        give(row)
        gc.collect()
        torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="in small: shows that it runs, its figures say nothing")
    quick = parser.parse_args().quick
    link = measure_link(1 << 20 if quick else 1 << 30, quick)
    for measure in (measure_paged_steps, measure_copied_steps):
        measure(1 << 20 if quick else 1 << 28, link, quick)
    measure_training(*((64, 2) if quick else (4096, 16)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
