"""The folder that a run writes: names of its files, how they are written and read, and the keys of a checkpoint."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import shutil
import sys
from collections.abc import Collection, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ranker import trust
from ranker.atomic import write_text
from ranker.errors import UserError
from ranker.runs.checkpoint_files import newest_intact

CONFIG, SUMMARY, EVENTS, METRICS, CHECKPOINTS = (
    "config.yaml",
    "summary.json",
    "events.jsonl",
    "metrics.csv",
    "checkpoints",
)
SKIPPED_ROWS, CAPSULES, SNAPSHOTS = "skipped_rows.csv", "capsules", "snapshots"
SCHEMA, FINGERPRINT = "schema.yaml", "log.json"  # what the run was trained on
TRACKER = "tracker.json"  # id of the run in W&B
# Environment variables that tell the other processes of a run its folder, and the checkpoint that it goes on from.
RUN_DIR_VARIABLE, CHECKPOINT_VARIABLE = "EVENKEEL_RUN_DIR", "EVENKEEL_CHECKPOINT"
# What a run leaves; a new run in the same folder must not mix with it.
LEFT_BY_A_RUN = (CONFIG, SUMMARY, EVENTS, METRICS, CHECKPOINTS, CAPSULES, SNAPSHOTS)
WRITTEN_BESIDE = (SKIPPED_ROWS, SCHEMA, FINGERPRINT, TRACKER)
FINISHED = ("completed", "diverged")  # statuses of a run that has its result; a failed run has none
RECORDED_PACKAGES = ("evenkeel-ranker", "torch", "pytorch-lightning", "hydra-core", "torchmetrics", "polars", "pyarrow")

# Keys of a checkpoint. Lightning chooses the first ones, the names of classes among them.
GLOBAL_STEP, STATE_DICT, DATA_MODULE = "global_step", "state_dict", "RankingDataModule"
CALLBACKS, STABILITY = "callbacks", "Stability"  # of the callbacks, by the name of the class
NET_PREFIX = "net."  # of the model's weights in STATE_DICT
TRAIN_AUC = "train_auc._extra_state"  # in STATE_DICT: histograms of the training AUC, of rank 0
TRAIN_AUC_BY_RANK = "train_auc_by_rank"  # the same of each rank
OPTIMIZER_SETTINGS = "optimizer_settings"  # hyperparameters of each group, as configured
TRACKED = "tracked_rows"  # number of rows that W&B has
AVERAGE = "average"  # moving average of the dense weights, by name within the net
SHARDED = "sharded_tables"  # the tables that lie in a folder beside it, and how they were planned
RECENT = "recent_steps"  # losses and AUCs of the last steps, which metrics.csv may not have


class RunFolder:
    """Names and writes the files of one run.

    ``config.yaml`` (resolved), ``metrics.csv``, ``events.jsonl``, ``summary.json`` and ``checkpoints/``. Files are
    written atomically or appended to, so that a process killed at any moment leaves files that can be read.

    Args:
        path: the folder; made if it is missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).resolve()
        self.path.mkdir(parents=True, exist_ok=True)

    @classmethod
    def existing(cls, path: str | Path) -> RunFolder:
        """The folder of an earlier run.

        Raises:
            UserError: it holds no config.yaml.
        """
        if not (Path(path) / CONFIG).is_file():
            raise UserError(f"no {CONFIG} in {path}; give the folder of an earlier run, such as runs/NAME")
        return cls(path)

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / CHECKPOINTS

    def newest_checkpoint(self) -> Path:
        """The intact checkpoint of the highest step. A line says which damaged ones were passed over.

        Raises:
            UserError: there is none.
        """
        return newest_intact(self.checkpoints, lambda line: print(line, file=sys.stderr, flush=True))

    def last_event(self, kind: str) -> dict[str, Any] | None:
        """The last line of events.jsonl of a kind; None if there is none."""
        path = self.path / EVENTS
        lines = whole_lines(path).decode().splitlines() if path.is_file() else []
        return next((event for event in map(json.loads, reversed(lines)) if event["kind"] == kind), None)

    def make_room(self, *, force: bool) -> None:
        """Refuses a folder that holds a run already, or removes this run's files; those of others stay.

        Raises:
            UserError: it holds a run, and ``force`` is not set.
        """
        found = [self.path / name for name in (*LEFT_BY_A_RUN, *WRITTEN_BESIDE) if (self.path / name).exists()]
        if not force and any(path.name in LEFT_BY_A_RUN for path in found):
            raise UserError(
                f"{self.path} holds a run already; go on with it with resume={self.path}, choose another folder, "
                "or clear it with force=true"
            )
        for path in found if force else ():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def read_config(self) -> DictConfig:
        """The resolved configuration of the run, to look at.

        Raises:
            UserError: as :func:`ranker.trust.read_config`.
        """
        return trust.read_config(self.path / CONFIG)

    def load_config(self, *, trusted: Collection[str] = (), own: DictConfig | None = None) -> DictConfig:
        """The resolved configuration of the run, to build from.

        Args:
            trusted: names of ``_target_`` that the user allows beside the allow list.
            own: the user's own configuration for this command; what it names is allowed.

        Raises:
            UserError: as :func:`ranker.trust.check_targets`.
        """
        cfg = self.read_config()
        trust.check_targets(cfg, self.path / CONFIG, trusted=trusted, own=own)
        return cfg

    def save_config(self, cfg: DictConfig) -> None:
        """Writes the configuration with every interpolation resolved."""
        write_text(self.path / CONFIG, OmegaConf.to_yaml(cfg, resolve=True))

    def save_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json. NaN and infinity become null, because JSON has neither."""
        write_text(self.path / SUMMARY, json.dumps(plain(summary), indent=2, allow_nan=False) + "\n")

    def append_event(self, event: Mapping[str, Any]) -> None:
        """Appends one line to events.jsonl, whole or not at all.

        Raises:
            UserError: it cannot be written, for example because the disk is full.
        """
        path = self.path / EVENTS
        size = path.stat().st_size if path.is_file() else 0
        try:
            with path.open("ab") as file:
                file.write(json.dumps(plain(event), allow_nan=False).encode() + b"\n")
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(path, size)
            raise UserError(
                f"{path} cannot be written: {error.strerror}; free space, then go on with resume={self.path}"
            ) from error

    def keep_events_until(self, step: int) -> None:
        """Drops events after a step. A run that resumes from this step will write them again."""
        path = self.path / EVENTS
        if path.is_file():
            lines = whole_lines(path).decode().splitlines()
            kept = [line for line in lines if _known_at(json.loads(line)) <= step]
            write_text(path, "".join(line + "\n" for line in kept))

    def save_skipped_rows(self, rollbacks: Iterable[tuple[int, Iterable[tuple[int, int]]]]) -> None:
        """Writes skipped_rows.csv: per rollback, ranges start .. stop - 1 of the log's rows that it left out."""
        lines = [f"{number},{start},{stop}\n" for number, ranges in rollbacks for start, stop in ranges]
        write_text(self.path / SKIPPED_ROWS, "".join(["rollback,start,stop\n", *lines]))


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The summary of a run that ended; None if there is none, or if the file is not one."""
    try:
        found = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "status" in found else None


def whole_lines(path: Path) -> bytes:
    """The content of a file that is appended to, without a last line that was cut off when a process was killed."""
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]


def _known_at(event: Mapping[str, Any]) -> int:
    """The step at which an event was written: for a divergence the step of the verdict, not its first step."""
    return int(event.get("judged_at", event.get("step", 0)))


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's numbers."""
    found = {"python": platform.python_version()}
    for name in RECORDED_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def plain(value: Any) -> Any:
    """The value with the types of JSON: NaN and infinity become null, tuples become lists."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
