"""Weak scaling: the same rows a process on 1 and on 2 processes, and what they exchange in a step, by collective.

    python scripts/bench/bench_nodes.py --json results/bench_nodes.json
    python scripts/bench/bench_nodes.py --processes 1,8 --device cuda --rows 8192 scale=paper model=large

Trains through ``train.py`` with ``trainer=ddp``. Each rank counts the calls of torch.distributed in some steps with
torch's profiler: the bytes are those of the tensors that one rank hands over, before what the algorithm makes of them
(a ring all-reduce sends 2 (n - 1) / n times as much). Sparse gradients count by the rows that a rank has.
Other arguments are overrides of train.py. Two minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from bench_report import Line, report

ROOT = Path(__file__).resolve().parents[2]
BYTES = {"float": 4, "double": 8, "long": 8, "long int": 8, "int": 4, "bool": 1, "c10::BFloat16": 2, "c10::Half": 2}


class Traffic(Callback):
    """Counts what a rank hands to torch.distributed in some steps; rank 0 writes ``traffic.json``.

    Args:
        first: step before which it starts; evaluations and checkpoints should not fall into the counted steps.
        steps: number of steps that are counted.
    """

    def __init__(self, *, first: int, steps: int) -> None:
        self._first, self._steps = first, steps
        self._profiler: torch.profiler.profile | None = None
        self._sparse = 0  # bytes of sparse gradients

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watches the gradients of tables before they are exchanged."""
        for parameter in pl_module.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._look)

    def on_train_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Starts and ends the count between two steps."""
        if trainer.global_step == self._first and self._profiler is None:
            self._profiler = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
            )
            self._sparse = 0
            self._profiler.start()
        elif trainer.global_step == self._first + self._steps and self._profiler is not None:
            self._profiler.stop()
            if trainer.is_global_zero:
                self._write(Path(trainer.default_root_dir))
            self._first = -1

    def _look(self, gradient: torch.Tensor) -> None:
        if gradient.is_sparse:
            row = gradient._values()[0].numel() * gradient.element_size() + 8 * gradient.sparse_dim()
            self._sparse += gradient._nnz() * row

    def _write(self, folder: Path) -> None:
        assert self._profiler is not None
        trace = folder / "trace.json"
        self._profiler.export_chrome_trace(str(trace))
        bytes_of, calls_of = Counter[str](), Counter[str]()
        for event in json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]:
            backend, _, name = event.get("name", "").partition(":")
            if backend not in ("gloo", "nccl") or "Input Dims" not in event.get("args", {}):
                continue
            calls_of[name] += 1
            if name.startswith("sparse"):
                continue
            for dims, kind in zip(event["args"]["Input Dims"], event["args"]["Input type"], strict=True):
                if kind in BYTES:
                    bytes_of[name] += BYTES[kind] * int(torch.Size(dims).numel())
        if self._sparse:
            bytes_of["sparse_all_reduce"] = self._sparse
        per_step = {
            name: {"calls": calls_of[name] / self._steps, "bytes": bytes_of[name] / self._steps} for name in calls_of
        }
        (folder / "traffic.json").write_text(json.dumps(per_step), encoding="utf-8")


def train(processes: int, given: argparse.Namespace) -> dict[str, Any]:
    """Rows a second and traffic of one run."""
    first, counted = given.steps // 2, 10
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, str(ROOT / "train.py"), "trainer=ddp", f"trainer.devices={processes}"),
            f"trainer.accelerator={'gpu' if given.device == 'cuda' else 'cpu'}",
            *("logger=none", "train.eval_every=0", "train.progressive=false", "train.checkpoint_every=0"),
            *("callbacks.early_signs.every=0", "train.threads=1"),
            *given.overrides,
            f"scale.batch_size={given.rows * processes}",
            f"train.max_steps={given.steps}",
            f"+callbacks.traffic={{_target_:bench_nodes.Traffic,first:{first},steps:{counted}}}",
            f"hydra.run.dir={folder}",
        ]
        paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit((done.stderr.strip().splitlines() or ["error: the run failed without a word"])[-1])
        summary = json.loads(Path(folder, "summary.json").read_text(encoding="utf-8"))
        traffic = json.loads(Path(folder, "traffic.json").read_text(encoding="utf-8"))
    return {"rows": summary["examples_per_second"], "traffic": traffic}


def measure(given: argparse.Namespace) -> list[Line]:
    """A line for each number of processes and collective."""
    lines, alone = [], None
    for processes in given.processes:
        found = train(processes, given)
        alone = alone or found["rows"] / processes
        lines.append(Line(f"{processes} processes: speed", found["rows"], "rows/s"))
        lines.append(Line(f"{processes} processes: weak scaling", found["rows"] / processes / alone, "ratio"))
        for name, per_step in sorted(found["traffic"].items()):
            lines.append(Line(f"{processes} processes: {name}", per_step["bytes"], "bytes a step and rank"))
            lines.append(Line(f"{processes} processes: calls of {name}", per_step["calls"], "a step"))
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rows", type=int, default=1024, help="rows a step and process")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", type=Path, help="write the rows here")
    given, others = parser.parse_known_args(arguments)
    given.overrides = others
    if given.steps < 30:
        parser.error("--steps must be 30 or more: 10 of them are counted, after a warm-up")
    return report(measure(given), given.json, title=f"{given.rows} rows a process")


if __name__ == "__main__":
    sys.exit(main())
