"""Writes run folders as a sweep would, without training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

RunWriter = Callable[..., Path]


@pytest.fixture
def write_run(tmp_path: Path) -> RunWriter:
    def write(name: str, overrides: list[str], *, status: str = "completed", **metrics: float) -> Path:
        said = dict(o.split("=", 1) for o in overrides)
        folder = tmp_path / "sweep" / name
        (folder / ".hydra").mkdir(parents=True)
        (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))
        summary: dict[str, Any] = {key: said.get(key, "none") for key in ("data", "scale", "model", "optim")}
        summary |= {
            "lr_mult": float(said.get("lr_mult", 1)),
            "seed": int(said.get("seed", 0)),
            "lr": 0.4,
            "status": status,
        }
        summary |= {
            "steps": 10,
            "examples_per_second": 1000.0,
            "seconds": 1.0,
            "batch_size": 256,
            "commit": "abc",
            "machine": "a machine",
        }
        summary |= {"divergence": {"first_step": None, "micro": 0}, "parameters": {"dense": 7}}
        summary["metrics"] = {f"test/{key.replace('__', '/')}": value for key, value in metrics.items()}
        (folder / "summary.json").write_text(json.dumps(summary))
        return folder

    return write
