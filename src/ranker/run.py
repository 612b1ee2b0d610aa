"""One run from configuration to summary.json."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from omegaconf import DictConfig

from ranker import run_summary
from ranker.build import Run, build, open_folder, own_process_environment
from ranker.runs import provenance
from ranker.training import trackers


def run(cfg: DictConfig, checkpoint: Path | None = None) -> float:
    """Builds, fits, evaluates and sums up a run.

    A lost model is an experiment's outcome: the run ends normally with status ``diverged``. A crash or an
    interruption is written down as ``failed`` and raised again.

    Args:
        cfg: the configuration.
        checkpoint: of an earlier attempt at the same run in the same folder, to go on from.

    Returns:
        The metric a sweep maximises.
    """
    provenance.commit()  # asked now: the checkout may have moved on by the time the run is summed up
    cfg, folder, checkpoint = open_folder(cfg, checkpoint)
    with own_process_environment(folder, checkpoint):
        parts = build(cfg, folder, checkpoint)
        with trackers.finishing(parts.loggers):
            return _train(parts)


def _train(run: Run) -> float:
    start = time.monotonic()
    if run.trainer.is_global_zero:
        run.folder.save_config(run.cfg)
        trackers.write_config(run.loggers, run.cfg)
        print(f"run folder: {run.folder.path}", flush=True)
    try:
        checkpoint = str(run.checkpoint) if run.checkpoint else None
        run.trainer.fit(run.module, datamodule=run.datamodule, ckpt_path=checkpoint, weights_only=True)
        if run.interruption.stopped:
            raise KeyboardInterrupt
        run.trainer.test(run.module, datamodule=run.datamodule, verbose=False)
        run.datamodule.join_bad_rows()
    except BaseException as error:
        _finish(run, "failed", _why(error, run), time.monotonic() - start)
        if isinstance(error, KeyboardInterrupt):
            sys.exit(f"interrupted at step {run.trainer.global_step}; go on with: {_resume_command(run)}")
        raise
    status, reason = "completed", ""
    if run.watch is not None and run.watch.detector is not None:
        run.watch.judge(run.trainer, run.module)
        if run.capsules is not None:
            run.capsules.look(run.trainer, run.module)
        if run.watch.detector.status == "diverged":
            status, reason = "diverged", run.watch.detector.reason
            if run.rollback is not None and run.rollback.done:
                reason += f"; {len(run.rollback.done)} rollbacks before it did not help for good"
    summary = _finish(run, status, reason, time.monotonic() - start)
    if run.trainer.is_global_zero:
        run_summary.show(summary)
    return run_summary.objective(summary, run.cfg.objective)


def _finish(run: Run, status: str, reason: str, seconds: float) -> dict[str, object]:
    summary = run_summary.summarise(run, status=status, reason=reason, seconds=seconds)
    if run.trainer.is_global_zero:
        run.folder.save_summary(summary)
        trackers.write_summary(run.loggers, summary)
    return summary


def _why(error: BaseException, run: Run) -> str:
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return f"interrupted at step {run.trainer.global_step}; go on with: {_resume_command(run)}"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _resume_command(run: Run) -> str:
    return f"python train.py resume={run.folder.path}"
