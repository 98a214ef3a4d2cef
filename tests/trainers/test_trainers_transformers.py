"""The Trainer's names of optimizers, run by optim8.

Each test needs its library and is skipped without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.harness import bits, state_bits
from support.stand_in import stand_in
from trainers_harness import inner, small_language_model, trainer

import optim8
from optim8.integrations import notice
from optim8.integrations import transformers as shim

transformers = pytest.importorskip("transformers")

OWN = ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop", "adamw_torch_4bit", "lomo"]
OTHERS = ["galore_adamw_8bit", "apollo_adamw", "schedule_free_adamw", "stable_adamw", "grokadamw"]
ADAMW_8BIT = ["adamw_8bit", "adamw_bnb_8bit", "adamw_torch_8bit"]


def bitsandbytes_names() -> list[str]:
    from transformers import trainer_optimizer

    return sorted(str(name.value) for name in trainer_optimizer._BITSANDBYTES_OPTIMIZERS)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The Trainer with the shim; the fixture is its own choice of an optimizer."""
    own = transformers.Trainer.get_optimizer_cls_and_kwargs
    monkeypatch.setattr(transformers.Trainer, "get_optimizer_cls_and_kwargs", staticmethod(own))
    monkeypatch.setattr(notice, "_said", set())
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    shim.install()
    return own


def arguments(tmp_path: Path, optim: str, **options: Any) -> Any:
    return transformers.TrainingArguments(str(tmp_path), optim=optim, report_to=[], use_cpu=True, **options)


def settings(cls: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What an optimizer of these arguments has."""
    optimizer = cls([torch.nn.Parameter(torch.ones(5000))], **kwargs)
    assert (optimizer.precision(optimizer.param_groups[0]["params"][0]) == "8bit") == (
        optimizer.defaults["optim_bits"] == 8
    )
    return {**optimizer.defaults, "paged": type(optimizer.memory).__name__}


@pytest.mark.parametrize("optim_args", [None, "beta1=0.7, beta3=0.99, alpha=2.5, t_alpha=10"])
@pytest.mark.parametrize("optim", bitsandbytes_names())
def test_arguments_are_those_that_the_trainer_gives_bitsandbytes(
    optim: str, optim_args: str | None, installed: Any, tmp_path: Path
) -> None:
    if optim_args and "ademamix" not in optim:
        optim_args = "alpha=0.5" if "rmsprop" in optim else None
    args = arguments(
        tmp_path, optim, learning_rate=3e-3, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-7, optim_args=optim_args
    )
    with stand_in():
        transformers.utils.import_utils.is_bitsandbytes_available.cache_clear()
        expected_cls, expected = installed(args, None)
        if "rmsprop" in optim:
            expected = {key: float(value) if isinstance(value, str) else value for key, value in expected.items()}
        wanted = settings(expected_cls, expected)
    transformers.utils.import_utils.is_bitsandbytes_available.cache_clear()
    assert settings(*transformers.Trainer.get_optimizer_cls_and_kwargs(args)) == wanted


@pytest.mark.usefixtures("installed")
def test_torchaos_8_bit_name(tmp_path: Path) -> None:
    args = arguments(tmp_path, "adamw_torch_8bit", optim_args="block_size=256, bf16_stochastic_round=False")
    assert transformers.Trainer.get_optimizer_cls_and_kwargs(args)[0] is optim8.AdamW8bit
    args.optim_args = "bf16_stochastic_round=True"
    with pytest.raises(ValueError, match=r"no bf16_stochastic_round=True\. Write param_rounding=dithered\."):
        transformers.Trainer.get_optimizer_cls_and_kwargs(args)


@pytest.mark.parametrize("optim", [*OWN, *OTHERS])
def test_other_names_stay_the_trainers(optim: str) -> None:
    assert optim in {str(name.value) for name in transformers.training_args.OptimizerNames}
    assert shim.optimizer_class(optim) is None


@pytest.mark.usefixtures("installed")
def test_every_argument_of_the_optimizer(tmp_path: Path) -> None:
    args = arguments(tmp_path, "adamw_8bit", optim_args="min_8bit_size=64,rounding=nearest,amsgrad=true,beta2=0.5")
    _, kwargs = transformers.Trainer.get_optimizer_cls_and_kwargs(args)
    assert kwargs["min_8bit_size"] == 64
    assert kwargs["rounding"] == "nearest"
    assert kwargs["amsgrad"] is True
    assert kwargs["betas"] == (0.9, 0.5)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    "optim_args, words",
    [
        ("momentum=0.5", "AdamW8bit takes no momentum=0.5. It has: lr, betas, eps, weight_decay, amsgrad, "),
        ("beta3=0.5", "AdamW8bit takes no beta3=0.5"),
        ("amsgrad", "AdamW8bit needs key=value, key=value, ..., got 'amsgrad'"),
    ],
)
def test_an_option_that_is_none_is_refused(optim_args: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="optim_args: ") as caught:
        transformers.Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, "adamw_8bit", optim_args=optim_args))
    assert words in str(caught.value)


@pytest.mark.usefixtures("installed")
def test_a_run_and_a_resumed_one(tmp_path: Path, device: torch.device, capsys: pytest.CaptureFixture[str]) -> None:
    """Embeddings keep 32-bit state, which is said once; what is resumed ends with the same bits."""
    models, optimizers = [], []
    for start in (None, str(tmp_path / "checkpoint-2")):
        model = small_language_model(device)
        run = trainer(model, tmp_path, device, {"optim": "adamw_8bit"})
        run.train(resume_from_checkpoint=start)
        models.append(model)
        optimizers.append(inner(run.optimizer))
    precisions = {name: optimizers[0].precision(p) for name, p in models[0].named_parameters()}
    assert type(optimizers[0]) is optim8.AdamW8bit
    assert precisions["model.embed_tokens.weight"] == "32bit"
    assert precisions["model.layers.0.mlp.up_proj.weight"] == "8bit"
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert bits(p) == bits(q)
        assert state_bits(optimizers[0], p) == state_bits(optimizers[1], q)
    said = capsys.readouterr().err
    assert said.count("optim8: embeddings have 32-bit state, as in the Trainer with bitsandbytes: 1 of them") == 1
    assert said.count("optim8: optim='adamw_8bit' is optim8.optim.AdamW8bit.") == 1
    with optim8.override(models[0].model.embed_tokens, optim_bits=8):
        assert optimizers[0].precision(models[0].model.embed_tokens.weight) == "8bit"


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("optim", ADAMW_8BIT)
def test_embeddings_follow_the_rule_of_the_name(optim: str, tmp_path: Path, device: torch.device) -> None:
    model = small_language_model(device)
    optimizer = inner(trainer(model, tmp_path, device, {"optim": optim}).create_optimizer())
    expected = "8bit" if optim == "adamw_torch_8bit" else "32bit"
    assert optimizer.precision(model.model.embed_tokens.weight) == expected
