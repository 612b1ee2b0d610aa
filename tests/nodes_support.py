"""Several machines, in one: agents of torchrun with one rendezvous, or tasks of a SLURM job."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from support import ROOT, TINY, start


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def started(
    *command: str, overrides: tuple[str, ...], variables: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Starts a command with the overrides of a tiny run on CPUs; it can import from ``tests``."""
    environment = os.environ | {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = [*command, *TINY, "trainer=ddp", "trainer.accelerator=cpu", *overrides]
    return start(words, environment | dict(variables or {}))


def agent(
    port: int, *options: str, overrides: tuple[str, ...], variables: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Starts torchrun as on one machine, with one process and the rendezvous at this port."""
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=1", "--rdzv-backend=c10d")
    where = f"--rdzv-endpoint=127.0.0.1:{port}"
    command = (sys.executable, *torchrun, where, *options, str(ROOT / "train.py"))
    return started(*command, overrides=overrides, variables=variables)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def recording(folder: Path, *, kill_at: int | None = None, hold_at: int | None = None) -> str:
    """An override that adds a RowRecorder."""
    folder.mkdir(exist_ok=True)
    kill, hold = ("null" if at is None else at for at in (kill_at, hold_at))
    return f"+callbacks.rows={{_target_:row_recorder.RowRecorder,folder:'{folder}',kill_at:{kill},hold_at:{hold}}}"
