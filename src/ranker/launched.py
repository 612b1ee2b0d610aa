"""What torchrun or srun tells the processes that it starts. Without either, rank 0 starts the other ranks itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_NO_STEP = 0xFFFFFFF0  # from here on SLURM numbers what is no step of srun, such as the batch script


@dataclass(frozen=True)
class Launch:
    """What a launcher has told one of the processes that it started.

    Attributes:
        program: ``torchrun`` or ``srun``.
        rank: number of this process.
        size: number of processes of all machines.
        local_size: number of processes of this machine.
        scratch: folder that lives as long as this machine's torchrun agent; None under srun.
    """

    program: str
    rank: int
    size: int
    local_size: int
    scratch: Path | None = None

    @property
    def nodes(self) -> int:
        """Number of machines."""
        return self.size // self.local_size


def launch(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """The launcher of this process; None if it was started by hand, by a sweep or by rank 0.

    A process of an interactive SLURM job counts as started by hand, as it does for Lightning, and so does the batch
    script of a job: only srun sets the number of a step.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        agent, found, _ = environment.get("TORCHELASTIC_ERROR_FILE", "").partition("/attempt_")
        return Launch(
            "torchrun",
            rank=int(environment["RANK"]),
            size=int(environment["WORLD_SIZE"]),
            local_size=int(environment["LOCAL_WORLD_SIZE"]),
            scratch=Path(agent) if found else None,
        )
    size = int(environment.get("SLURM_NTASKS", 1))
    interactive = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")
    step = environment.get("SLURM_STEP_ID", environment.get("SLURM_STEPID", ""))
    if size > 1 and not interactive and step.isdecimal() and int(step) < _NO_STEP:
        nodes = int(environment.get("SLURM_NNODES", 1))
        return Launch("srun", rank=int(environment["SLURM_PROCID"]), size=size, local_size=max(1, size // nodes))
    return None
