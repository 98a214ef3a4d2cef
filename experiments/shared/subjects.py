"""Whose optimizer step is measured: torch, optim8 and the peers that are installed; and on which tensors."""

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

Make = Callable[..., torch.optim.Optimizer]  # from a list of parameters

REFERENCE = "torch AdamW fused"  # what every ratio is relative to
PEERS = ("bitsandbytes", "torchao")


@dataclass(frozen=True)
class Case:
    """A list of tensors: `shapes` of the parameters; `small` if all of them are under the usual 8-bit threshold."""

    name: str
    shapes: Sequence[tuple[int, ...]]
    small: bool = False

    @property
    def parameters(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes)


def cases(quick: bool) -> list[Case]:
    """One tensor of 64 Mi, a transformer of 64 Mi, 4096 tensors of 1024; `quick`: the same kinds, much smaller."""
    one, width, many = (2**18, 64, 64) if quick else (2**26, 1024, 4096)
    return [
        Case(f"one tensor of {_binary(one)}", [(one,)]),
        _transformer(width),
        Case(f"{many} tensors of 1024", [(1024,)] * many, small=True),
    ]


def _transformer(width: int) -> Case:
    """Shapes of a GPT of five layers; the vocabulary makes up what is missing to 64 * width^2."""
    matrices = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    vectors = [(3 * width,), (width,), (4 * width,), *[(width,)] * 5]  # biases, gains and biases of two norms
    block = [*matrices, *vectors]
    shapes: list[tuple[int, ...]] = block * 5
    whole = 64 * width * width
    vocabulary = (whole - sum(torch.Size(shape).numel() for shape in shapes)) // width
    shapes.insert(0, (vocabulary, width))
    return Case(f"transformer of {_binary(whole)}", shapes)


def _binary(count: int) -> str:
    return f"{count >> 20} Mi" if count >= 2**20 else f"{count / 2**10:.0f} Ki"


def make_parameters(case: Case, dtype: torch.dtype) -> list[Parameter]:
    """Parameters of the case with fixed random gradients, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    parameters = []
    for shape in case.shapes:
        parameter = Parameter(torch.randn(shape, generator=generator).to(dtype))
        parameter.grad = torch.randn(shape, generator=generator).to(dtype)
        parameters.append(parameter)
    return parameters


def optimizers() -> list[Make]:
    """optim8's 8-bit optimizers of any tensors; those that are paged by name left out, and those of matrices, whose
    steps are matrix products."""
    import optim8
    from optim8 import rules

    names = [name for name in optim8.__all__ if name.endswith("8bit") and not name.startswith("Paged")]
    of_matrices = {rule.family for rule in rules.every().values() if rule.gives_direction}
    return [cls for cls in (getattr(optim8, name) for name in names) if cls.rule not in of_matrices]


def optim8_subjects(small: bool) -> dict[str, Make]:
    """optim8's optimizers, and AdamW in 16 bits; for small tensors also with 8-bit state, which they would not have by
    default. One that would keep no state has a momentum."""
    subjects: dict[str, Make] = {f"optim8 {make.__name__}": _with_state(make) for make in optimizers()}
    subjects["optim8 AdamW8bit optim_bits=16"] = functools.partial(subjects["optim8 AdamW8bit"], optim_bits=16)
    if small:
        for name, make in list(subjects.items()):
            subjects[f"{name} min_8bit_size=0"] = functools.partial(make, min_8bit_size=0)
    return subjects


def _with_state(cls: Any) -> Make:
    from optim8 import rules

    rule = rules.rule(cls.rule)
    if rules.variant(rule.name, {hyper.name: hyper.default for hyper in rule.hypers}).moments:
        made: Make = cls
        return made
    return functools.partial(cls, momentum=0.9)


def torch_subjects() -> dict[str, Make]:
    return {
        REFERENCE: lambda parameters: torch.optim.AdamW(parameters, fused=True),
        "torch AdamW foreach": lambda parameters: torch.optim.AdamW(parameters, foreach=True),
    }


def namesakes() -> dict[str, str]:
    """The class of torch.optim with the same rule, by ours; without AdamW, which all are compared with anyway."""
    from optim8 import rules

    named = {made.__name__: rules.rule(made.rule).torch_name for made in optimizers()}  # type: ignore[attr-defined]
    return {ours: theirs for ours, theirs in named.items() if theirs not in (None, "AdamW")}


def namesake_subjects() -> dict[str, Make]:
    """Those classes in every form that torch has for a CPU: fused, over lists of tensors, and one after the other."""
    subjects: dict[str, Make] = {}
    for theirs in namesakes().values():
        cls = getattr(torch.optim, theirs)
        more = {"momentum": 0.9} if theirs == "SGD" else {}
        forms = {"foreach": {"foreach": True}, "one by one": {"foreach": False}}
        if "fused" in inspect.signature(cls).parameters:
            forms["fused"] = {"fused": True}
        for form, options in forms.items():
            subjects[f"torch {theirs} {form}"] = functools.partial(cls, **more, **options)
    return subjects


COPY = "torch AdamW fused, float32 copy"


def weight_subjects() -> dict[str, Make]:
    """Of 16-bit parameters: AdamW8bit with weights that are wider or dithered, and torch's over a float32 copy."""
    import optim8

    ways: dict[str, dict[str, Any]] = {
        "master_bits=24": {"master_bits": 24},
        "master_bits=32": {"master_bits": 32},
        "param_rounding=dithered": {"param_rounding": "dithered"},
    }
    ours: dict[str, Make] = {
        f"optim8 AdamW8bit {name}": functools.partial(optim8.AdamW8bit, **options) for name, options in ways.items()
    }
    return {**ours, COPY: _WithCopy}


class _WithCopy(torch.optim.Optimizer):
    """torch's fused AdamW over float32 copies, from which the parameters are rounded."""

    def __init__(self, params: list[Parameter]) -> None:
        super().__init__(params, {})
        self.params, self.copies = params, [Parameter(p.detach().float()) for p in params]
        self.inner = torch.optim.AdamW(self.copies, fused=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p, copy in zip(self.params, self.copies, strict=True):
            copy.grad = None if p.grad is None else p.grad.float()
        self.inner.step()
        for p, copy in zip(self.params, self.copies, strict=True):
            p.copy_(copy)
            self.state[p] = {**self.inner.state[copy], "copy": copy.detach()}


def peer_subjects() -> dict[str, Make]:
    """8-bit AdamW of the libraries of `pip install .[peers]` that are here and have a CPU path."""
    return {f"{library} AdamW8bit": peer(library) for library in PEERS if importlib.util.find_spec(library)}


def peer(library: str) -> Make:
    """The 8-bit AdamW of an installed peer, by the name of its package."""
    optimizer: Make = importlib.import_module(f"{library}.optim").AdamW8bit
    return optimizer


def missing_peers(asked: bool = True) -> dict[str, str]:
    """The peers that are not measured on a CPU, and why; all of them where nobody `asked` for peers."""
    reasons = {
        library: "not installed" if asked else "left out of this run"
        for library in PEERS
        if not (asked and importlib.util.find_spec(library))
    }
    return {**reasons, "flashoptim": "needs a GPU"}


def with_version(subject: str, versions: Mapping[str, str]) -> str:
    """A peer's name with its version: "torchao AdamW8bit" is "torchao 0.18.0 AdamW8bit"."""
    library, _, rest = subject.partition(" ")
    return f"{library} {versions[library]} {rest}".rstrip() if library in versions else subject


def peer_versions() -> dict[str, str]:
    return {library: importlib.metadata.version(library) for library in PEERS if importlib.util.find_spec(library)}


def unique_bytes(values: Iterable[object]) -> int:
    """Bytes of the tensors among `values`, each address counted once."""
    tensors = (tensor for value in values for tensor in _plain(value) if tensor.numel())
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of every tensor in the optimizer's state: moments, codes, scales, step counters."""
    return unique_bytes(value for state in optimizer.state.values() for value in state.values())


def least_traffic(parameters: Iterable[Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Bytes a step must move at least: parameters and state are read and written, gradients read."""
    total = 0
    for parameter in parameters:
        total += 2 * parameter.nbytes + (parameter.grad.nbytes if parameter.grad is not None else 0)
        state = optimizer.state[parameter].values()
        total += 2 * sum(plain.nbytes for value in state for plain in _plain(value) if plain.numel() > 1)
    return total


def _plain(value: object) -> Iterator[Tensor]:
    """The plain tensors in a state's value; torchao wraps codes and scales in a tensor subclass."""
    if hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from _plain(getattr(value, name))
    elif isinstance(value, Tensor):
        yield value
