"""Where the C kernels cannot be made, the step runs in plain torch and says so."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch

import optim
from optim.native import backend, library


@pytest.fixture(params=["no compiler", "no sources", "a compiler that fails"])
def _broken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Take away what the kernels need, and forget that they were ever loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if request.param == "no compiler":
        monkeypatch.setattr(library, "_which", lambda _name: None)
    else:
        monkeypatch.setattr(library, "_which", lambda _name: shutil.which("false"))
    if request.param == "no sources":
        monkeypatch.setattr(library, "_HERE", tmp_path)
    monkeypatch.setattr(backend, "load", library.load.__wrapped__)


def stepped(backend: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    param = torch.nn.Parameter(torch.randn(70_000, generator=generator))
    optimizer = optim.build_optimizer("clippy", [param], lr=0.5, backend=backend)
    for _ in range(2):
        param.grad = torch.randn(70_000, generator=generator)
        optimizer.step()
    return param.detach()


@pytest.mark.usefixtures("_broken")
def test_auto_falls_back_to_plain_torch_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="optim"):
        assert stepped("auto").equal(stepped("eager"))
    assert "run in plain torch, several times slower" in caplog.text


@pytest.mark.usefixtures("_broken")
def test_native_refuses_to_be_something_else() -> None:
    with pytest.raises(ValueError, match="backend 'native' needs a C compiler and found none"):
        stepped("native")
