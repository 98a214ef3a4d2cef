"""Trains one model with one optimizer; deterministic, and resumable to the same bits."""

import dataclasses
import hashlib
import math
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from shared.common import atomic_path, spread
from shared.subjects import state_bytes, unique_bytes
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm  # type: ignore[import-untyped]

from lm import memory
from lm.data import Text, all_batches, random_batch
from lm.model import GPT, Shape
from lm.optimizers import MIN_8BIT_SIZE, RECIPES, make_optimizer

WARMUP_SHARE = 0.05
LAST_SHARE = 0.1  # the training loss that is reported is the mean over this part of the steps, the last
CLIP_NORM = 1.0
GRAPH_POINTS = 100
EVALUATIONS = 5


@dataclass(frozen=True)
class Settings:
    """Everything that the bits of a run depend on, besides versions and machine. A checkpoint holds and compares it."""

    optimizer: str
    steps: int
    batch: int
    layers: int
    heads: int
    width: int
    context: int
    dtype: str
    seed: int
    device: str
    threads: int
    text_sha256: str
    rate: float = 1.0  # times the learning rate of the optimizer's recipe
    end: float = 0.1  # the learning rate after the last step, as a share of the largest
    min_8bit_size: int = MIN_8BIT_SIZE
    later_text_sha256: str | None = None  # of the text of the second half of the steps, where that is another


@dataclass
class Progress:
    """What a run has done so far; goes into the checkpoint."""

    step: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    losses: list[float] = field(default_factory=list)
    validation: list[list[float]] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)


def checkpoint_path(out: Path, optimizer: str) -> Path:
    return out / f"{optimizer}.checkpoint.pt"


def learning_rate(peak: float, step: int, steps: int, end: float = 0.1) -> float:
    """Linear warm-up over the first steps, then half a cosine down to `end * peak`. `step` counts from 0."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return peak * ((1 + end) / 2 + (1 - end) / 2 * math.cos(math.pi * share))


class Run:
    """Model, optimizer, batches and progress of one optimizer's training. `train` goes on from wherever it stands.

    With `later` the second half of the steps trains on that text, and is judged by it; the optimizer goes on.
    """

    def __init__(self, settings: Settings, text: Text, out: Path, later: Text | None = None) -> None:
        _make_deterministic(settings)
        self.settings, self.text, self.later, self.out = settings, text, later or text, out
        self.device = torch.device(settings.device)
        self.memory_before = memory.current(self.device)
        shape = Shape(settings.layers, settings.heads, settings.width, settings.context)
        self.model = GPT(shape).to(self.device, getattr(torch, settings.dtype))
        self.optimizer = make_optimizer(settings.optimizer, self.model, settings.rate, settings.min_8bit_size)
        self.batches = torch.Generator().manual_seed(settings.seed)
        self.progress = Progress()

    @property
    def peak(self) -> float:
        """The largest learning rate."""
        return self.settings.rate * RECIPES[self.settings.optimizer].lr

    @property
    def current_text(self) -> Text:
        return self.text if self.progress.step < self.settings.steps // 2 else self.later

    def train(self, leave_bar: bool = True) -> dict[str, Any]:
        """Trains to the last step, saving a checkpoint half way; gives the figures of the run.

        `leave_bar`: the progress bar stays when the run is done.
        """
        settings, progress = self.settings, self.progress
        logs = self.out / "tensorboard" / settings.optimizer
        if progress.step == 0:
            shutil.rmtree(logs, ignore_errors=True)
        writer = SummaryWriter(str(logs), purge_step=progress.step)
        begin = time.perf_counter() - progress.seconds
        label = RECIPES[settings.optimizer].label
        bar = tqdm(
            total=settings.steps,
            initial=progress.step,
            desc=f"{label:16}",
            unit="step",
            mininterval=0.5,
            leave=leave_bar,
        )
        with writer, bar:
            while progress.step < settings.steps:
                self._evaluate_when_due(writer)
                loss = self._step()
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update()
                writer.add_scalar("loss/training", loss, progress.step)
                writer.add_scalar("milliseconds/step", 1e3 * progress.step_seconds[-1], progress.step)
                progress.seconds = time.perf_counter() - begin
                if progress.step == settings.steps // 2:
                    self.save()
            self._evaluate_when_due(writer)
        progress.seconds = time.perf_counter() - begin
        progress.peak_memory_bytes = max(progress.peak_memory_bytes, memory.peak(self.device))
        return self.figures()

    def _step(self) -> float:
        settings, progress = self.settings, self.progress
        lr = learning_rate(self.peak, progress.step, settings.steps, settings.end)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        inputs, targets = random_batch(self.current_text.training, settings.batch, settings.context, self.batches)
        loss: Tensor = self.model.loss(inputs.to(self.device), targets.to(self.device))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self._wait()
        start = time.perf_counter()
        self.optimizer.step()
        self._wait()
        progress.step_seconds.append(time.perf_counter() - start)
        self.optimizer.zero_grad()
        progress.losses.append(loss.item())
        progress.step += 1
        return progress.losses[-1]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _evaluate_when_due(self, writer: SummaryWriter) -> None:
        """Validation loss at equal distances, last at the end; never twice for one step."""
        step, steps = self.progress.step, self.settings.steps
        due = {round(steps * part / EVALUATIONS) for part in range(1, EVALUATIONS + 1)}
        if step in due and [point for point, _ in self.progress.validation[-1:]] != [step]:
            loss = self.evaluate()
            self.progress.validation.append([step, loss])
            writer.add_scalar("loss/validation", loss, step)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss in nats per byte over the whole validation part of the text that is trained on now."""
        total, count = 0.0, 0
        values = self.current_text.validation
        for inputs, targets in all_batches(values, self.settings.batch, self.settings.context):
            loss = self.model.loss(inputs.to(self.device), targets.to(self.device))
            total, count = total + loss.item() * targets.numel(), count + targets.numel()
        return total / count

    def save(self) -> None:
        """Writes the checkpoint: everything that `load` needs to go on as if nothing had happened."""
        self.progress.peak_memory_bytes = max(self.progress.peak_memory_bytes, memory.peak(self.device))
        content = {
            "settings": dataclasses.asdict(self.settings),
            "progress": dataclasses.asdict(self.progress),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "batches": self.batches.get_state(),
        }
        with atomic_path(checkpoint_path(self.out, self.settings.optimizer)) as temporary:
            torch.save(content, temporary)

    def load(self, path: Path) -> None:
        """Continues from the checkpoint at `path`; ValueError where it was made with other settings."""
        content = torch.load(path, map_location=self.device, weights_only=True)
        require_same_settings(path, content["settings"], self.settings)
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.batches.set_state(content["batches"].cpu())
        self.progress = Progress(**content["progress"])

    def figures(self) -> dict[str, Any]:
        progress = self.progress
        parameters = list(self.model.parameters())
        last = progress.losses[-max(1, round(LAST_SHARE * len(progress.losses))) :]
        every = max(1, len(progress.losses) // GRAPH_POINTS)
        chunks = [progress.losses[i : i + every] for i in range(0, len(progress.losses), every)]
        size = sum(p.numel() for p in parameters)
        state = state_bytes(self.optimizer)
        return {
            "label": RECIPES[self.settings.optimizer].label,
            "settings": dataclasses.asdict(self.settings),
            "learning_rate": self.peak,
            "weight_decay": RECIPES[self.settings.optimizer].weight_decay,
            "parameters": size,
            "training_loss": sum(last) / len(last),
            "validation_loss": progress.validation[-1][1],
            "parameter_bytes": unique_bytes(parameters),
            "state_bytes": state,
            "state_bytes_per_parameter": state / size,
            "step": spread(progress.step_seconds),
            "peak_memory_bytes": progress.peak_memory_bytes,
            "memory_before_bytes": self.memory_before,
            "seconds": progress.seconds,
            "parameters_sha256": _digest(parameters),
            "training_curve": [[i * every + len(c), sum(c) / len(c)] for i, c in enumerate(chunks)],
            "validation_curve": progress.validation,
        }


def require_same_settings(path: Path, found: dict[str, Any], wanted: Settings) -> None:
    """ValueError that names every difference between the settings that `path` was made with and the ones asked for."""
    changed = [
        f"{key}={found.get(key)!r} there and {value!r} here"
        for key, value in dataclasses.asdict(wanted).items()
        if found.get(key) != value
    ]
    if changed:
        raise ValueError(
            f"train_lm: {path.name} can only be continued with the settings it was made with, got "
            f"{', '.join(changed)}. Pass the same arguments, or leave --resume out to start again."
        )


def _digest(parameters: list[torch.nn.Parameter]) -> str:
    """SHA-256 over the bytes of all parameters: equal exactly where two runs ended with the same bits."""
    digest = hashlib.sha256()
    for parameter in parameters:
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _make_deterministic(settings: Settings) -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed workspace
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs time, finds bugs
    torch.set_num_threads(settings.threads)  # sums are split over threads, so their number is part of the result
    torch.manual_seed(settings.seed)
