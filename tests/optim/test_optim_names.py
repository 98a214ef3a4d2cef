"""Code that was written for bitsandbytes runs after `import optim8 as bnb`: names, arguments, modules, manager."""

from __future__ import annotations

import argparse
import copy
import gc
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.harness import bits, hostile, parameter, state_bits

import optim8
import optim8 as bnb
from optim8.step import overrides

KINDS = ("Adam", "AdamW", "Lion")
NAMES = [f"{paged}{kind}{size}" for paged in ("", "Paged") for kind in KINDS for size in ("", "8bit", "32bit")]


def _base(name: str) -> str:
    return name.removeprefix("Paged").removesuffix("8bit").removesuffix("32bit") + "8bit"


def _param(n: int = 5000) -> torch.nn.Parameter:
    return parameter(hostile(n, torch.float32, seed=1, small=-2, large=0), hostile(n, torch.float32, seed=2))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_says_precision_and_place(name: str) -> None:
    """Each is the 8-bit optimizer with other defaults: the same bits, and still so after a copy."""
    p, q = _param(), _param()
    optimizer = getattr(bnb.optim, name)([p], lr=0.01)
    expected = getattr(optim8, _base(name))([q], lr=0.01, optim_bits=8 if name.endswith("8bit") else 32)
    for _ in range(2):
        optimizer.step()
        expected.step()
    assert bits(p) == bits(q)
    assert state_bits(optimizer, p) == state_bits(expected, q)
    assert optimizer.precision(p) == ("8bit" if name.endswith("8bit") else "32bit")
    assert [place.tier for place in optimizer.placement()] == ["disk" if name.startswith("Paged") else "host"]
    assert type(optimizer).__name__ == name
    assert type(optimizer).__doc__
    if not name.startswith("Paged"):
        for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            assert type(twin) is type(optimizer)
            assert twin.param_groups[0]["optim_bits"] == optimizer.param_groups[0]["optim_bits"]


@pytest.mark.parametrize("name", NAMES)
def test_optim_bits(name: str) -> None:
    p = _param()
    if name.endswith("32bit"):
        for more in ({"optim_bits": 8}, {"args": argparse.Namespace(optim_bits=8)}):
            with pytest.raises(ValueError, match=f"{name}: optim_bits must be 32, got 8. Use {name[:-5]}8bit"):
                getattr(bnb.optim, name)([p], **more)
    else:
        assert getattr(bnb.optim, name)([p], optim_bits=8).precision(p) == "8bit"
    assert getattr(bnb.optim, name)([p], optim_bits=32).precision(p) == "32bit"


@pytest.mark.peers
def test_every_name_and_argument_of_bitsandbytes_is_there() -> None:
    theirs = pytest.importorskip("bitsandbytes")
    stems = tuple(f"{paged}{kind}" for paged in ("", "Paged") for kind in KINDS)
    names = [n for n in dir(theirs.optim) if n.removesuffix("8bit").removesuffix("32bit") in stems]
    assert sorted(names) == sorted(NAMES)
    for name in names:
        arguments = inspect.signature(getattr(theirs.optim, name)).parameters
        given = {key: value.default for key, value in arguments.items() if key not in ("params", "optim_bits")}
        optimizer = getattr(bnb.optim, name)(params=[_param()], **given)
        for key in ("lr", "betas", "eps", "weight_decay", "min_8bit_size"):
            if key in given:
                assert optimizer.param_groups[0][key] == given[key], (name, key)
        # Without arguments, too.
        alone, there = getattr(bnb.optim, name)([_param()]), getattr(theirs.optim, name)([_param()])
        for key in ("lr", "betas", "weight_decay"):
            assert alone.param_groups[0][key] == there.param_groups[0][key], (name, key)
        # By position: the first arguments stand in the same order.
        order = [key for key in arguments if key in ("params", "lr", "betas", "eps", "weight_decay", "amsgrad")]
        assert list(inspect.signature(getattr(optim8, _base(name))).parameters)[: len(order)] == order, name
    for name in ("GlobalOptimManager",):
        assert hasattr(theirs.optim, name)
        assert hasattr(bnb.optim, name)
    for method in ("get_instance", "initialize", "register_parameters", "override_config", "register_module_override"):
        ours = inspect.signature(getattr(bnb.optim.GlobalOptimManager, method)).parameters
        assert list(ours) == list(inspect.signature(getattr(theirs.optim.GlobalOptimManager, method)).parameters)


class Fairseq:
    """An `args` object as programs hand it over, with much that is not for the optimizer."""

    optim_bits = 8
    min_8bit_size = 10_000
    max_unorm = 0.0
    skip_zeros = False
    learning_rate = 3


ACCEPTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "betas as a string": ({"betas": "(0.8, 0.95)"}, {"betas": (0.8, 0.95)}),
    "betas as a bare string": ({"betas": " 0.8,0.95 "}, {"betas": (0.8, 0.95)}),
    "betas as a list": ({"betas": [0.8, 0.95]}, {"betas": (0.8, 0.95)}),
    "args": ({"args": Fairseq()}, {"optim_bits": 8, "min_8bit_size": 10_000}),
    "args, a namespace": ({"args": argparse.Namespace(min_8bit_size=7, lr=3)}, {"min_8bit_size": 7, "lr": 1e-3}),
    "args=None": ({"args": None}, {"min_8bit_size": 4096}),
    "min_8bit_size": ({"min_8bit_size": 5}, {"min_8bit_size": 5}),
    "is_paged=False": ({"is_paged": False}, {}),
    "what changes nothing": (
        {"percentile_clipping": 100, "block_wise": True, "max_unorm": 0.0, "skip_zeros": False},
        {},
    ),
}


@pytest.mark.parametrize("what", ACCEPTED)
def test_arguments_that_are_honoured(what: str) -> None:
    given, expected = ACCEPTED[what]
    optimizer = bnb.optim.Adam([_param()], **given)
    group = optimizer.param_groups[0]
    assert {key: group[key] for key in expected} == expected
    assert not {"kwargs", "args", "is_paged", "block_wise", "percentile_clipping"} & group.keys()
    optimizer.step()


def test_is_paged() -> None:
    p = _param()
    optimizer = bnb.optim.AdamW8bit([p], is_paged=True)
    optimizer.step()
    assert [place.tier for place in optimizer.placement()] == ["disk"]
    with pytest.raises(ValueError, match="is_paged=True contradicts paged=False"):
        bnb.optim.AdamW8bit([p], is_paged=True, paged=False)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "percentile_clipping": (
        {"percentile_clipping": 5},
        ValueError,
        "percentile_clipping must be 100, got 5. Clip",
    ),
    "block_wise": ({"block_wise": False}, ValueError, "block_wise must be True, got False"),
    "max_unorm": ({"max_unorm": 1.0}, ValueError, "max_unorm must be 0.0, got 1.0"),
    "skip_zeros": ({"skip_zeros": True}, ValueError, "skip_zeros must be False, got True"),
    "in args": ({"args": argparse.Namespace(max_unorm=1.0)}, ValueError, "max_unorm must be 0.0"),
    "an unknown one": ({"momentum": 0.9}, TypeError, "'momentum' is no argument"),
    "betas of words": ({"betas": "high"}, ValueError, "betas must be a pair"),
    "one beta": ({"betas": "(0.9)"}, ValueError, "betas must be a pair"),
    "betas out of range": ({"betas": "(0.9, 1.0)"}, ValueError, r"betas\[1\] must be"),
    "bits": ({"optim_bits": 4}, ValueError, "optim_bits must be 8, 16 or 32, got 4"),
    "rounding": ({"rounding": "up"}, ValueError, "rounding must be 'dithered' or 'nearest', got 'up'"),
    "rounding of another type": ({"rounding": ["nearest"]}, ValueError, "rounding must be 'dithered' or 'nearest'"),
}


@pytest.mark.parametrize("name", ["Adam8bit", "PagedAdamW"])
@pytest.mark.parametrize("what", REFUSED)
def test_arguments_that_are_refused(what: str, name: str) -> None:
    given, error, message = REFUSED[what]
    with pytest.raises(error, match=f"{name}: .*{message}"):
        getattr(bnb.optim, name)([_param()], **given)


def _train(library: Any) -> torch.Tensor:
    """A script for bitsandbytes, with its functional API, embedding, manager and optimizer."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        library.nn.StableEmbedding(50, 64), torch.nn.Flatten(), torch.nn.Linear(512, 64), torch.nn.Linear(64, 50)
    )
    manager = library.optim.GlobalOptimManager.get_instance()
    manager.register_parameters(model.parameters())
    manager.override_config(model[3].weight, "optim_bits", 32)
    optimizer = library.optim.AdamW(
        model.parameters(), lr=3e-3, betas="(0.9, 0.99)", optim_bits=8, min_8bit_size=0, is_paged=False
    )
    batch = torch.randint(50, (64, 9), generator=torch.Generator().manual_seed(1))
    for _ in range(4):
        loss = torch.nn.functional.cross_entropy(model(batch[:, :8]), batch[:, 8])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    manager.initialize()  # bitsandbytes' would go on to override the parameter at this place of any other optimizer
    codes, state = library.functional.quantize_blockwise(model[3].weight.detach())
    return library.functional.dequantize_blockwise(codes, state).norm() * loss.item()


@pytest.mark.peers
def test_a_script_runs_after_changing_the_import() -> None:
    theirs = pytest.importorskip("bitsandbytes")
    expected = _train(theirs)
    # 8-bit steps differ in how small second moments are kept; the runs stay close, and training has an effect.
    torch.testing.assert_close(_train(bnb), expected, rtol=0.1, atol=0)


def _embedding(**options: Any) -> optim8.nn.StableEmbedding:
    torch.manual_seed(0)
    return optim8.nn.StableEmbedding(300, 20, **options)


def test_stable_embedding_is_norm_after_xavier() -> None:
    module = _embedding(padding_idx=3)
    bound = (6 / 320) ** 0.5  # Glorot and Bengio 2010, equation 16
    drawn = module.weight[torch.arange(300) != 3]
    assert bound * 0.99 < drawn.abs().max() <= bound
    assert drawn.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert not module.weight[3].any()
    tokens = torch.tensor([[1, 2, 3], [4, 5, 3]])
    expected = torch.nn.functional.layer_norm(module.weight[tokens], (20,))
    torch.testing.assert_close(module(tokens), expected)
    module(tokens).square().sum().backward()
    assert not module.weight.grad[3].any()
    assert module.norm.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stable_embedding_norms_in_full_precision(dtype: torch.dtype) -> None:
    module = _embedding(dtype=dtype)
    assert module.norm.weight.dtype == torch.float32
    tokens = torch.arange(5)
    expected = torch.nn.functional.layer_norm(module.weight[tokens].float(), (20,)).to(dtype)
    assert module(tokens).dtype == dtype
    assert torch.equal(module(tokens), expected)
    assert module.to(dtype)(tokens).dtype == dtype, "a model that is cast whole runs"


@pytest.mark.parametrize("how", ["new", "deepcopy", "pickle", "given weights", "moved"])
def test_stable_embedding_has_32bit_state(how: str) -> None:
    module = _embedding(_weight=torch.ones(300, 20)) if how == "given weights" else _embedding()
    if how == "deepcopy":
        module = copy.deepcopy(module)
    elif how == "pickle":
        module = pickle.loads(pickle.dumps(module))
    elif how == "moved":
        module.weight = parameter(module.weight.detach().clone())
    elif how == "given weights":
        assert torch.equal(module.weight, torch.ones(300, 20))
    optimizer = optim8.AdamW8bit(module.parameters(), min_8bit_size=0)
    module(torch.arange(5)).square().sum().backward()
    optimizer.step()
    assert [optimizer.precision(p) for p in (module.weight, module.norm.weight)] == ["32bit", "8bit"]


def test_stable_embedding_goes_away() -> None:
    gc.collect()
    optim8.AdamW8bit([_param()]).precision  # noqa: B018
    module = _embedding()
    before = len(overrides._made)
    del module
    gc.collect()
    with optim8.override(_param(), lr=0.1):  # anything that makes an optimizer look again
        optim8.AdamW8bit([q := _param()]).precision(q)
    assert len(overrides._made) < before


@pytest.mark.peers
def test_stable_embedding_loads_that_of_bitsandbytes() -> None:
    theirs = pytest.importorskip("bitsandbytes").nn.StableEmbedding(300, 20, padding_idx=1)
    ours = _embedding(padding_idx=1)
    ours.load_state_dict(theirs.state_dict())
    tokens = torch.arange(7)
    torch.testing.assert_close(ours(tokens), theirs(tokens))
    assert inspect.signature(type(ours)).parameters.keys() == inspect.signature(type(theirs)).parameters.keys()


def _manager() -> bnb.optim.GlobalOptimManager:
    return bnb.optim.GlobalOptimManager.get_instance()


def test_the_manager() -> None:
    assert _manager() is _manager()
    with pytest.raises(RuntimeError, match="get_instance"):
        bnb.optim.GlobalOptimManager()
    params = [_param() for _ in range(6)]
    manager = _manager()
    manager.register_parameters(iter(params))
    manager.register_parameters([{"params": params[:2]}, {"params": iter(params[2:])}])
    manager.override_config(params[0], "optim_bits", 32)
    manager.override_config(params[1:3], key_value_dict={"optim_bits": 32, "lr": 0.0, "skip_zeros": False})
    optimizer = bnb.optim.Adam8bit(params, lr=0.1)
    model = torch.nn.Module()
    model.weight = params[4]
    manager.register_module_override(model, "weight", {"betas": (0.0, 0.0)})
    manager.override_config(params[5], key="weight_decay", value=0.5)
    assert [optimizer.precision(p) for p in params] == ["32bit"] * 3 + ["8bit"] * 3
    assert [optimizer.overridden(p) for p in params[3:]] == [{}, {"betas": (0.0, 0.0)}, {"weight_decay": 0.5}]
    before = [bits(p) for p in params]
    optimizer.step()
    assert [bits(p) == was for p, was in zip(params, before, strict=True)] == [False, True, True, False, False, False]


MODEL = torch.nn.Linear(3, 3)
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "an unknown key": (lambda: _manager().override_config(MODEL.weight, "optim_bit", 8), ValueError, "'optim_bit'"),
    "a wrong value": (lambda: _manager().override_config(MODEL.weight, "optim_bits", 4), ValueError, "got 4"),
    "both forms": (lambda: _manager().override_config(MODEL.weight, "lr", 1, {"lr": 1}), ValueError, "either key"),
    "no form": (lambda: _manager().override_config(MODEL.weight), ValueError, "either key"),
    "nothing to change": (
        lambda: _manager().override_config(MODEL.weight, "skip_zeros", False),
        ValueError,
        "at least one option",
    ),
    "what is not honoured": (lambda: _manager().override_config(MODEL.weight, "skip_zeros", True), ValueError, "skip_"),
    "no parameters": (lambda: _manager().override_config([], "lr", 1.0), ValueError, "at least one parameter"),
    "a name": (lambda: _manager().override_config(["weight"], "lr", 1.0), TypeError, "got a str"),
    "a result": (lambda: _manager().override_config([MODEL.weight * 1], "lr", 1.0), ValueError, "must be a parameter"),
    "no such parameter": (
        lambda: _manager().register_module_override(MODEL, "wait", {"lr": 1.0}),
        ValueError,
        "Linear has no parameter 'wait'",
    ),
    "names to register": (lambda: _manager().register_parameters(["weight"]), TypeError, "got a str"),
}


@pytest.mark.parametrize("what", WRONG)
def test_the_manager_refuses(what: str) -> None:
    call, error, message = WRONG[what]
    with pytest.raises(error, match=message):
        call()
    assert optim8.AdamW8bit(MODEL.parameters()).overridden(MODEL.weight) == {}
