"""What is trained: each task has a model, batches that depend on the seed alone, and a loss on data never trained on.

All data are drawn from fixed random processes, so that there is no end of them and nothing is learned by heart. What
is `rare` is the half of the tokens, or of the clusters of inputs, that are drawn least often.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from lm.train import learning_rate
from torch import Tensor, nn
from torch.nn import functional

from rarity.models import BALANCE, Experts, WordModel

Losses = tuple[float, float]  # of all, and of what is rare


@dataclass(frozen=True)
class Sizes:
    """How much is trained; `batch` is the number of sequences or, 48 times as many, of inputs to the experts."""

    steps: int
    batch: int = 8
    context: int = 32
    vocabulary: int = 1024
    width: int = 64
    experts: int = 64
    hidden: int = 16
    classes: int = 8
    checked: int = 256  # sequences, or 32 times as many inputs, that the loss is measured on


def zipf(count: int) -> Tensor:
    """Frequencies of Zipf's law, float32 [count], the most frequent first."""
    weights = 1 / torch.arange(1, count + 1)
    return weights / weights.sum()


class Words:
    """Sequences of tokens of Zipf's frequencies, each drawn given the kinds of the two before it."""

    KINDS = 8
    STRENGTH = 2.0  # deviation of the logarithm by which each of the two kinds changes the odds of a token

    def __init__(self, vocabulary: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(vocabulary, generator=generator)
        frequencies = zipf(vocabulary)[order]
        self.kinds = torch.randint(self.KINDS, (vocabulary,), generator=generator)
        last, before = self.STRENGTH * torch.randn(2, self.KINDS, vocabulary, generator=generator)
        odds = (last[:, None] + before[None]).flatten(0, 1)
        kind_of = functional.one_hot(self.kinds, self.KINDS).float()
        shares, base = torch.full((self.KINDS**2,), self.KINDS**-2.0), frequencies.log()
        for _ in range(50):  # until the tokens have their frequencies, where pairs of kinds have their shares
            probabilities = (odds + base).softmax(dim=1)
            base += frequencies.log() - (shares @ probabilities).log()
            moved = (probabilities @ kind_of).view(self.KINDS, self.KINDS, self.KINDS)
            shares = torch.einsum("lb,lbn->nl", shares.view(self.KINDS, self.KINDS), moved).flatten()
        self.cumulative = probabilities.double().cumsum(dim=1)
        self.rare = order >= vocabulary // 2

    def batch(self, sequences: int, context: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 [sequences, context] each."""
        tokens = torch.randint(len(self.kinds), (sequences, 2), generator=generator)
        tokens = torch.cat((tokens, tokens.new_empty(sequences, context + 1)), dim=1)
        draws = torch.rand(sequences, context + 1, generator=generator, dtype=torch.float64)
        for at in range(context + 1):
            before, last = self.kinds[tokens[:, at : at + 2]].unbind(1)
            rows = self.cumulative[last * self.KINDS + before]
            found = torch.searchsorted(rows, draws[:, at, None] * rows[:, -1:], right=True)
            tokens[:, at + 2] = found[:, 0].clamp(max=len(self.kinds) - 1)
        return tokens[:, 2:-1], tokens[:, 3:]


class Clusters:
    """Inputs around centres of Zipf's frequencies; each centre has a linear rule of its own for the input's class."""

    NOISE = 0.5  # of the inputs, whose centres have a deviation of 1
    SHARPNESS = 4.0  # of the rule

    def __init__(self, sizes: Sizes, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.frequencies = zipf(sizes.experts)
        self.centres = torch.randn(sizes.experts, sizes.width, generator=generator)
        self.rules = torch.randn(sizes.experts, sizes.width, sizes.classes, generator=generator) / sizes.width**0.5

    def batch(self, inputs: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs [inputs, width], their classes and their clusters."""
        cluster = torch.multinomial(self.frequencies, inputs, replacement=True, generator=generator)
        noise = torch.randn(inputs, self.centres.shape[1], generator=generator)
        scores = self.SHARPNESS * (noise[:, None] @ self.rules[cluster])[:, 0]
        classes = torch.multinomial(scores.softmax(dim=1), 1, generator=generator)[:, 0]
        return self.centres[cluster] + self.NOISE * noise, classes, cluster


class LanguageTask:
    """Words are predicted. Where `shift`, from half of the steps on those of another process, as in fine-tuning.

    For the first half of that the lower half of the model is frozen; then it is thawed and trains on.
    """

    def __init__(self, sizes: Sizes, shift: bool) -> None:
        self.sizes, self.shift = sizes, shift
        self.processes = [Words(sizes.vocabulary, seed) for seed in (range(2) if shift else range(1))]

    def model(self) -> WordModel:
        return WordModel(self.sizes.vocabulary, self.sizes.width, self.sizes.context)

    def rate(self, peak: float, step: int) -> float:
        """The learning rate of a step, from 0; fine-tuning has a warm-up and a cosine of its own."""
        if not self.shift:
            return learning_rate(peak, step, self.sizes.steps, end=0.0)
        half = self.sizes.steps // 2
        return learning_rate(peak, step % half, half, end=0.0)

    def prepare(self, model: nn.Module, step: int) -> None:
        """Freezes and thaws before a step."""
        assert isinstance(model, WordModel)
        half = self.sizes.steps // 2
        if self.shift and step in (half, half + half // 2):
            for parameter in model.lower_half():
                parameter.requires_grad_(step != half)

    def loss(self, model: nn.Module, step: int, generator: torch.Generator) -> Tensor:
        assert isinstance(model, WordModel)
        later = self.shift and step >= self.sizes.steps // 2
        tokens, targets = self.processes[int(later)].batch(self.sizes.batch, self.sizes.context, generator)
        return model.losses(tokens, targets).mean()

    @torch.no_grad()
    def check(self, model: nn.Module) -> Losses:
        assert isinstance(model, WordModel)
        process = self.processes[-1]
        tokens, targets = process.batch(self.sizes.checked, self.sizes.context, torch.Generator().manual_seed(-1))
        parts = zip(*(torch.split(each, self.sizes.batch) for each in (tokens, targets)))
        losses = torch.cat([model.losses(*part) for part in parts])
        return losses.mean().item(), losses[process.rare[targets.flatten()]].mean().item()


class ExpertTask:
    """Inputs are classified by a mixture of experts; some clusters of inputs, and so some experts, are rare."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes, self.process = sizes, Clusters(sizes, seed=0)

    def model(self) -> Experts:
        sizes = self.sizes
        return Experts(sizes.experts, sizes.width, sizes.hidden, sizes.classes)

    def rate(self, peak: float, step: int) -> float:
        return learning_rate(peak, step, self.sizes.steps, end=0.0)

    def prepare(self, model: nn.Module, step: int) -> None:
        """Nothing is frozen here."""

    def loss(self, model: nn.Module, step: int, generator: torch.Generator) -> Tensor:
        x, classes, _ = self.process.batch(48 * self.sizes.batch, generator)
        logits, balance = model(x)
        loss: Tensor = functional.cross_entropy(logits, classes) + BALANCE * balance
        return loss

    @torch.no_grad()
    def check(self, model: nn.Module) -> Losses:
        x, classes, cluster = self.process.batch(32 * self.sizes.checked, torch.Generator().manual_seed(-1))
        losses = functional.cross_entropy(model(x)[0], classes, reduction="none")
        return losses.mean().item(), losses[cluster >= self.sizes.experts // 2].mean().item()


Task = LanguageTask | ExpertTask
TASKS: dict[str, Callable[[Sizes], Task]] = {
    "embeddings": lambda sizes: LanguageTask(sizes, shift=False),
    "experts": ExpertTask,
    "part": lambda sizes: LanguageTask(sizes, shift=True),
}
