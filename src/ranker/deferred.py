"""Packages that are imported in part, so that the first step of a run does not wait for what it does not use.

``import pytorch_lightning`` imports all of torchmetrics, with scipy and its metrics for images, sound and text, and
``wandb.init`` imports all of W&B Launch. Both only need a few names. :func:`defer` makes such a package importable
without running its ``__init__``: a name that is known, or a submodule, is imported alone, and any other name runs
``__init__`` first. Code that uses more of the package notices nothing but the time that this takes.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def _from(module: str, name: str, *, first: str = "") -> Callable[[], Any]:
    def get() -> Any:
        if first:
            importlib.import_module(first)
        return getattr(importlib.import_module(module), name)

    return get


# torchmetrics.metric and torchmetrics.utilities import each other, and only one order works.
_UTILITIES = "torchmetrics.utilities"
# Package: the names that are asked for at the start, and where they come from.
PACKAGES: dict[str, dict[str, Callable[[], Any]]] = {
    "torchmetrics": {
        "__version__": _from("torchmetrics.__about__", "__version__"),
        "_logger": lambda: logging.getLogger("torchmetrics"),
        "Metric": _from("torchmetrics.metric", "Metric", first=_UTILITIES),
        "MetricCollection": _from("torchmetrics.collections", "MetricCollection", first=_UTILITIES),
    },
    "torchmetrics.functional": {},
    "wandb.sdk.launch": {},
}


class _Deferred(ModuleType):
    """A package whose ``__init__`` has not run."""

    def __getattr__(self, name: str) -> Any:
        package, known = self.__name__, self.__dict__["_known"]
        if name in known:
            return known[name]()
        if not name.startswith("_") and importlib.util.find_spec(f"{package}.{name}") is not None:
            return importlib.import_module(f"{package}.{name}")
        if name.startswith("__") and name != "__all__":  # what Python looks for in any module
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        self.__class__ = ModuleType  # type: ignore[assignment]  # a module as any other from here on
        assert self.__spec__ is not None
        assert self.__spec__.loader is not None
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def defer() -> None:
    """Makes the packages of ``PACKAGES`` importable in part. Leaves alone what is imported already or not installed."""
    for package, known in PACKAGES.items():
        parent = package.rpartition(".")[0]
        if package in sys.modules or (parent and parent not in sys.modules):
            continue
        spec = importlib.util.find_spec(package)
        if spec is None:
            continue
        module = _Deferred(package)
        module.__dict__["_known"] = known
        module.__spec__, module.__file__ = spec, spec.origin
        module.__path__ = list(spec.submodule_search_locations or [])
        module.__package__, module.__loader__ = package, spec.loader
        sys.modules[package] = module
        if parent:
            setattr(sys.modules[parent], package.rpartition(".")[2], module)
