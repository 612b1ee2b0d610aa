"""Shared by all tests: one thread a process, where the data lie, and the command line in process."""

from __future__ import annotations

import gc
import importlib.util
import os
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch

from support import ROOT, TINY, Finished, end_processes, finished


def pytest_configure() -> None:
    gc.disable()  # until the tests are collected: what is imported stays, so there is nothing to find
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["WANDB_MODE"] = "offline"


def pytest_collection_finish() -> None:
    """What is there now stays until the end, so the garbage collector looks only through what tests make."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Time ends an attack only where it hangs: on a busy machine it takes long, which its own limits know."""
    for item in items:
        if item.get_closest_marker("attack"):
            item.add_marker(pytest.mark.timeout(3600), append=False)


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """A test that fails or runs out of time leaves no run behind, which would slow down all that come later."""
    yield
    end_processes()


@pytest.fixture(scope="session")
def kuairand_source() -> Path:
    """The KuaiRand-Pure slice; tests that need it are skipped where it is not."""
    folder = Path(os.environ.get("EVENKEEL_DATA", ROOT.parent / "shared" / "data")) / "kuairand_pure_slice"
    if not folder.is_dir():
        pytest.skip(f"no KuaiRand files at {folder}; EVENKEEL_DATA names another folder")
    return folder


@pytest.fixture(scope="session")
def command_line() -> Callable[..., None]:
    """Runs train.py in this process, as if typed: quicker than a subprocess by the time of the imports."""

    def call(*overrides: str) -> None:
        argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
        sys.argv = [str(ROOT / "train.py"), *overrides]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        finally:
            sys.argv = argv
            os.environ.pop("HYDRA_FULL_ERROR", None)
            if full_error is not None:
                os.environ["HYDRA_FULL_ERROR"] = full_error

    return call


@pytest.fixture(scope="session")
def train_tiny(command_line: Callable[..., None]) -> Callable[..., Finished]:
    """Trains a tiny run into a folder and reads what it left."""

    def call(folder: Path, *overrides: str) -> Finished:
        command_line(*TINY, f"hydra.run.dir={folder}", *overrides)
        return finished(folder)

    return call


@pytest.fixture
def load_script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a file of scripts/ or scripts/bench/ by its name."""

    def load(name: str) -> ModuleType:
        file = next((ROOT / "scripts").rglob(f"{name}.py"))
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up
        monkeypatch.syspath_prepend(file.parent)  # as for a script that is run: it may import its neighbours
        spec.loader.exec_module(module)
        return module

    return load
