"""The models that passed: their exports, the states to train on from, and the pointer to the one that is served.

models/DAY     the export
states/DAY     the run behind it, as ``warm_start`` reads it: config.yaml, schema.yaml, summary.json, a checkpoint
serving        a symbolic link to the export that is served
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ranker.atomic import replacing_folder
from ranker.runs.checkpoint_files import path_of, shards_of, step_of
from ranker.runs.run_folder import CAPSULES, CHECKPOINTS, CONFIG, FINGERPRINT, SCHEMA, SNAPSHOTS, SUMMARY
from ranker.runs.table_files import COPIES, copy_of

SERVING, MODELS, STATES = "serving", "models", "states"


class Shelf:
    """The models of a folder of daily training.

    Args:
        folder: the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for name in (MODELS, STATES):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def model(self, day: str) -> Path:
        """The export of a day."""
        return self._folder / MODELS / day

    def state(self, day: str) -> Path:
        """The training state of a day, a run folder."""
        return self._folder / STATES / day

    @property
    def served(self) -> str | None:
        """The day of the model that is served; None before the first."""
        link = self._folder / SERVING
        return Path(os.readlink(link)).name if link.is_symlink() else None

    def keep_state(self, day: str, run: Path, checkpoint: Path) -> None:
        """Copies what a run needs to be continued, as links where the file system has them."""
        with replacing_folder(self.state(day)) as draft:
            for name in (CONFIG, SCHEMA, FINGERPRINT, SUMMARY):
                if (run / name).is_file():
                    shutil.copyfile(run / name, draft / name)
            folder = draft / CHECKPOINTS
            files = {checkpoint: path_of(folder, step_of(checkpoint))}
            if (copy := copy_of(checkpoint)) is not None:
                files[copy] = folder / COPIES / copy.name
            if (shards := shards_of(checkpoint)).is_dir():
                files |= {
                    path: shards_of(path_of(folder, step_of(checkpoint))) / path.name for path in shards.iterdir()
                }
            for source, target in files.items():
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(source, target)
                except OSError:
                    shutil.copyfile(source, target)

    def serve(self, day: str) -> None:
        """Lets ``serving`` point to the model of a day. Whoever opens it finds the old model or the new one."""
        link, draft = self._folder / SERVING, self._folder / f".{SERVING}.tmp"
        draft.unlink(missing_ok=True)
        os.symlink(Path(MODELS) / day, draft, target_is_directory=True)
        os.replace(draft, link)

    def prune(self, keep: int) -> None:
        """Removes all but the last models and their states. The one that is served stays."""
        for folder in (self._folder / MODELS, self._folder / STATES):
            there = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
            for path in there[:-keep]:
                if path.name != self.served:
                    shutil.rmtree(path)


def free_run(run: Path, *, capsules: bool) -> None:
    """Removes what is large in the folder of a run that is done: checkpoints, snapshots, and capsules of no use."""
    for name in (CHECKPOINTS, SNAPSHOTS, *(() if capsules else (CAPSULES,))):
        shutil.rmtree(run / name, ignore_errors=True)
