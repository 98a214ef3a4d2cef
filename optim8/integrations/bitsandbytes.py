"""`import bitsandbytes` gives optim8: its optimizers, functional API and embedding, under bitsandbytes' names.

What bitsandbytes has and optim8 has not (`nn.Linear4bit`) comes from bitsandbytes where that is installed. Elsewhere
it raises an error that says so.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from importlib import import_module, metadata
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from pathlib import Path
from pkgutil import iter_modules
from threading import RLock
from types import ModuleType
from typing import Any

import optim8
from optim8 import functional, nn, optim
from optim8.integrations.names import optimizers
from optim8.integrations.notice import say
from optim8.optim.absent import ABSENT

NAME = "bitsandbytes"
VERSION = "0.50.2"  # the release whose names and arguments these are; Hugging Face asks for it


def install() -> None:
    """From now on, `import bitsandbytes` gives optim8 in this process and in those that it forks.

    `importlib.metadata.version("bitsandbytes")` is that of the installed package, or `VERSION` where there is none.

    Raises:
        RuntimeError: the program has imported bitsandbytes already.
    """
    if _finder in sys.meta_path:
        return
    if NAME in sys.modules:
        raise RuntimeError(
            "optim8.integrations.bitsandbytes.install: the program has imported bitsandbytes already, and keeps what "
            "it got. Call install() before the first import of bitsandbytes and of what uses it."
        )
    _finder.begin(_names())
    sys.meta_path.insert(0, _finder)


def remove() -> None:
    """End what `install` began: later imports give the installed package."""
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
        _finder.exchange(_finder.installed)


def _names() -> dict[str, dict[str, Any]]:
    """What each module has from optim8. Submodules of optim have the optimizers that those of optim8.optim have; the
    base classes of bitsandbytes' own are left to the package, where it is installed they can be built on."""
    classes = {**optimizers(), **ABSENT}
    modules: dict[str, dict[str, Any]] = {
        NAME: {"matmul_4bit": functional.matmul_4bit},
        f"{NAME}.functional": {name: getattr(functional, name) for name in functional.__all__},
        f"{NAME}.nn": {name: getattr(nn, name) for name in nn.__all__},
        f"{NAME}.nn.modules": {name: getattr(nn, name) for name in nn.__all__},
        f"{NAME}.optim": {**classes, "GlobalOptimManager": optim.GlobalOptimManager},
        f"{NAME}.optim.optimizer": {"GlobalOptimManager": optim.GlobalOptimManager},
    }
    for found in iter_modules(optim.__path__):
        module = vars(import_module(f"{optim.__name__}.{found.name}"))
        own = {name: cls for name, cls in classes.items() if module.get(name) is cls}
        if own:
            modules[f"{NAME}.optim.{found.name}"] = own
    return modules


class _Module(ModuleType):
    """A module of bitsandbytes whose names are optim8's, and beside them those of the installed package."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # whoever looks through all modules must not load the package
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        behind = _finder.behind(self.__name__)
        if behind is not None and hasattr(behind, name):
            return getattr(behind, name)
        raise AttributeError(_missing(f"{self.__name__}.{name}"))


def _missing(dotted: str) -> str:
    if _finder.installed_version is not None:
        return f"{dotted}: neither optim8 nor {NAME} {_finder.installed_version}, which is installed, has it."
    return (
        f"{dotted}: optim8 stands in for {NAME} in this process, and has the optimizers and the functional API, not "
        f"this. Install {NAME}: what optim8 lacks then comes from there. Or run the program without `--as {NAME}`."
    )


class _Distribution(metadata.Distribution):
    """The metadata of a package that is not installed."""

    def read_text(self, filename: str) -> str | None:
        texts = {"METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n", "top_level.txt": f"{NAME}\n"}
        return texts.get(filename)

    def locate_file(self, path: Any) -> Any:
        return Path(__file__).parent / path


class _Finder(metadata.DistributionFinder, Loader):
    """Makes the modules of `names`, finds all others of bitsandbytes in the installed package, and has its metadata."""

    def __init__(self) -> None:
        self.names: dict[str, dict[str, Any]] = {}
        self.installed: dict[str, ModuleType] = {}  # modules of the package whose place in sys.modules ours have
        self.installed_version: str | None = None  # of the package, maybe "unknown"; None where there is none
        self._lock = RLock()
        self._aside = False

    def begin(self, names: dict[str, dict[str, Any]]) -> None:
        """Stand in with these names from now on, before the package if there is one."""
        self.names, self.installed = names, {}
        others = [finder for finder in sys.meta_path if finder is not self]
        found = any(finder.find_spec(NAME, None) is not None for finder in others)
        versions = [distribution.version for distribution in _distributions(others)]
        self.installed_version = [*versions, "unknown"][0] if found else None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if self._aside or fullname.partition(".")[0] != NAME:
            return None
        if fullname in self.names:
            return spec_from_loader(fullname, self, is_package=True, origin="optim8")
        if self.behind(fullname) is None:
            # `from bitsandbytes.nn import Linear4bit` asks for a module too; returning None would lose the advice.
            raise ImportError(_missing(fullname), name=fullname)
        return spec_from_loader(fullname, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.behind(spec.name) if spec.name not in self.names else _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        if name not in self.names:
            return  # `behind` has run it
        vars(module).update(self.names[name], __doc__=__doc__)
        if name == NAME:
            vars(module)["__version__"] = self.installed_version or VERSION
            self._tell()
        for child in [other for other in self.names if other.rpartition(".")[0] == name]:
            import_module(child)  # bitsandbytes has them without an import too

    def _tell(self) -> None:
        rest = f"the rest is that of {NAME} {self.installed_version}" if self.installed_version else "the rest raises"
        what = f"the optimizers and the functional API of optim8 {optim8.__version__}"
        say(f"`import {NAME}` gives {what} (names and arguments of {NAME} {VERSION}); {rest}.")

    def behind(self, name: str) -> ModuleType | None:
        """The module of the installed package, which is imported now if it was not; None where there is none."""
        if self.installed_version is None:
            return None
        with self._lock:
            if name in self.names and name in self.installed:
                return self.installed[name]
            # The package's own imports must find the package. So would another thread that imports it just now.
            ours = self.exchange(self.installed)
            self._aside = True
            try:
                return import_module(name)
            except ModuleNotFoundError as error:
                if error.name != name:
                    raise
                return None
            finally:
                self._aside = False
                self.installed = self.exchange(ours)

    def exchange(self, modules: dict[str, ModuleType]) -> dict[str, ModuleType]:
        """Put these into sys.modules under the names that optim8 has. Returns what stood there."""
        before = {name: sys.modules.pop(name) for name in self.names if name in sys.modules}
        sys.modules.update(modules)
        return before

    def find_distributions(self, context: Any = None) -> Iterable[metadata.Distribution]:
        asked = getattr(context, "name", None)  # None: all that there are
        if self._aside or asked not in (None, NAME) or self.installed_version is not None:
            return []
        return [_Distribution()]


def _distributions(finders: Sequence[Any]) -> Iterable[metadata.Distribution]:
    context = metadata.DistributionFinder.Context(name=NAME)
    for finder in finders:
        yield from getattr(finder, "find_distributions", lambda _: [])(context)


_finder = _Finder()
