"""optim8 under the name of bitsandbytes, where that is installed and where it is not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from integrations_harness import last_json, python
from support.stand_in import stand_in, write_package

import optim8
from optim8.integrations import bitsandbytes, notice

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def alone() -> Iterator[None]:
    with stand_in():
        yield


@pytest.fixture
def beside(tmp_path: Path) -> Iterator[Path]:
    with stand_in(write_package(tmp_path)):
        yield tmp_path


def theirs(dotted: str) -> Any:
    __import__(dotted)
    return sys.modules[dotted]


@pytest.mark.usefixtures("alone")
def test_what_optim8_has() -> None:
    import bitsandbytes as bnb
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn.modules import StableEmbedding
    from bitsandbytes.optim import AdamW, Lion, PytorchLARS, RMSprop
    from bitsandbytes.optim.adamw import PagedAdamW32bit
    from bitsandbytes.optim.optimizer import GlobalOptimManager

    assert (AdamW, Lion, RMSprop) == (optim8.optim.AdamW, optim8.optim.Lion, optim8.optim.RMSprop)
    assert PagedAdamW32bit is bnb.optim.PagedAdamW32bit is bnb.optim.adamw.PagedAdamW32bit
    assert bnb.optim.lars.PytorchLARS is PytorchLARS
    assert bnb.nn.StableEmbedding is StableEmbedding is optim8.nn.StableEmbedding
    assert GlobalOptimManager is optim8.optim.GlobalOptimManager
    assert bnb.matmul_4bit is bnb.functional.matmul_4bit is optim8.functional.matmul_4bit
    assert QuantState is optim8.functional.QuantState
    modules = [name for name, value in vars(bnb.optim).items() if isinstance(value, type(sys))]
    expected = ["adagrad", "adam", "adamw", "ademamix", "lamb", "lars", "lion", "optimizer", "rmsprop", "sgd"]
    assert set(expected) <= set(modules)
    assert "blockwiseoptimizer" not in modules


@pytest.mark.usefixtures("alone")
def test_metadata_where_nothing_is_installed() -> None:
    assert importlib.util.find_spec("bitsandbytes") is not None
    assert theirs("bitsandbytes").__version__ == bitsandbytes.VERSION
    assert bitsandbytes._Distribution().metadata["Name"] == "bitsandbytes"
    named = {found.version for found in bitsandbytes._distributions([bitsandbytes._finder])}
    assert named == {bitsandbytes.VERSION}
    assert "bitsandbytes" in importlib.metadata.packages_distributions()


def test_the_version_is_that_which_the_tests_compare_with() -> None:
    assert f"bitsandbytes=={bitsandbytes.VERSION}\n" in (ROOT / "constraints.txt").read_text()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    "code, error",
    [
        ("bnb.nn.Linear4bit", AttributeError),
        ("from bitsandbytes.nn import Linear4bit", ImportError),
        ("from bitsandbytes.nn.modules import Params4bit", ImportError),
        ("from bitsandbytes.optim.optimizer import Optimizer2State", ImportError),
        ("from bitsandbytes.functional import lib", ImportError),
        ("import bitsandbytes.cextension", ImportError),
    ],
)
def test_what_optim8_lacks_says_what_to_do(code: str, error: type[Exception]) -> None:
    with pytest.raises(
        error, match=r"optim8 stands in for bitsandbytes .* Install bitsandbytes: .* Or run the program without"
    ):
        exec(f"import bitsandbytes as bnb\n{code}", {})
    assert not hasattr(theirs("bitsandbytes.nn"), "Linear4bit")  # as PEFT asks


def test_what_optim8_lacks_comes_from_the_package(beside: Path) -> None:
    import bitsandbytes as bnb
    from bitsandbytes.nn import Linear4bit

    assert bnb.optim.AdamW8bit is optim8.AdamW8bit
    assert bnb.functional.quantize_blockwise is optim8.functional.quantize_blockwise
    assert bnb.nn.StableEmbedding is optim8.nn.StableEmbedding
    assert bnb.beside == 1
    assert bnb.functional.gone.__module__ == "bitsandbytes.functional"
    assert pickle.loads(pickle.dumps(Linear4bit)) is Linear4bit is bnb.nn.modules.Linear4bit
    inside = Linear4bit().quantize()
    assert {function.__code__.co_filename for function in inside} == {str(beside / "bitsandbytes" / "functional.py")}
    assert theirs("bitsandbytes.cextension").lib == "theirs"
    assert theirs("bitsandbytes") is bnb  # ours is in its place again
    with pytest.raises(ImportError, match=r"nowhere: neither optim8 nor bitsandbytes 9\.9, which is installed, has it"):
        theirs("bitsandbytes.nowhere")
    with pytest.raises(AttributeError, match="neither optim8 nor"):
        bnb.nn.nothing  # noqa: B018


def test_metadata_is_that_of_the_package(beside: Path) -> None:
    assert importlib.metadata.version("bitsandbytes") == theirs("bitsandbytes").__version__ == "9.9"
    assert len(list(importlib.metadata.distributions(name="bitsandbytes", path=[str(beside)]))) == 1
    assert list(bitsandbytes._distributions([bitsandbytes._finder])) == []


def test_a_package_that_fails_to_load_says_so(beside: Path) -> None:
    (beside / "bitsandbytes" / "nn" / "modules.py").write_text("import no_such_library\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        theirs("bitsandbytes").nn.Linear4bit  # noqa: B018
    assert theirs("bitsandbytes").optim.AdamW8bit is optim8.AdamW8bit


def test_it_ends(beside: Path) -> None:
    assert theirs("bitsandbytes.optim").AdamW8bit is optim8.AdamW8bit
    theirs("bitsandbytes").beside  # noqa: B018  the package is loaded
    bitsandbytes.remove()
    assert theirs("bitsandbytes.optim").AdamW8bit.__module__ == "bitsandbytes.optim"


def test_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", optim8)
    with pytest.raises(RuntimeError, match=r"has imported bitsandbytes already, .* Call install\(\) before"):
        bitsandbytes.install()


@pytest.mark.parametrize("rank, times", [(None, 1), ("0", 1), ("1", 0)])
def test_it_says_once_what_it_replaces(
    rank: str | None, times: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(notice, "_said", set())
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    with stand_in():
        assert capsys.readouterr().err == ""  # nothing is replaced before the program asks
        theirs("bitsandbytes.optim")
    with stand_in():
        theirs("bitsandbytes.nn")
    assert capsys.readouterr().err.count("optim8: `import bitsandbytes` gives") == times


# Layers of the package that are in 4 bits, and the functional API of optim8 on what they hold.
REAL = """
import json
import bitsandbytes as bnb, torch
layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4")
layer.to("cpu")
weight = layer.weight
values = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
again, state = bnb.functional.quantize_4bit(values, quant_type="nf4")
x = torch.randn(2, 64)
print(json.dumps([
    type(weight).__module__,
    bnb.functional.dequantize_4bit.__module__,
    torch.allclose(layer(x), x @ values.t() + layer.bias, atol=1e-4),
    torch.equal(again, weight.data),
]))
"""


@pytest.mark.peers
def test_layers_of_bitsandbytes_itself(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    (tmp_path / "program.py").write_text(REAL)
    answer = last_json(python("-m", "optim8", "run", "--as", "bitsandbytes", "program.py", folder=tmp_path))
    assert answer == ["bitsandbytes.nn.modules", "optim8.functional.fourbit", True, True]
