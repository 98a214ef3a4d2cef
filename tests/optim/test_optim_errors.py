"""Wrong input: an error that names what is wrong, before anything is changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import EVERY, Case
from support.harness import ALL, bits, parameter, snapshot
from support.pairs import pairwise

from optim8 import rules

NAN, INF = float("nan"), float("inf")

# Options that no optimizer takes. What names the option must be in the message.
BAD_OPTIONS: list[tuple[str, Any]] = [
    ("lr", -1e-3),
    ("lr", NAN),
    ("lr", torch.tensor([1e-3, 1e-3])),
    ("betas", (1.0, 0.99)),
    ("betas", (0.9, 1.0)),
    ("betas", (-0.1, 0.99)),
    ("betas", (0.9, NAN)),
    ("betas", (0.9,)),
    ("betas", 0.9),
    ("eps", -1e-8),
    ("eps", NAN),
    ("momentum", -0.1),
    ("momentum", NAN),
    ("momentum", (0.9, 0.99)),
    ("dampening", NAN),
    ("nesterov", "yes"),
    ("nesterov", True),  # without a momentum, or with dampening
    ("weight_decay", -0.1),
    ("weight_decay", NAN),
    ("min_8bit_size", -1),
    ("min_8bit_size", 10.5),
    ("min_8bit_size", "4096"),
    ("optim_bits", 4),
    ("optim_bits", 0),
    ("optim_bits", "8"),
    ("optim_bits", None),
    ("differentiable", True),
]


def _takes(case: Case, name: str) -> bool:
    return name in case.with_defaults([parameter(torch.ones(1))]).param_groups[0]


@pairwise(case=EVERY, name__value=BAD_OPTIONS, in_a_group=[False, True])
def test_bad_options(case: Case, name: str, value: Any, in_a_group: bool) -> None:
    if not _takes(case, name):
        with pytest.raises((TypeError, ValueError), match=name):
            case.with_defaults([parameter(torch.ones(3))], **{name: value})
        return
    optimizer = case.make([parameter(torch.ones(3))])
    if optimizer.defaults[name] is value:
        return  # such as nesterov without a momentum, of an optimizer that has one
    if name == "nesterov" and value is True and not in_a_group and case.defaults.get("momentum"):
        return  # by default it has one
    p = parameter(torch.ones(3))
    group = {"params": [p], name: value}
    with pytest.raises((ValueError, TypeError), match=name) as error:
        optimizer.add_param_group(group) if in_a_group else case.with_defaults([p], **{name: value})
    assert len(optimizer.param_groups) == 1, "the group that was refused is not there"
    if name == "differentiable":
        assert isinstance(error.value, ValueError)
        assert "torch.optim" in str(error.value) or "instead" in str(error.value), "say what to use instead"


@ALL
def test_edges_of_what_is_allowed(case: Case) -> None:
    p = parameter(torch.ones(3), torch.ones(3))
    for options in (
        {"lr": 0.0},
        *({hyper.name: (0.0,) * len(hyper.default)} for hyper in rules.rule(case.cls.rule).hypers if hyper.is_tuple),
        {"weight_decay": 0.0},
        {"min_8bit_size": 0},
        {"optim_bits": 32},
    ):
        case.with_defaults([p], **options).step()
    with pytest.raises(ValueError, match="empty"):
        case.with_defaults([])
    with pytest.raises(TypeError):
        case.with_defaults(torch.ones(3))
    with pytest.raises(ValueError, match="leaf"):
        case.with_defaults([parameter(torch.ones(3)) * 2])
    with pytest.raises(ValueError, match="more than one"):
        case.with_defaults([{"params": [p]}, {"params": [p]}])


def _sparse(p: torch.nn.Parameter) -> None:
    p.grad = torch.ones(700, device=p.device).to_sparse()


def _other_shape(p: torch.nn.Parameter) -> None:
    p.data = torch.ones(6_000_000, device=p.device)  # the gradient still has 700 elements


def _smaller(p: torch.nn.Parameter) -> None:
    p.data = torch.ones(3, device=p.device)
    p.grad = None
    p.grad = torch.ones(3, device=p.device)


def _larger(p: torch.nn.Parameter) -> None:
    p.data = torch.ones(6_000_000, device=p.device)
    p.grad = None
    p.grad = torch.ones(6_000_000, device=p.device)


def _float64(p: torch.nn.Parameter) -> None:
    p.grad = None
    p.data = p.data.double()
    p.grad = torch.ones(700, dtype=torch.float64, device=p.device)


def _other_grad_dtype(dtype: torch.dtype) -> Callable[[torch.nn.Parameter], None]:
    def give(p: torch.nn.Parameter) -> None:
        if not hasattr(p, "grad_dtype"):
            pytest.skip("this torch has no Tensor.grad_dtype, so a gradient has its parameter's dtype")
        p.grad = None
        p.grad_dtype = None
        p.grad = torch.ones(700, dtype=dtype, device=p.device)

    return give


def _overlapping(p: torch.nn.Parameter) -> None:
    p.grad = None
    p.data = torch.ones(1, device=p.device).expand(700)
    p.grad = torch.ones(700, device=p.device)


def _without_memory(p: torch.nn.Parameter) -> None:
    p.data.untyped_storage().resize_(0)  # as FSDP frees what is not in use


def _grad_without_memory(p: torch.nn.Parameter) -> None:
    assert p.grad is not None
    p.grad.untyped_storage().resize_(0)


# What may come to a parameter between two steps. The state for 700 elements exists, or not.
SPOIL: dict[str, tuple[Callable[[torch.nn.Parameter], None], bool]] = {
    # what happens, and whether it is an error before there is state as well
    "sparse gradient": (_sparse, True),
    "gradient of another shape": (_other_shape, True),
    "fewer elements than the state": (_smaller, False),
    "more elements than the state": (_larger, False),
    "float64": (_float64, True),
    "float64 gradient": (_other_grad_dtype(torch.float64), True),
    "float16 gradient of a float32 parameter": (_other_grad_dtype(torch.float16), True),
    "integer gradient": (_other_grad_dtype(torch.int32), True),
    "elements that share memory": (_overlapping, True),
    "no memory": (_without_memory, True),
    "gradient without memory": (_grad_without_memory, True),
}


SPOIL_WHEN = [(what, True) for what in SPOIL] + [(what, False) for what, (_, always) in SPOIL.items() if always]


@pairwise(case=EVERY, what__with_state=SPOIL_WHEN, optim_bits=[8, 16, 32])
def test_a_bad_parameter_is_named_and_nothing_is_changed(
    case: Case, what: str, with_state: bool, optim_bits: int, device: torch.device
) -> None:
    spoil, _ = SPOIL[what]
    first, second = ([parameter(torch.ones(700, device=device)) for _ in range(3)] for _ in range(2))
    optimizer = case.make([{"params": first}, {"params": second, "lr": 0.5}], optim_bits=optim_bits)
    for p in first + second:
        p.grad = torch.full((700,), 0.5, device=device)
    if with_state:
        optimizer.step()
    spoil(second[1])
    before = snapshot(optimizer)
    with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
        optimizer.step()
    message = str(error.value)
    assert "group 1" in message, message
    assert "parameter 1" in message or "index 1" in message, message
    assert snapshot(optimizer) == before


NEVER: dict[str, Callable[[], torch.nn.Parameter]] = {
    "complex": lambda: parameter(torch.ones(3, dtype=torch.complex64), torch.ones(3, dtype=torch.complex64)),
    "float64": lambda: parameter(torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)),
    "sparse": lambda: parameter(torch.ones(3).to_sparse(), torch.ones(3).to_sparse()),
    "meta": lambda: parameter(torch.ones(3, device="meta"), torch.ones(3, device="meta")),
}


@pytest.mark.parametrize("later", [False, True], ids=["constructor", "add_param_group"])
@pytest.mark.parametrize("kind", NEVER)
@ALL
def test_what_can_never_be_stepped(case: Case, kind: str, later: bool, device: torch.device) -> None:
    """Refused when it is handed over or, at the latest, by the step, by name and before the others have moved."""
    good = parameter(torch.ones(700, device=device), torch.ones(700, device=device))
    second = {"params": [torch.nn.Parameter(torch.ones(2)), NEVER[kind]()]}

    def build_and_step() -> None:
        optimizer = case.make([good] if later else [{"params": [good]}, second])
        if later:
            optimizer.add_param_group(second)
        optimizer.step()

    with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
        build_and_step()
    message = str(error.value)
    assert "group 1" in message, message
    assert "parameter 1" in message or "index 1" in message, message
    assert (good == 1).all()


FROZEN: dict[str, Callable[[], torch.Tensor]] = {
    "uint8": lambda: torch.zeros(70, 70, dtype=torch.uint8),
    "float64": lambda: torch.zeros(70, 70, dtype=torch.float64),
    "complex": lambda: torch.zeros(70, 70, dtype=torch.complex64),
    "float8": lambda: torch.zeros(70, 70, dtype=torch.float8_e4m3fn),
    "sparse": lambda: torch.ones(70, 70).to_sparse(),
    "meta": lambda: torch.ones(70, 70, device="meta"),
}


@pytest.mark.parametrize("later", [False, True], ids=["constructor", "add_param_group"])
@pytest.mark.parametrize("kind", FROZEN)
@ALL
def test_frozen_parameters_may_be_of_any_kind(case: Case, kind: str, later: bool, device: torch.device) -> None:
    """As the packed weights of a quantized model, which scripts hand over with all others."""
    data = FROZEN[kind]()
    frozen = torch.nn.Parameter(data if data.is_meta else data.to(device), requires_grad=False)
    first, second = (parameter(torch.ones(700, device=device), torch.ones(700, device=device)) for _ in range(2))
    alone = [parameter(torch.ones(700, device=device), torch.ones(700, device=device)) for _ in range(2)]
    optimizer = case.make([first] if later else [first, frozen, second])
    if later:
        optimizer.add_param_group({"params": [frozen, second]})
    other = case.make(alone)
    for _ in range(2):
        optimizer.step()
        other.step()
    assert [bits(p) for p in (first, second)] == [bits(p) for p in alone]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert set(optimizer.state) == {first, second}
    assert [place.tier for place in optimizer.placement()].count("none") == 1


@ALL
def test_a_frozen_parameter_that_thaws_is_checked_by_the_step(case: Case, device: torch.device) -> None:
    params = [parameter(torch.ones(700, device=device), torch.ones(700, device=device)) for _ in range(2)]
    params[1].requires_grad_(False)
    params[1].grad = None
    params[1].data = params[1].data.double()
    optimizer = case.make(params)
    params[1].requires_grad_(True)
    params[1].grad = torch.ones_like(params[1])
    with pytest.raises(ValueError, match=r"parameter 1 of group 0 must be float32, .* got float64 \(700,\)"):
        optimizer.step()
    assert (params[0] == 1).all()


@pytest.mark.parametrize("wrong", [(0.9, 1.0), (0.9,), (0.9, NAN), 0.9, -1.0, NAN, "much"], ids=str)
@ALL
def test_options_that_a_group_got_later(case: Case, wrong: Any, device: torch.device) -> None:
    """With b = 1 the bias correction divides by 0: torch.optim raises too, and not by moving everything to 1e34."""
    pairs = [hyper.name for hyper in rules.rule(case.cls.rule).hypers if hyper.is_tuple]
    name = pairs[0] if pairs and (isinstance(wrong, tuple) or wrong == 0.9) else "weight_decay"
    if name == "weight_decay" and wrong == 0.9:
        wrong = -0.9
    params = [parameter(torch.ones(700, device=device), torch.ones(700, device=device)) for _ in range(2)]
    optimizer = case.make([{"params": params[:1]}, {"params": params[1:]}])
    optimizer.step()
    optimizer.param_groups[1][name] = wrong
    before = snapshot(optimizer)
    with pytest.raises((ValueError, TypeError), match=name):
        optimizer.step()
    assert str(snapshot(optimizer)) == str(before)  # as text, since NaN is not equal to itself


@ALL
def test_precision_of_a_stranger(case: Case) -> None:
    optimizer = case.make([parameter(torch.ones(3))])
    with pytest.raises((KeyError, ValueError), match="param"):
        optimizer.precision(parameter(torch.ones(3)))


@pytest.mark.parametrize("part", ["codes", "absmax", "step"])
@ALL
def test_a_state_that_was_tampered_with_is_noticed(case: Case, part: str, device: torch.device) -> None:
    """Whoever replaces a state tensor by one that does not fit gets an error, not a write into foreign memory."""
    params = [parameter(torch.ones(700, device=device), torch.ones(700, device=device)) for _ in range(2)]
    optimizer = case.make(params)
    optimizer.step()
    name = {"step": "step", "codes": case.codes(case.state), "absmax": case.absmax(case.state)}[part]
    optimizer.state[params[1]][name] = torch.zeros(2, dtype=torch.uint8, device=device)
    values_before = [p.detach().clone() for p in params]
    with pytest.raises((ValueError, TypeError, RuntimeError), match=r"(parameter|index) 1"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, values_before, strict=True))
