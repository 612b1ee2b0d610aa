"""One job of a sweep: run it, or take what an earlier call of the sweep left."""

from __future__ import annotations

import contextlib
import json
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ranker import config, run_summary
from ranker.errors import UserError
from ranker.runs.config_identity import config_hash
from ranker.runs.provenance import cores
from ranker.runs.run_folder import SUMMARY, RunFolder
from ranker.sweeps import previous_runs
from ranker.sweeps.journal import BEFORE, Journal, duration
from ranker.sweeps.launchers import is_parallel, jobs_at_a_time

OUTPUT, TRACEBACK = "output.txt", "traceback.txt"


def run_job(cfg: DictConfig) -> float | None:
    """Runs a job of a multirun, unless a run of the same configuration is finished under the sweep's folder.

    A job that was killed or interrupted goes on from its checkpoint, where it has one; one that failed starts afresh.
    A job that fails does not raise: the others go on, its reason is in its ``summary.json`` and in the sweep's
    journal, and the account at the end lists it. An interruption ends the sweep.

    Returns:
        The metric a sweep maximises; None where the job failed.
    """
    hydra = HydraConfig.get()
    job, folder, sweep_dir = hydra.job.num, Path(hydra.runtime.output_dir), Path(hydra.sweep.dir)
    journal, mark = Journal(sweep_dir), config_hash(cfg)
    with previous_runs.alone(folder):
        found = [] if cfg.resume else previous_runs.attempts(sweep_dir, mark)
        done = next(((run, summary) for run, summary in found if summary["status"] in previous_runs.FINISHED), None)
        if done and not cfg.force:
            run, summary = done
            journal.add(job, BEFORE, run=run)
            print(f"job {job}: done before, {summary['status']}, in {run} (force=true does it again)", flush=True)
            return run_summary.objective(summary, cfg.objective)
        journal.add(job, "started", run=folder)
        start = time.monotonic()
        try:
            checkpoint = None if cfg.resume or cfg.force else previous_runs.left_off_at(folder, mark)
            if cfg.resume is None and checkpoint is None:
                previous_runs.make_room(folder, mark, [run for run, _ in found])
            summary, value = _train(cfg, folder, checkpoint)
        except Exception as error:
            reason = _write_failure(cfg, folder, mark, error, time.monotonic() - start)
            journal.add(job, "failed", run=folder, reason=reason)
            print(f"job {job}: failed: {reason} ({folder})", flush=True)
            return None
        journal.add(job, summary["status"], run=folder)
    print(f"job {job}: {summary['status']} in {duration(time.monotonic() - start)} ({folder})", flush=True)
    return value


def _train(cfg: DictConfig, folder: Path, checkpoint: Path | None) -> tuple[dict[str, Any], float]:
    config.check(cfg)
    if checkpoint is not None:
        print(f"goes on from {checkpoint}", flush=True)
    with _beside_others(cfg, folder):
        from ranker.run import run  # imported late: Lightning costs seconds that a job done before need not wait for

        value = run(cfg, checkpoint)
    saved = Path(cfg.resume) if cfg.resume else folder
    return json.loads((saved / SUMMARY).read_text(encoding="utf-8")), value


@contextlib.contextmanager
def _beside_others(cfg: DictConfig, folder: Path) -> Iterator[None]:
    """Among jobs that run side by side: its share of the cores, and its words into its own folder.

    Bars and tables of several jobs on one terminal would tear each other.
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
    """Writes down why a job failed, where the run itself did not get as far, and returns it in one line."""
    known = isinstance(error, UserError)
    reason = config.one_line(error) if known else f"{type(error).__name__}: {' '.join(str(error).split())}"
    run = RunFolder(folder)
    if not known:
        (folder / TRACEBACK).write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    if cfg.resume is None and not (folder / SUMMARY).exists():  # a summary that exists is the run's own, or another's
        run.save_config(cfg)
        run.save_summary(run_summary.never_began(cfg, reason=reason, seconds=seconds) | {"config_hash": mark})
    return reason
