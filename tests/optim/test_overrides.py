"""Options of single parameters: each ends as in an optimizer of its own with those options, and nothing else moves."""

from __future__ import annotations

import copy
import gc
import inspect
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import EVERY, Case
from support.harness import ALL, bits, hostile, hostile_steps, parameter, state_bits

import optim8
from optim8.step import overrides, supply
from optim8.step.scaling import UNSCALED

# Every option that can be overridden, with a value that is not row 0's.
CHANGES: dict[str, dict[str, Any]] = {
    "optim_bits": {"optim_bits": 32},
    "min_8bit_size": {"min_8bit_size": 601},
    "lr": {"lr": 0.25},
    "lr as a tensor": {"lr": torch.tensor(0.25)},
    "betas": {"betas": (0.3, 0.6)},
    "betas as a string": {"betas": "(0.3, 0.6)"},
    "three betas": {"betas": (0.3, 0.6, 0.7)},
    "weight_decay": {"weight_decay": 0.5},
    "eps": {"eps": 0.125},
    "momentum": {"momentum": 0.25},
    "dampening": {"dampening": 0.5},
    "nesterov": {"nesterov": True, "dampening": 0.0},
    "several": {"lr": 0.1, "betas": (0.1, 0.2), "weight_decay": 0.0, "optim_bits": 32},
    "several, of one momentum": {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.0, "optim_bits": 32},
}


def _takes(case: Case, changes: dict[str, Any]) -> bool:
    count = {"betas": len(case.hypers[0].get("betas", ()))}
    return changes.keys() <= inspect.signature(case.cls).parameters.keys() and all(
        len(value if isinstance(value, tuple) else value.split(",")) == count[name]
        for name, value in changes.items()
        if name in count
    )


def _params(count: int, n: int = 600) -> list[torch.nn.Parameter]:
    return [parameter(hostile(n, torch.float32, seed=i, small=-2, large=0)) for i in range(count)]


def _assert_same(optimizer: Any, params: list[torch.nn.Parameter], other: Any, twins: list[torch.nn.Parameter]) -> None:
    for p, q in zip(params, twins, strict=True):
        assert bits(p) == bits(q)
        assert state_bits(optimizer, p) == state_bits(other, q)
        assert optimizer.precision(p) == other.precision(q)


@pytest.mark.parametrize("first", [True, False], ids=["before the optimizer", "before the first step"])
@pytest.mark.parametrize(  # what a rule lacks: test_an_option_that_the_rule_lacks
    ("case", "what"), [(case, what) for case in EVERY for what in CHANGES if _takes(case, CHANGES[what])], ids=str
)
def test_overridden_parameters_are_as_in_a_group_of_their_own(case: Case, what: str, first: bool) -> None:
    """Parameters 1 and 3 of 5 in one group against two groups; two groups get the same options by other ways."""
    changes = CHANGES[what]
    params, twins = _params(5), _params(5)
    optimizer = None if first else case.make(params)
    handles = [optim8.override(params[1], **changes), optim8.override(params[3], **changes)]
    optimizer = optimizer or case.make(params)
    plain = {**changes, "betas": (0.3, 0.6)} if what == "betas as a string" else changes
    groups = [{"params": [twins[0], twins[2], twins[4]]}, {"params": [twins[1], twins[3]], **plain}]
    other = case.make(groups)
    hostile_steps(params, optimizer, 0, 4)
    for t in range(4):
        hostile_steps(twins, other, t, t + 1)
    _assert_same(optimizer, params, other, twins)
    for handle in handles:
        handle.remove()
    kept = ("params", "optim_bits", "min_8bit_size")  # the state that exists keeps its precision
    other.param_groups[1].update({name: v for name, v in other.param_groups[0].items() if name not in kept})
    hostile_steps(params, optimizer, 4, 6)
    hostile_steps(twins, other, 4, 6)
    _assert_same(optimizer, params, other, twins)


@pytest.mark.parametrize("ask", ["step", "precision", "state_dict"])
@pytest.mark.parametrize("to", [8, 16, 32])
@ALL
def test_an_override_converts_state_that_exists(case: Case, to: int, ask: str) -> None:
    params = _params(3)
    first = 16 if to == 32 else 32
    optimizer = case.make(params, optim_bits=first)
    hostile_steps(params, optimizer, 0, 3)
    assert optimizer.precision(params[1]) == f"{first}bit"
    before = optimizer.state_dict()["state"]
    saved = {i: {key: value.clone() for key, value in entry.items()} for i, entry in before.items()}
    with optim8.override(params[1], optim_bits=to), optim8.convert.report() as report:
        if ask == "step":
            for p in params:
                p.grad = None
            params[0].grad = torch.ones_like(params[0])
            optimizer.step()
        elif ask == "state_dict":
            assert (case.absmax(case.state) in optimizer.state_dict()["state"][1]) == (to != 32)
        assert [optimizer.precision(p) for p in params] == [f"{first}bit", f"{to}bit", f"{first}bit"]
        rows = [(row.how, row.relative_error) for row in report.rows]
        assert [how for how, _ in rows] == ["widened" if to == 32 else "quantized"] * len(case.states)
        assert all(error == 0 if to == 32 else error < 0.05 for _, error in rows)
        assert optimizer.state[params[1]]["step"] == 3
        if ask != "step":
            assert state_bits(optimizer, params[2]) == {key: bits(value) for key, value in saved[2].items()}
        expected = copy.deepcopy(optimizer.state[params[1]])
    # What was converted is what a checkpoint of that precision loads as: the futures agree.
    twin = parameter(params[1].detach().clone())
    other = case.make([twin], optim_bits=to)
    other.load_state_dict({"state": {0: expected}, "param_groups": other.state_dict()["param_groups"]})
    for t in range(5, 7):
        for p in (params[1], twin):
            p.grad = hostile(600, torch.float32, seed=t)
        optimizer.step()
        other.step()
    assert bits(params[1]) == bits(twin)
    assert optimizer.precision(params[1]) == f"{to}bit", "the end of an override leaves state in its precision"


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(10, 60)
        self.body = torch.nn.Sequential(torch.nn.Linear(60, 60), torch.nn.Linear(60, 10))
        self.head = torch.nn.Linear(10, 10)


Target = Callable[[Net], Any]
TARGETS: dict[str, tuple[Target, dict[str, Any], set[str]]] = {
    "parameter": (lambda m: m.embed.weight, {}, {"embed.weight"}),
    "module": (lambda m: m.embed, {}, {"embed.weight"}),
    "module with children": (lambda m: m.body, {}, {f"body.{i}.{k}" for i in (0, 1) for k in ("weight", "bias")}),
    "pattern": (lambda m: "body.*", {}, {f"body.{i}.{k}" for i in (0, 1) for k in ("weight", "bias")}),
    "pattern over dots": (lambda m: "*bias", {}, {"body.0.bias", "body.1.bias", "head.bias"}),
    "name": (lambda m: "head.weight", {}, {"head.weight"}),
    "characters": (lambda m: "body.[1-9].weight", {}, {"body.1.weight"}),
}


@pytest.mark.parametrize("named", [True, False], ids=["named_parameters", "parameters"])
@pytest.mark.parametrize("what", TARGETS)
def test_targets(what: str, named: bool) -> None:
    model, other = Net(), Net()
    target, more, meant = TARGETS[what]
    if isinstance(target(model), str) and not named:
        more = {**more, "module": model}
    with optim8.override(target(model), optim_bits=32, **more):
        optimizer = optim8.AdamW8bit(model.named_parameters() if named else model.parameters(), min_8bit_size=0)
        found = {name for name, p in model.named_parameters() if optimizer.precision(p) == "32bit"}
        assert found == meant
        if not isinstance(target(model), str):  # a pattern without module= means every optimizer's names
            stranger = optim8.AdamW8bit(other.parameters(), min_8bit_size=0)
            assert {stranger.precision(p) for p in other.parameters()} == {"8bit"}
    assert {optimizer.precision(p) for p in model.parameters()} == {"8bit"}


def test_a_module_is_looked_through_late() -> None:
    """A model whose parameters are replaced, as sharding does, keeps the overrides of its modules and patterns."""
    model = Net()
    with optim8.override(model.embed, optim_bits=32), optim8.override("head.*", module=model, lr=0.5):
        model.embed.weight = parameter(model.embed.weight.detach().clone())
        model.head.weight = parameter(model.head.weight.detach().clone())
        optimizer = optim8.Lion8bit(model.parameters(), lr=0.0, min_8bit_size=0)
        assert optimizer.precision(model.embed.weight) == "32bit"
        before = bits(model.head.weight), bits(model.body[0].weight)
        for _ in range(2):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
            # An engine that shards later swaps the list of a group, or its elements.
            swapped = {id(p): parameter(p.detach().clone()) for p in model.parameters()}
            optimizer.state.clear()
            model.head.weight = swapped[id(model.head.weight)]
            group = optimizer.param_groups[0]
            group["params"] = [model.head.weight if p.shape == (10, 10) else p for p in group["params"]]
        assert bits(model.head.weight) != before[0]
        assert bits(model.body[0].weight) == before[1]
    optimizer.step()


def test_later_overrides_win_option_by_option() -> None:
    (p,) = _params(1)
    optimizer = optim8.Lion8bit([p], lr=0.0, min_8bit_size=0)
    with optim8.override(p, lr=1.0, optim_bits=32):
        with optim8.override(p, lr=2.0):
            before = p.detach().clone()
            p.grad = torch.ones_like(p)
            optimizer.step()
            torch.testing.assert_close(p.detach(), before - 2.0)
            assert optimizer.precision(p) == "32bit"
        before = p.detach().clone()
        optimizer.step()
        torch.testing.assert_close(p.detach(), before - 1.0)


def test_schedulers_move_the_others_only() -> None:
    p, q = _params(2)
    optimizer = optim8.Lion8bit([p, q], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    with optim8.override(q, lr=1.0):
        for lr in (1.0, 0.5, 0.25):
            before = [x.detach().clone() for x in (p, q)]
            p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
            optimizer.step()
            scheduler.step()
            torch.testing.assert_close(p.detach(), before[0] - lr)
            torch.testing.assert_close(q.detach(), before[1] - 1.0)


def test_add_param_group_and_loading_look_again() -> None:
    p, q = _params(2)
    with optim8.override(q, optim_bits=32):
        optimizer = optim8.AdamW8bit([p], min_8bit_size=0)
        assert optimizer.precision(p) == "8bit"
        optimizer.add_param_group({"params": [q]})
        assert optimizer.precision(q) == "32bit"
        twins = _params(2)
        donor = optim8.AdamW8bit([{"params": [twins[0]]}, {"params": [twins[1]]}], min_8bit_size=0)
        hostile_steps(twins, donor, 0, 2)
        optimizer.load_state_dict(donor.state_dict())
        assert [optimizer.precision(x) for x in (p, q)] == ["8bit", "32bit"], "an override outweighs a checkpoint"
        assert optimizer.state[q]["step"] == 2


@pytest.mark.parametrize("how", ["a gradient of other strides", "state of other strides"])
def test_indices_stay_those_of_the_group(how: str) -> None:
    """What a step repairs on the way (layouts) is repaired for the right parameters of a split group."""

    def make() -> tuple[list[torch.nn.Parameter], Any]:
        params = [parameter(hostile(600, torch.float32, seed=i, small=-2, large=0).view(20, 30)) for i in range(4)]
        return params, optim8.AdamW8bit([{"params": params[:2]}, {"params": params[2:]}], lr=0.1, min_8bit_size=0)

    (params, optimizer), (twins, other) = make(), make()
    with optim8.override(params[3], lr=0.5):
        for t in range(3):
            for ps in (params, twins):
                for i, p in enumerate(ps):
                    g = hostile(600, torch.float32, seed=10 * t + i).view(20, 30)
                    p.grad = g.t().contiguous().t() if how == "a gradient of other strides" else g
                    if how == "state of other strides" and t == 1:
                        p.data = p.data.t().contiguous().t()
            optimizer.step()
            saved, twins[3].grad, other.param_groups[1]["lr"] = twins[3].grad, None, 0.1
            other.step()
            for q in twins[:3]:
                q.grad = None
            twins[3].grad, other.param_groups[1]["lr"] = saved, 0.5
            other.step()
    _assert_same(optimizer, params, other, twins)
    with optim8.override(params[3], lr=0.5):
        params[3].grad = params[3].grad.to_sparse()
        with pytest.raises(ValueError, match="parameter 1 of group 1"):
            optimizer.step()


MODEL = Net()
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "an unknown option": (lambda: optim8.override(MODEL.embed, lrr=1), ValueError, "'lrr'.*optim_bits"),
    "no option": (lambda: optim8.override(MODEL.embed), ValueError, "at least one option"),
    "a group's option": (lambda: optim8.override(MODEL.embed, maximize=True), ValueError, "'maximize'"),
    "bits": (lambda: optim8.override(MODEL.embed, optim_bits=4), ValueError, "optim_bits must be 8, 16 or 32, got 4"),
    "rounding": (lambda: optim8.override(MODEL.embed, rounding="up"), ValueError, "rounding must be 'dithered' or"),
    "a negative lr": (lambda: optim8.override(MODEL.embed, lr=-1.0), ValueError, "lr must be at least 0"),
    "betas": (lambda: optim8.override(MODEL.embed, betas="(0.9)"), ValueError, "betas must be a pair"),
    "betas of words": (lambda: optim8.override(MODEL.embed, betas="(a, b)"), ValueError, "betas must be a pair"),
    "an empty module": (lambda: optim8.override(torch.nn.ReLU(), lr=0.1), ValueError, "no parameters: ReLU"),
    "a result": (lambda: optim8.override(MODEL.embed.weight * 1, lr=0.1), ValueError, "must be a parameter"),
    "a number": (lambda: optim8.override(3, lr=0.1), TypeError, "got int"),  # type: ignore[call-overload]
    "module= beside a module": (lambda: optim8.override(MODEL, module=MODEL, lr=0.1), TypeError, "module="),
    "module= that is none": (
        lambda: optim8.override("x", module=MODEL.named_parameters(), lr=0.1),
        TypeError,
        "generator",
    ),
    "a pattern without match": (lambda: optim8.override("x*", module=MODEL, lr=0.1), ValueError, "'x.*embed.weight"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_honoured_is_refused_at_once(what: str) -> None:
    call, error, message = REFUSED[what]
    with pytest.raises(error, match=message):
        call()
    assert optim8.AdamW8bit(MODEL.parameters(), min_8bit_size=0).precision(MODEL.embed.weight) == "8bit"


USES: dict[str, Callable[[Any, Net], Any]] = {
    "step": lambda optimizer, model: optimizer.step(),
    "precision": lambda optimizer, model: optimizer.precision(model.embed.weight),
    "state_dict": lambda optimizer, model: optimizer.state_dict(),
}


@pytest.mark.parametrize("use", USES)
def test_a_pattern_that_matches_nothing_is_an_error_of_the_first_use(use: str) -> None:
    model = Net()
    optimizer = optim8.AdamW8bit(model.named_parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = [bits(p) for p in model.parameters()]
    with (
        optim8.override("*.no_such", lr=0.1),
        pytest.raises(ValueError, match=r"'\*\.no_such' matches no parameter name; there are embed\.weight"),
    ):
        USES[use](optimizer, model)
    assert [bits(p) for p in model.parameters()] == before
    optimizer.step()


def test_a_pattern_needs_an_optimizer_with_names() -> None:
    model, other = Net(), Net()
    nameless = optim8.AdamW8bit(other.parameters(), min_8bit_size=0)
    with optim8.override("embed.*", optim_bits=32):
        gc.collect()  # optimizers of other tests
        with pytest.raises(ValueError, match=r"knows none.*named_parameters.*module=model"):
            nameless.precision(other.embed.weight)
        meant = optim8.AdamW8bit(model.named_parameters(), min_8bit_size=0)
        assert nameless.precision(other.embed.weight) == "8bit"
        assert meant.precision(model.embed.weight) == "32bit"


def test_an_option_that_the_rule_lacks() -> None:
    (p,) = _params(1)
    optimizer = optim8.Lion8bit([p])
    p.grad = torch.ones_like(p)
    with optim8.override(p, eps=0.1), pytest.raises(ValueError, match=r"Lion8bit: .* eps, .* no option"):
        optimizer.step()
    optimizer.step()


def test_nothing_is_kept_alive_and_nothing_leaks() -> None:
    model = Net()
    optimizer = optim8.AdamW8bit(model.named_parameters(), min_8bit_size=0)
    optim8.override(model.embed, optim_bits=32)
    optim8.override(model.head.weight, optim_bits=32)
    assert optimizer.precision(model.head.weight) == "32bit"
    refs = [weakref.ref(model), weakref.ref(optimizer)]
    twin = copy.deepcopy(model)
    del model, optimizer
    gc.collect()
    assert [ref() for ref in refs] == [None, None]
    fresh = optim8.AdamW8bit(twin.named_parameters(), min_8bit_size=0)
    assert {fresh.precision(p) for p in twin.parameters()} == {"8bit"}, "an override stays with its tensor"
    assert not overrides._made, "overrides of what is gone are gone"


def test_others_overrides_cost_a_step_nothing_by_parameter() -> None:
    """The lists of the groups go to the native step as they are, looked up once."""
    params, others = _params(3), _params(2)
    optimizer = optim8.AdamW8bit(params)
    with optim8.override(others[0], lr=0.1):
        hostile_steps(params, optimizer, 0, 1)
        known = supply.resolve(optimizer)
        hostile_steps(params, optimizer, 1, 2)
        assert supply.resolve(optimizer) is known
        parts = optimizer.stepper._parts(optimizer, None, UNSCALED)
        assert [part.params is optimizer.param_groups[0]["params"] for part in parts] == [True]


@pytest.mark.parametrize("to", [8, 16, 32])
def test_paged_state_is_converted_where_it_lives(to: int) -> None:
    params, twins = _params(3, 5000), _params(3, 5000)
    first = 8 if to == 16 else 40 - to
    paged = optim8.PagedAdamW8bit(params, optim_bits=first)
    plain = optim8.AdamW8bit(twins, optim_bits=first)
    for ps, optimizer in ((params, paged), (twins, plain)):
        hostile_steps(ps, optimizer, 0, 2)
        optim8.override(ps[1], optim_bits=to, lr=0.1)
        hostile_steps(ps, optimizer, 2, 4)
    assert [paged.precision(p) for p in params] == [f"{first}bit", f"{to}bit", f"{first}bit"]
    assert {place.tier for place in paged.placement()} == {"disk"}
    for p, q in zip(params, twins, strict=True):
        assert bits(p) == bits(q)
        assert state_bits(paged, p) == state_bits(plain, q)
    for p in params:
        optim8.override(p, optim_bits=to)
    assert {paged.precision(p) for p in params} == {f"{to}bit"}
    tensors = [t for p in params for t in paged.state[p].values()]
    assert all(any(map(segment.holds, tensors)) for segment in paged.memory.segments), "a file is given up when unused"


def test_an_override_that_concerns_no_optimizer_is_reported_once() -> None:
    (p,), trained, frozen = _params(1), Net(), Net().requires_grad_(False)
    optimizer = optim8.AdamW8bit([p], min_8bit_size=0)
    quiet = [optim8.override(frozen.embed, lr=0.1), optim8.override(p, lr=0.1)]
    embedding = optim8.nn.StableEmbedding(10, 60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.precision(p)
    with optim8.override(trained.embed, optim_bits=32):
        with pytest.warns(UserWarning, match=r"no optimizer has any .*\(shapes \(10, 60\)\)"):
            optimizer.precision(p)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.precision(p)
        assert optim8.AdamW8bit(trained.parameters(), min_8bit_size=0).precision(trained.embed.weight) == "32bit"
    assert embedding.weight.requires_grad
    for handle in quiet:
        handle.remove()
