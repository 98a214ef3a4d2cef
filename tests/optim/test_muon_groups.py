"""optim8.muon_groups: which parameters of a model are hidden matrices."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

import optim8


class Experts(nn.Module):
    """Expert matrices in one parameter each, as in models of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 4
        self.gate_up_proj = nn.Parameter(torch.randn(4, 8, 32))
        self.down_proj = nn.Parameter(torch.randn(4, 16, 8))
        self.scale = nn.Parameter(torch.randn(1, 4, 8))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.output = nn.Linear(8, 8)  # no head: it is in a repeated block
        self.norm = nn.LayerNorm(8)
        self.experts = Experts()
        self.conv = nn.Conv1d(8, 8, 3)


class Model(nn.Module):
    def __init__(self, head: str = "lm_head", tied: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, 8)
        self.positions = nn.Parameter(torch.randn(1, 10, 8))
        if head:
            self.add_module(head, nn.Linear(8, 20, bias=False))  # registered before the blocks
        if tied:
            self.get_submodule(head).weight = self.tokens.weight
        self.blocks = nn.ModuleList([Block()])
        self.bag = optim8.nn.StableEmbedding(20, 8)


HIDDEN = {
    "blocks.0.attention.in_proj_weight",
    "blocks.0.attention.out_proj.weight",
    "blocks.0.output.weight",
    "blocks.0.experts.gate_up_proj",
    "blocks.0.experts.down_proj",
}


def hidden(groups: list[dict[str, Any]]) -> set[str]:
    return {name for group in groups if group["use_muon"] for name, _ in group["params"]}


def check(model: nn.Module, **options: Any) -> set[str]:
    """What is found for Muon; everything else must be in the other group, each parameter once."""
    groups = optim8.muon_groups(model, **options)
    got = [pair for group in groups for pair in group["params"]]
    assert {name: id(param) for name, param in got} == {name: id(param) for name, param in model.named_parameters()}
    assert len(got) == len({id(param) for _, param in got})
    found = hidden(groups)
    optim8.Muon8bit(groups)  # puts lists of tensors into the place of the names
    return found


@pytest.mark.parametrize("head", ["lm_head", "head", "output", "classifier"])
def test_layers_decide(head: str) -> None:
    assert check(Model(head)) == HIDDEN


def test_a_tied_head_is_an_embedding() -> None:
    assert check(Model("decoder", tied=True)) == HIDDEN


def test_without_a_head_that_is_known_the_last_linear_is_one() -> None:
    assert check(Model("")) == HIDDEN - {"blocks.0.output.weight"}
    assert check(Model(""), hidden=["blocks.0.output"]) == HIDDEN
    assert check(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))) == {"0.weight"}
    assert check(nn.Sequential(nn.LayerNorm(4))) == set()


def test_a_head_of_several_layers_has_one_last() -> None:
    layers = OrderedDict(body=nn.Linear(4, 4), classifier=nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)))
    assert check(nn.Sequential(layers)) == {"body.weight", "classifier.0.weight"}


def test_the_model_says_what_its_head_is() -> None:
    class Told(Model):
        def get_output_embeddings(self) -> Any:
            return self.vocabulary

    assert check(Told("vocabulary")) == HIDDEN
    assert check(Model("vocabulary")) == HIDDEN - {"blocks.0.output.weight"} | {"vocabulary.weight"}


def test_transformers_conv1d_is_a_linear_layer() -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(8, 24)), nn.Parameter(torch.zeros(24))

    assert check(nn.Sequential(OrderedDict(c_attn=Conv1D(), lm_head=nn.Linear(8, 9)))) == {"c_attn.weight"}


def test_separate_projections_of_attention() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2, kdim=4, vdim=6), nn.Linear(8, 3))
    assert check(model) == {f"0.{part}_proj_weight" for part in "qkv"} | {"0.out_proj.weight"}


def test_corrections() -> None:
    assert check(Model(), apart=["blocks.0.experts"]) == {name for name in HIDDEN if "experts" not in name}
    assert check(Model(), apart=["blocks"], hidden=["blocks.0.output"]) == {"blocks.0.output.weight"}
    assert check(Model(), hidden=["lm_head.weight"]) == HIDDEN | {"lm_head.weight"}
    assert check(Model(), hidden=["blocks.0.conv"]) == HIDDEN | {"blocks.0.conv.weight"}, "as the caller says"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hidden": ["block"]}, "'block' must be the name of a parameter or of a module"),
        ({"apart": ["lm_head.bias"]}, "'lm_head.bias' must be the name"),
        ({"hidden": ["blocks.0.norm"]}, r"'blocks.0.norm' in hidden must be or have a matrix.*got \(8,\)"),
        ({"hidden": ["tokens"], "apart": ["tokens"]}, "'tokens' stands in hidden and in apart"),
    ],
)
def test_what_fits_nothing_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim8.muon_groups(Model(), **options)


def test_options_of_the_groups() -> None:
    groups = optim8.muon_groups(Model(), lr=0.02, adamw={"lr": 3e-4, "eps": 1e-10})
    assert [group["lr"] for group in groups] == [0.02, 3e-4]
    assert (groups[1]["betas"], groups[1]["eps"]) == ((0.9, 0.999), 1e-10)
    optimizer = optim8.Muon8bit(groups)
    assert [group["use_muon"] for group in optimizer.param_groups] == [True, False]
    assert optimizer.param_groups[0]["param_names"][0] == "blocks.0.attention.in_proj_weight"
