"""What the framework adds to a step: python scripts/bench/bench_step.py [--json FILE] [--models small large].

A bare torch loop (forward pass, loss, backward pass, optimizer) over batches that lie in memory, and ``train.py`` over
the same batches of the synthetic stream with everything on that is on by default: reading, metrics, divergence watch,
snapshots, early signs, checkpoints and W&B offline. Same net, loss, optimizer, learning rate and threads. Evaluations
on the hold-out are left out: how often to evaluate is the user's choice.

A third one is ``train.py train.progressive=false``: scoring every window before it is trained on is a second forward
pass over every row, arithmetic that no loop can save.

Each is a process, and they take turns: while one trains on some steps, the others are stopped. A round is 100 steps
of each, so that it has its share of what comes once in many steps (20 with more than 1,024 rows, where such things
weigh little). A ratio is the median over rounds. Beside wall time stands the CPU time of the training thread, which
other work on the machine disturbs less. What the reading thread and W&B do is in the CPU time of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step_clock import CLOCKS, Turns

if TYPE_CHECKING:
    from omegaconf import DictConfig

ROOT = Path(__file__).resolve().parents[2]
LABELS = {"small": "Small", "large": "Large", "large_dcn": "Large+DCN", "moe": "MMoE", "ple": "PLE"}
BATCHES = (64, 256, 1024, 4096)
# Ratios: of Small, and of the others.
GOALS = {256: (1.15, 1.05), 1024: (1.10, 1.03)}
WARM = 20  # first steps, which are not measured; a round then ends with the checkpoint of its last step
HELD = 64  # batches in memory, used in turns


def net_and_batches(overrides: Sequence[str]) -> tuple[Any, DictConfig, list[Any]]:
    """The module of a run in training mode, its configuration, and batches that lie in memory."""
    import torch
    from hydra import compose, initialize_config_dir

    from ranker import config
    from ranker.data.datamodule import RankingDataModule
    from ranker.parts import build_module, open_log

    config.register()
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        cfg = compose("config", overrides=list(overrides))
    torch.manual_seed(cfg.seed)
    torch.set_num_threads(cfg.train.threads or torch.get_num_threads())
    log = open_log(cfg)
    module = build_module(cfg, log.schema)
    data = RankingDataModule(
        log,
        batch_size=cfg.scale.batch_size,
        window=cfg.data.window,
        seed=cfg.seed,
        num_workers=cfg.data.num_workers,
        dense_statistics=cfg.data.dense_statistics,
    )
    module.start_heads(data)
    module.net.train()
    return module, cfg, [batch for _, batch in zip(range(HELD), data.train_dataloader(), strict=False)]


def bare(overrides: Sequence[str], turns: Turns) -> None:
    """The bare loop, until it is ended."""
    module, cfg, batches = net_and_batches(overrides)
    optimizer = module.make_optimizer()
    for step in count():
        turns.before_step()
        batch = batches[step % len(batches)]
        rate = module.lr * min(1.0, (step + 1) / max(1, cfg.train.warmup_steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        module.loss(module.net(batch), batch.labels_BT, batch.mask_BT).total.backward()
        optimizer.step()


class Process:
    """A process that takes turns; it is stopped while it is not its own.

    Args:
        command: of the process; the number of a socket is put in for ``FD``.
        threads: of torch.
    """

    def __init__(self, command: Sequence[str], *, threads: int) -> None:
        self._command = " ".join(command)
        ours, theirs = socket.socketpair()
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "WANDB_MODE": "offline"}
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it lives as long as the process
        self._process = subprocess.Popen(
            [part.replace("FD", str(theirs.fileno())) for part in command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=self._said,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self._socket, self._lines = ours, ours.makefile("r")

    def wait(self) -> list[float]:
        """Waits for the end of its turn, and stops it; seconds per step by clock.

        Raises:
            RuntimeError: it has ended; the last line that it wrote says why.
        """
        line = self._lines.readline()
        if not line:
            self._process.wait()
            self._said.seek(0)
            said = self._said.read().strip().splitlines() or ["it said nothing"]
            raise RuntimeError(f"{self._command} ended: {said[-1]}")
        self._process.send_signal(signal.SIGSTOP)
        took: list[float] = json.loads(line)
        return took

    def go(self) -> None:
        """Gives it a turn."""
        self._process.send_signal(signal.SIGCONT)
        self._socket.send(b".")

    def end(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait()
        for thing in (self._lines, self._socket, self._said):
            thing.close()


def measure(model: str, batch: int, given: argparse.Namespace) -> dict[str, Any]:
    """The row of one model and batch size."""
    steps = 100 if batch <= 1024 else 20
    block = max(5, min(steps, 12_800 // batch))
    overrides = [
        f"model={model}",
        f"scale.batch_size={batch}",
        f"train.threads={given.threads}",
        "train.eval_every=0",
        *given.overrides,
    ]
    if not any(part.startswith("data=") for part in given.overrides):
        overrides.append(f"data.log.train_rows={(WARM + (given.rounds + 1) * steps) * batch + 50_000}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        clock = [f"+callbacks.clock.{name}={value}" for name, value in (("fd", "FD"), ("skip", WARM), ("block", block))]
        clock.append("+callbacks.clock._target_=step_clock.StepClock")
        train = [sys.executable, "train.py", *overrides, *clock]
        commands = {
            "bare": [sys.executable, __file__, "--bare", "FD", str(block), *overrides],
            "train": [*train, f"hydra.run.dir={folder}/train"],
            "train_without_progressive": [*train, "train.progressive=false", f"hydra.run.dir={folder}/without"],
        }
        processes = {name: Process(command, threads=given.threads) for name, command in commands.items()}
        try:
            found = rounds(processes, blocks=steps // block, given=given)
        finally:
            for process in processes.values():
                process.end()
    return summary(model, batch, found)


def rounds(processes: Mapping[str, Process], *, blocks: int, given: argparse.Namespace) -> list[dict[str, list[float]]]:
    """Seconds per step by clock, of each process in each round."""
    for process in processes.values():
        process.wait()  # until it has warmed up
    started = time.monotonic()
    found: list[dict[str, list[float]]] = []
    while len(found) < given.rounds and (not found or time.monotonic() - started < given.seconds):
        taken: dict[str, list[list[float]]] = {name: [] for name in processes}
        for _ in range(blocks):
            for name, process in processes.items():
                process.go()
                taken[name].append(process.wait())
        found.append({name: list(map(statistics.mean, zip(*of, strict=True))) for name, of in taken.items()})
    return found


def summary(model: str, batch: int, found: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """Medians over rounds: milliseconds of a step, and ratios to the bare loop."""
    row: dict[str, Any] = {"model": model, "batch": batch, "rounds": len(found)}
    for name in found[0]:
        for k, clock in enumerate(CLOCKS):
            row[f"{name}_{clock}_ms"] = 1e3 * statistics.median(times[name][k] for times in found)
            if name != "bare" and clock != "process":
                row[f"{name}_{clock}_ratio"] = statistics.median(times[name][k] / times["bare"][k] for times in found)
    return row


def goal(row: Mapping[str, Any]) -> float | None:
    """The largest ratio that is wanted; None where none is named."""
    return GOALS[row["batch"]][row["model"] != "small"] if row["batch"] in GOALS else None


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of the docs."""
    columns = (
        "model | rows | bare loop, ms | train.py / bare, CPU | wall | without progressive, CPU | wall | goal | rounds"
    )
    made = [f"| {columns} |", "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for row in rows:
        ratios = [
            f"{row[f'{name}_{clock}_ratio']:.2f}"
            for name in ("train", "train_without_progressive")
            for clock in ("thread", "wall")
        ]
        wanted = "" if goal(row) is None else f"{goal(row):.2f}"
        cells = [LABELS[row["model"]], f"{row['batch']:,}", f"{row['bare_thread_ms']:.2f}", *ratios, wanted]
        made.append("| " + " | ".join([*cells, str(row["rounds"])]) + " |")
    return "\n".join(made)


def main() -> int:
    """Measures and reports; exit status 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of train.py, for both")
    parser.add_argument("--bare", nargs=2, type=int, metavar=("FD", "BLOCK"), help=argparse.SUPPRESS)
    parser.add_argument("--models", nargs="+", choices=LABELS, default=list(LABELS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--rounds", type=int, default=15, help="of a row, at most")
    parser.add_argument("--seconds", type=float, default=30.0, help="of a row, but at least one round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where the rows go")
    given = parser.parse_intermixed_args()
    if given.bare:
        bare(given.overrides, Turns(fd=given.bare[0], skip=WARM, block=given.bare[1]))
        return 0
    rows = []
    for model in given.models:
        for batch in given.batches:
            rows.append(measure(model, batch, given))
            print(markdown(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
            if given.json:  # after each row: the next one may be interrupted
                given.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print(markdown(rows))
    return int(any((wanted := goal(row)) is not None and row["train_thread_ratio"] > wanted for row in rows))


if __name__ == "__main__":
    sys.exit(main())
