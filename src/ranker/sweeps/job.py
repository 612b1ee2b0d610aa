"""One job of a sweep: runs it, resumes an interrupted run, or uses the finished run of an earlier call."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ranker import config, deferred, run_summary, stop_signals
from ranker.atomic import write_text
from ranker.errors import UserError
from ranker.runs import objective, run_lock
from ranker.runs.config_identity import config_hash
from ranker.runs.provenance import cores
from ranker.runs.run_folder import CONFIG, FINISHED, SUMMARY, RunFolder, read_summary
from ranker.sweeps.job_list import is_parallel, jobs_at_a_time
from ranker.sweeps.journal import BEFORE, Journal, duration

OUTPUT, TRACEBACK = "output.txt", "traceback.txt"


def run_job(cfg: DictConfig) -> float | None:
    """Runs a job of a multirun, unless a run with the same configuration is finished in the sweep folder.

    A job that was killed or interrupted resumes from its checkpoint, if there is one. A failed job starts again. An
    error in a job is not raised, so that the other jobs go on: its reason is written to ``summary.json`` and to the
    sweep's journal, and is printed at the end of the sweep. An interruption ends the sweep.

    Returns:
        The metric that a sweep maximises; None if the job failed.
    """
    hydra = HydraConfig.get()
    job, folder, sweep_dir = hydra.job.num, Path(hydra.runtime.output_dir), Path(hydra.sweep.dir)
    journal, mark = Journal(sweep_dir), config_hash(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    with run_lock.held(folder, wait=True):  # duplicate jobs, or two sweeps at once, run one after the other
        found = [] if cfg.resume else previous_runs(sweep_dir, mark)
        done = next(((run, summary) for run, summary in found if summary["status"] in FINISHED), None)
        in_group = journal.read().states.get(job) in FINISHED  # a moment ago, see ranker.sweeps.vectorize
        if done and (in_group or not cfg.force):
            run, summary = done
            if not in_group:
                journal.add(job, BEFORE, run=run)
                print(f"job {job}: done before, {summary['status']}, in {run} (force=true runs it again)", flush=True)
            return objective.value_of(summary, cfg.objective)
        journal.add(job, "started", run=folder)
        start = time.monotonic()
        try:
            checkpoint = None if cfg.resume or cfg.force else checkpoint_to_resume(folder, mark)
            if cfg.resume is None and checkpoint is None:
                clear(folder, mark, [run for run, _ in found])
            summary, value = _train(cfg, folder, checkpoint)
        except Exception as error:
            reason = _write_failure(cfg, folder, mark, error, time.monotonic() - start)
            journal.add(job, "failed", run=folder, reason=reason)
            print(f"job {job}: failed: {reason} ({folder})", flush=True)
            return None
        journal.add(job, summary["status"], run=folder)
        if stop_signals.received():  # too late for this job; the next one must not start
            raise stop_signals.Stopped
    print(f"job {job}: {summary['status']} in {duration(time.monotonic() - start)} ({folder})", flush=True)
    return value


def _train(cfg: DictConfig, folder: Path, checkpoint: Path | None) -> tuple[dict[str, Any], float]:
    config.check(cfg)
    if checkpoint is not None:
        print(f"resuming from {checkpoint}", flush=True)
    deferred.defer()
    with _beside_others(cfg, folder):
        from ranker.run import run  # imported late: Lightning costs seconds that a job done before need not wait for

        value = run(cfg, checkpoint)
    saved = Path(cfg.resume) if cfg.resume else folder
    return json.loads((saved / SUMMARY).read_text(encoding="utf-8")), value


@contextlib.contextmanager
def _beside_others(cfg: DictConfig, folder: Path) -> Iterator[None]:
    """If jobs run in parallel: limits a job to its share of the cores, and redirects its output to its own folder.

    Progress bars and tables of several jobs would otherwise mix on one terminal.
    """
    hydra = HydraConfig.get()
    if not is_parallel(hydra.launcher):
        yield
        return
    import torch

    share = jobs_at_a_time(hydra.launcher, Journal(hydra.sweep.dir).read().jobs)
    if share and not cfg.train.threads:
        torch.set_num_threads(max(1, cores() // share))
    with (
        (folder / OUTPUT).open("a", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        yield


def _write_failure(cfg: DictConfig, folder: Path, mark: str, error: Exception, seconds: float) -> str:
    """Writes the traceback, and a summary if the run has not written one; returns the reason in one line."""
    known = isinstance(error, UserError)
    reason = config.one_line(error) if known else f"{type(error).__name__}: {' '.join(str(error).split())}"
    run = RunFolder(folder)
    if not known:
        write_text(folder / TRACEBACK, "".join(traceback.format_exception(error)))
    if cfg.resume is None and not (folder / SUMMARY).exists():  # an existing summary was written by the run itself
        run.save_config(cfg)
        run.save_summary(run_summary.never_began(cfg, reason=reason, seconds=seconds) | {"config_hash": mark})
    return reason


def previous_runs(sweep_dir: Path, mark: str) -> list[tuple[Path, dict[str, Any]]]:
    """Folders and summaries of the runs in a sweep folder whose configuration has this hash."""
    found = []
    for path, folders, files in os.walk(sweep_dir):
        if SUMMARY in files:
            folders.clear()  # runs are not nested
            summary = read_summary(Path(path))  # None: another job has just removed it
            if summary is not None and summary.get("config_hash") == mark:
                found.append((Path(path), summary))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
    return found


def checkpoint_to_resume(folder: Path, mark: str) -> Path | None:
    """The checkpoint from which the run in a folder resumes; None if it must start again.

    Only a killed or interrupted run resumes. A failed run may have the cause of its failure in its state.
    """
    run, summary = RunFolder(folder), read_summary(folder)
    if summary and not str(summary.get("reason")).startswith("interrupted"):
        return None
    if not (folder / CONFIG).is_file() or config_hash(run.read_config()) != mark:
        return None
    try:
        return run.newest_checkpoint()
    except UserError:  # there is none, or none is intact
        return None


def clear(folder: Path, mark: str, others: list[Path]) -> None:
    """Removes earlier attempts at a run: the contents of its folder, and other folders with the same configuration.

    Hydra's files in the folder (``.hydra``, the log) belong to the job that is starting, and stay.

    Raises:
        UserError: the folder contains a different run, which would be overwritten.
    """
    if (folder / CONFIG).is_file() and config_hash(RunFolder(folder).read_config()) != mark:
        raise UserError(
            f"{folder} holds another run; add ${{config_hash:}} to hydra.sweep.subdir, so that each has its own folder"
        )
    for entry in folder.iterdir():
        if entry.name in (".hydra", run_lock.LOCK) or entry.suffix == ".log":
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    for other in others:
        if other.resolve() != folder.resolve():
            shutil.rmtree(other)
