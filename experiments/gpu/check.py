"""CPU and CUDA on the same inputs, compared bit for bit: `python -m gpu.check COMPARISON`.

Prints what was found as `ROW` and JSON. The comparison `kernels` runs every kernel a few times, for compute-sanitizer.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from shared.subjects import optimizers
from torch import Tensor

import optim8
import optim8.functional as F
from optim8 import codec

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 255, 256, 257, 4095, 100003)
OPTIMIZERS = optimizers()
STEPS = 10


def hostile(size: int, dtype: torch.dtype, seed: int) -> Iterator[Tensor]:
    """Plain values, values over many decades, zeros, subnormal ones, and some that are not finite."""
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randn(size, generator=generator)
    yield plain.to(dtype)
    wide = plain * 10 ** (torch.rand(size, generator=generator) * 15 - 12)
    wide[torch.rand(size, generator=generator) < 0.1] = 0
    yield wide.to(dtype)
    yield torch.zeros(size, dtype=dtype)
    yield (plain * 1e-40).to(dtype)
    bad = plain.clone()
    bad[::97], bad[::89], bad[::83] = float("nan"), float("inf"), float("-inf")
    yield bad.to(dtype)


def same(actual: Tensor, expected: Tensor) -> bool:
    """Every bit; a NaN equals any NaN."""
    actual, expected = actual.detach().cpu().flatten(), expected.detach().cpu().flatten()  # bytes need a dimension
    if actual.is_floating_point():
        nan = torch.isnan(expected)
        if not torch.equal(torch.isnan(actual), nan):
            return False
        actual, expected = actual.masked_fill(nan, 0), expected.masked_fill(nan, 0)
    return torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))


class Comparison:
    def __init__(self) -> None:
        self.count = 0
        self.differing: list[str] = []

    def __call__(self, what: str, actual: Tensor, expected: Tensor) -> None:
        self.count += expected.numel()
        if not same(actual, expected):
            self.differing.append(what)


def compare_blockwise(compare: Comparison, x: Tensor, what: str) -> None:
    for blocksize in (64, 256, 4096):
        for signed in (True, False):
            code = F.create_dynamic_map(signed)
            codes, state = F.quantize_blockwise(x, code=code, blocksize=blocksize)
            on_gpu, gpu_state = F.quantize_blockwise(x.cuda(), code=code.cuda(), blocksize=blocksize)
            compare(f"quantize_blockwise {what} {blocksize}", on_gpu, codes)
            compare(f"quantize_blockwise absmax {what} {blocksize}", gpu_state.absmax, state.absmax)
            back = F.dequantize_blockwise(codes.cuda(), gpu_state)
            compare(f"dequantize_blockwise {what} {blocksize}", back, F.dequantize_blockwise(codes, state))


def compare_fourbit(compare: Comparison, x: Tensor, what: str) -> None:
    for quant_type in ("nf4", "fp4"):
        packed, state = F.quantize_4bit(x, blocksize=64, quant_type=quant_type)
        on_gpu, gpu_state = F.quantize_4bit(x.cuda(), blocksize=64, quant_type=quant_type)
        compare(f"quantize_4bit {quant_type} {what}", on_gpu, packed)
        compare(f"quantize_4bit absmax {quant_type} {what}", gpu_state.absmax, state.absmax)
        compare(f"dequantize_4bit {what}", F.dequantize_4bit(on_gpu, gpu_state), F.dequantize_4bit(packed, state))


def compare_matrices(compare: Comparison, quick: bool) -> None:
    for dtype in DTYPES:
        for columns in (100,) if quick else (128, 100, 1152):
            weight, vector = torch.randn(96, columns).to(dtype), torch.randn(1, columns).to(dtype)
            packed, state = F.quantize_4bit(weight, quant_type="nf4")
            gpu_packed, gpu_state = F.quantize_4bit(weight.cuda(), quant_type="nf4")
            expected = F.gemv_4bit(vector, packed.t(), state=state)
            compare(f"gemv_4bit {dtype}", F.gemv_4bit(vector.cuda(), gpu_packed.t(), state=gpu_state), expected)
            for threshold in (0.0, 2.0):
                results = F.int8_double_quant(weight, threshold=threshold)
                for mine, theirs in zip(F.int8_double_quant(weight.cuda(), threshold=threshold), results, strict=True):
                    if mine is not None and theirs is not None:
                        compare(f"int8_double_quant {dtype}", mine, theirs)
            codes, stats, _ = F.int8_vectorwise_quant(weight)
            sums = F.int8_linear_matmul(codes, codes)
            compare("int8_linear_matmul", F.int8_linear_matmul(codes.cuda(), codes.cuda()), sums)
            scaled = F.int8_mm_dequant(sums.cuda(), stats.cuda(), stats.cuda(), bias=stats.cuda())
            compare("int8_mm_dequant", scaled, F.int8_mm_dequant(sums, stats, stats, bias=stats))


def _optimizers(make: Any, dtype: torch.dtype, device: str, **options: Any) -> tuple[list[torch.nn.Parameter], Any]:
    generator = torch.Generator().manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype).to(device)) for size in SIZES]
    return params, make(params, lr=1e-2, weight_decay=0.03, min_8bit_size=256, **options)


def compare_steps(compare: Comparison, quick: bool) -> None:
    """STEPS steps with hostile gradients; on CUDA nothing may wait for the device after the first step."""
    for make in OPTIMIZERS:
        for dtype in DTYPES[:1] if quick else DTYPES:
            cpu, on_cpu = _optimizers(make, dtype, "cpu")
            gpu, on_gpu = _optimizers(make, dtype, "cuda")
            counted, on_counted = _optimizers(make, dtype, "cuda", capturable=True)
            for step in range(STEPS):
                for a, b, c in zip(cpu, gpu, counted, strict=True):
                    a.grad = list(hostile(a.numel(), dtype, step))[step % 5]
                    b.grad, c.grad = a.grad.cuda(), a.grad.cuda()
                torch.cuda.set_sync_debug_mode("error" if step else "default")
                try:
                    on_gpu.step()
                    on_counted.step()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                on_cpu.step()
            for a, b, c in zip(cpu, gpu, counted, strict=True):
                what = f"{make.__name__} {dtype} of {a.numel()} after {STEPS} steps"
                compare(what, b, a)
                compare(f"{what}, capturable", c, a)
                for name, value in on_cpu.state[a].items():
                    compare(f"{what} {name}", on_gpu.state[b][name], value)
                    compare(f"{what} {name}, capturable", on_counted.state[c][name], value)


def compare_large(compare: Comparison, quick: bool) -> None:
    """What takes several blocks a warp and several launches: a large tensor, an unaligned one, many small ones."""
    sizes = [(1 << 16 if quick else 1 << 24) + 12345, 100003, *[300] * (20 if quick else 700)]
    dtypes = DTYPES[:1] if quick else DTYPES[:2]

    def values(kind: int, seed: int, dtype: torch.dtype) -> list[Tensor]:
        found = [list(hostile(size + 1, dtype, seed + i))[kind] for i, size in enumerate(sizes)]
        return [x[1:] if i == 1 else x[:-1] for i, x in enumerate(found)]

    for make in OPTIMIZERS:
        for dtype in dtypes:
            start, gradients = values(1, 0, dtype), [values(kind, 1000 * kind, dtype) for kind in (1, 4)]
            made = []
            for device in ("cpu", "cuda"):
                params = [torch.nn.Parameter(_with_storage(x, device)) for x in start]
                optimizer = make(params, lr=1e-2, weight_decay=0.03, min_8bit_size=0)
                for of_step in gradients:
                    for p, g in zip(params, of_step, strict=True):
                        p.grad = _with_storage(g, device)
                    optimizer.step()
                made.append((params, optimizer))
            (on_cpu, cpu), (on_gpu, gpu) = made
            for a, b in zip(on_cpu, on_gpu, strict=True):
                what = f"large: {make.__name__} {dtype} of {a.numel()}"
                compare(what, b, a)
                for name, value in cpu.state[a].items():
                    compare(f"{what} {name}", gpu.state[b][name], value)


def _with_storage(x: Tensor, device: str) -> Tensor:
    """A copy of a flat tensor, as far from the beginning of its storage: an unaligned one stays unaligned."""
    skipped = x.storage_offset()
    copied = torch.empty(skipped + x.numel(), dtype=x.dtype, device=device)[skipped:]
    return copied.copy_(x)


def compare_huge(compare: Comparison, quick: bool) -> None:
    """More than 2^31 values; their ends beside the same values alone on the CPU."""
    size = (1 << 16 if quick else 1 << 31) + 257
    begin = (size // 4096 - 1) * 4096
    p = torch.nn.Parameter(torch.empty(size, dtype=torch.bfloat16, device="cuda").normal_())
    p.grad = torch.empty_like(p).normal_()
    end = torch.nn.Parameter(p.detach()[begin:].cpu().clone())
    end.grad = p.grad[begin:].cpu().clone()
    for blocksize in (256, 4096):
        codes, state = F.quantize_blockwise(p.detach(), blocksize=blocksize)
        of_end, end_state = F.quantize_blockwise(end.detach(), blocksize=blocksize)
        what = f"huge, {blocksize}"
        compare(f"quantize_blockwise {what}", codes[begin:], of_end)
        compare(f"quantize_blockwise absmax {what}", state.absmax[begin // blocksize :], end_state.absmax)
        back, of_codes = F.dequantize_blockwise(codes, state)[begin:], F.dequantize_blockwise(of_end, end_state)
        compare(f"dequantize_blockwise {what}", back, of_codes)
        del codes, state, back
    # Dithered rounding depends on where a value stands, and the CPU has the end alone.
    on_gpu, on_cpu = (optim8.AdamW8bit([q], lr=1e-2, weight_decay=0.03, rounding="nearest") for q in (p, end))
    on_gpu.step()
    on_cpu.step()
    compare("huge step", p[begin:], end)
    for name, value in on_cpu.state[end].items():
        first = 0 if name == "step" else begin // 256 if name.endswith("absmax") else begin
        compare(f"huge step {name}", on_gpu.state[p][name].flatten()[first:], value)


def compare_graph(compare: Comparison, quick: bool) -> None:
    """A captured step, replayed with a learning rate that changes, beside plain steps."""
    lr = torch.tensor(1e-2, device="cuda")
    params, captured = _optimizers(optim8.AdamW8bit, torch.float32, "cuda", capturable=True)
    others, plain = _optimizers(optim8.AdamW8bit, torch.float32, "cpu")
    captured.param_groups[0]["lr"] = lr
    for p, q in zip(params, others, strict=True):
        q.grad = torch.randn(q.numel())
        p.grad = q.grad.cuda()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        captured.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    rates = [1e-2, 3e-3, 5e-2]
    plain.param_groups[0]["lr"] = float(torch.tensor(1e-2))
    plain.step()
    for rate in rates:
        lr.fill_(rate)
        graph.replay()
        plain.param_groups[0]["lr"] = float(torch.tensor(rate))
        plain.step()
    for p, q in zip(params, others, strict=True):
        compare(f"graph, {q.numel()} values", p, q)


def compare_scaler(compare: Comparison, quick: bool) -> None:
    """Steps through GradScaler, of which one meets an infinite gradient and is left out."""
    made = []
    for device in ("cpu", "cuda"):
        params, optimizer = _optimizers(optim8.AdamW8bit, torch.float32, device)
        scaler = torch.amp.GradScaler(device, init_scale=1024.0, growth_interval=2)
        for step in range(4):
            for i, p in enumerate(params):
                grad = torch.randn(p.numel(), generator=torch.Generator().manual_seed(100 * step + i))
                if step == 2 and i == 1:
                    grad[3] = float("inf")
                p.grad = scaler.scale(grad.to(device))
            scaler.step(optimizer)
            scaler.update()
        made.append((params, optimizer, scaler.get_scale()))
    (on_cpu, cpu, scale), (on_gpu, gpu, gpu_scale) = made
    compare("scale", torch.tensor(gpu_scale), torch.tensor(scale))
    for a, b in zip(on_cpu, on_gpu, strict=True):
        compare(f"scaler, {a.numel()} values", b, a)
        for name, value in cpu.state[a].items():
            compare(f"scaler, {a.numel()} values, {name}", gpu.state[b][name], value)


def compare_streams(compare: Comparison, quick: bool) -> None:
    """Steps on streams in turn, each of which waits for the one before."""
    streams = [torch.cuda.Stream() for _ in range(2)]  # type: ignore[no-untyped-call]
    on_cpu, cpu = _optimizers(optim8.AdamW8bit, torch.float32, "cpu")
    on_gpu, gpu = _optimizers(optim8.AdamW8bit, torch.float32, "cuda")
    before = torch.cuda.current_stream()
    for step in range(4):
        for i, (a, b) in enumerate(zip(on_cpu, on_gpu, strict=True)):
            a.grad = torch.randn(a.numel(), generator=torch.Generator().manual_seed(100 * step + i))
            b.grad = a.grad.cuda()
        cpu.step()
        stream = streams[step % 2]
        stream.wait_stream(before)
        stream.wait_stream(torch.cuda.current_stream())  # on which gradients came
        with torch.cuda.stream(stream):
            gpu.step()
        before = stream
        torch.cuda.current_stream().wait_stream(stream)
    for a, b in zip(on_cpu, on_gpu, strict=True):
        compare(f"streams, {a.numel()} values", b, a)
        for name, value in cpu.state[a].items():
            compare(f"streams, {a.numel()} values, {name}", gpu.state[b][name], value)


def compare_quotients(compare: Comparison, quick: bool) -> None:
    """Every fifth float32 in [0, 1], as blocks whose absmax is 1, through both dynamic codes."""
    every = torch.arange(0, 0x3F800001, 5 << 12 if quick else 5, dtype=torch.int32)
    for signed in (True, False):
        code = F.create_dynamic_map(signed)
        for chunk in torch.split(every, 255 << 18):
            size = chunk.numel() // 255 * 255
            quotients = torch.ones(size // 255, 256)
            quotients[:, 1:] = chunk[:size].view(torch.float32).view(-1, 255)
            flat = quotients.flatten()
            codes, _ = F.quantize_blockwise(flat, code=code, blocksize=256)
            on_gpu, _ = F.quantize_blockwise(flat.cuda(), code=code.cuda(), blocksize=256)
            compare(f"quotients, signed={signed}", on_gpu, codes)


def _set_up(make: Any, p: torch.nn.Parameter, roots: Tensor, step: int) -> Any:
    """An Adam whose state of `p` is 2 for all gradients' means, the squares of `roots` for the means of their
    squares."""
    optimizer = make([p])
    p.grad = torch.zeros_like(p)
    optimizer.step()  # allocates the state
    state = optimizer.state[p]
    state["step"].fill_(step)
    if "exp_avg_absmax" in state:
        state["exp_avg_codes"].fill_(255)  # the code of 1
        state["exp_avg_sq_root_codes"].fill_(255)
        state["exp_avg_absmax"].fill_(2)
        state["exp_avg_sq_root_absmax"].copy_(roots)
    else:
        state["exp_avg"].fill_(2)
        state["exp_avg_sq"].copy_(roots.square())
    with torch.no_grad():
        p.zero_()
    return optimizer


def compare_roots(compare: Comparison, quick: bool) -> None:
    """Square root and reciprocal of the step's main path on CUDA beside the CPU's, over the squares of every float32 in
    [1, 4).

    With betas of 0.5, gradients of 0, eps 0, lr 1 and parameters of 0 a step leaves -1 / (sqrt(v) * c) in the
    parameter, v half of the square of the block's absmax: of both parities of the exponent.
    c is 1 after many steps; after one it is sqrt(1 / (1 - 0.5)), where other denominators tell roots apart.
    The CPU steps 32-bit state of the same values.
    """
    chunk, skip = (1 << 6, 1 << 10) if quick else (1 << 20, 1)
    every = torch.arange(0x3F800000, 0x40800000, skip, dtype=torch.int32).view(torch.float32)
    # To nearest: then absmax is the largest root itself.
    options: dict[str, Any] = {"lr": 1.0, "betas": (0.5, 0.5), "eps": 0.0, "weight_decay": 0.0, "rounding": "nearest"}
    for step in (1000, 0):
        for roots in torch.split(every, chunk):
            wide = torch.nn.Parameter(torch.zeros(roots.numel(), 256, device="cuda"))
            narrow = torch.nn.Parameter(torch.zeros(roots.numel()))
            in_8_bits = _set_up(lambda p: optim8.AdamW8bit(p, min_8bit_size=0, **options), wide, roots.cuda(), step)
            in_32_bits = _set_up(lambda p: optim8.AdamW8bit(p, optim_bits=32, **options), narrow, roots, step)
            in_8_bits.step()
            in_32_bits.step()
            what = f"roots after {step} steps, from {float(roots[0])}"
            compare(what, wide[:, 0], narrow)
            if not torch.equal(wide, wide[:, :1].expand_as(wide)):
                compare.differing.append(f"{what}: values of a block")
            expected = codec.square_root(in_32_bits.state[narrow]["exp_avg_sq"])
            compare(f"{what}, absmax", in_8_bits.state[wide]["exp_avg_sq_root_absmax"], expected)
            if not torch.all(in_8_bits.state[wide]["exp_avg_sq_root_codes"] == 255):
                compare.differing.append(f"{what}: codes")


def compare_functions(compare: Comparison, quick: bool) -> None:
    for dtype in DTYPES[:1] if quick else DTYPES:
        for size in SIZES[-2:-1] if quick else SIZES:
            for kind, x in enumerate(hostile(size, dtype, size)):
                what = f"{dtype} of {size}, kind {kind}"
                compare_blockwise(compare, x, what)
                compare_fourbit(compare, x, what)


def compare_kernels(compare: Comparison, quick: bool) -> None:
    """Every kernel, on little."""
    compare_matrices(compare, quick)
    compare_functions(compare, True)
    compare_steps(compare, quick)


COMPARISONS: dict[str, Callable[[Comparison, bool], None]] = {
    "steps": compare_steps,
    "graph": compare_graph,
    "scaler": compare_scaler,
    "streams": compare_streams,
    "large": compare_large,
    "huge": compare_huge,
    "functions": compare_functions,
    "matrices": compare_matrices,
    "roots": compare_roots,
    "quotients": compare_quotients,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", choices=[*COMPARISONS, "kernels"])
    parser.add_argument("--quick", action="store_true", help="on fewer values")
    arguments = parser.parse_args()
    compare = Comparison()
    try:
        {**COMPARISONS, "kernels": compare_kernels}[arguments.comparison](compare, arguments.quick)
    finally:
        print("ROW", json.dumps({"values": compare.count, "differing": compare.differing[:100]}), flush=True)
    return 1 if compare.differing else 0


if __name__ == "__main__":
    sys.exit(main())
