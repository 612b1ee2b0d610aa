"""Runs training from a configuration to summary.json."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig

from ranker import meeting, run_summary, stop_signals
from ranker.atomic import write_text
from ranker.build import Run, build
from ranker.data.log import Log
from ranker.data.start_report import start_report
from ranker.errors import UserError
from ranker.installation import command_line
from ranker.runs import lineage, log_identity, model_card, objective, provenance, run_lock, slurm
from ranker.runs.checkpoint_files import by_step, step_of
from ranker.runs.metric_names import TEST, VAL
from ranker.runs.run_folder import FINISHED, METRICS, SUMMARY, read_summary
from ranker.starting_point import (
    alone_in,
    continue_files,
    own_process_environment,
    parent_of,
    run_folder,
    starting_point,
)
from ranker.training import ddp, trackers
from ranker.training.metrics_csv import has_values
from ranker.training.tracker import PAGE

_LOGGER = logging.getLogger(__name__)


def run(cfg: DictConfig, checkpoint: Path | None = None) -> float:
    """Builds, trains and evaluates a run, and writes its summary.

    A lost model is the result of an experiment: the run ends normally with status ``diverged``. A crash or an
    interruption is recorded as ``failed`` and raised again.

    Args:
        cfg: the configuration.
        checkpoint: checkpoint of an earlier attempt at the same run in the same folder, to resume from.

    Returns:
        The metric a sweep maximises.
    """
    provenance.commit()  # now, because the checkout may change before the summary is written
    folder = run_folder(cfg)
    with stop_signals.taken_over(), stop_signals.gentle_after_start(), alone_in(folder):
        cfg, checkpoint = starting_point(cfg, folder, checkpoint)
        parent = parent_of(cfg, folder, checkpoint)
        with own_process_environment(folder, checkpoint):
            parts = build(cfg, folder, checkpoint, parent)
            if ranks := meeting.current():
                ranks.announce(folder.path, checkpoint)
            with trackers.finishing(parts.loggers):
                return _train(parts)


def verdict(run: Run) -> tuple[str, str]:
    """Status and reason of a run whose model was evaluated on the hold-out; reaches the final verdict."""
    run.stability.finish(run.trainer)
    status, reason = run_summary.verdict(run.stability.detector, rollbacks=len(run.stability.rollbacks))
    if not reason and run.stability.early_stop is not None:
        reason = run.stability.early_stop.reason
    return status, reason


def begin_files(run: Run, log: Log) -> None:
    """Writes what a run folder has before the first step.

    Args:
        run: the run.
        log: what it is trained on.
    """
    run.folder.save_config(run.cfg)
    log_identity.write(run.folder.path, log)
    trackers.write_config(run.loggers, run.cfg, run_summary.made_with(run.cfg))


def wants_evaluation(run: Run) -> bool:
    """Whether a run was killed between its checkpoint and the evaluation that is due at this step."""
    every = run.cfg.train.eval_every
    if run.resumption is None or not every or run.resumption.step % every:
        return False
    return not has_values(run.folder.path / METRICS, run.resumption.step, f"{VAL}/")


def _train(run: Run) -> float:
    start = time.monotonic()
    if _is_finished(run):
        summary = read_summary(run.folder.path)
        if summary is not None and summary["status"] in FINISHED:
            return objective.value_of(summary, run.cfg.objective)
    if run.resumption is None:
        _say_start(run)
    if run.trainer.is_global_zero:
        begin_files(run, run.datamodule.log)
        where = f", goes on after step {run.resumption.step} with lr {run.module.lr:g}" if run.resumption else ""
        print(f"run folder: {run.folder.path}{where}", flush=True)
    distributed = ddp.watched(run.trainer)
    if distributed:
        distributed.advice = lambda: _resume_command(run)
    try:
        continue_files(run)
        checkpoint = str(run.resumption.path) if run.resumption else None
        _make_up_evaluation(run)
        run.trainer.fit(run.module, datamodule=run.datamodule, ckpt_path=checkpoint, weights_only=True)
        if run.interruption.stopped:
            raise stop_signals.Stopped
        run.trainer.test(run.module, datamodule=run.datamodule, verbose=False)
        run.datamodule.join_bad_rows()
    except BaseException as caught:
        _ended_early(run, caught, time.monotonic() - start)
        raise
    status, reason = verdict(run)
    summary = finish(run, status, reason, time.monotonic() - start)
    if run.trainer.is_global_zero:
        run_summary.show(summary)
    return objective.value_of(summary, run.cfg.objective)


def _ended_early(run: Run, caught: BaseException, seconds: float) -> None:
    """Records why a run failed. Ends the process after a signal, and raises the reason where a rank was lost."""
    distributed = ddp.watched(run.trainer)
    error = distributed.explained(caught) if distributed else caught
    try:
        finish(run, "failed", why(error, run), seconds)
    except OSError as second:  # a full disk, for example; the first error is the one to show
        print(f"{run.folder.path / SUMMARY} cannot be written: {second.strerror}", file=sys.stderr, flush=True)
    if distributed:
        distributed.end_others()
    if _asked_to_stop(error, run):
        number = run.interruption.stopped or stop_signals.received() or signal.SIGINT
        if run.trainer.is_global_zero:
            stop_signals.say(why(error, run))
            job = run_lock.job_of(os.environ)
            if number == signal.SIGUSR1 and job:  # SLURM's warning that the time is up
                stop_signals.say(slurm.requeue(job))
        sys.exit(1 if number == signal.SIGINT else stop_signals.exit_status(number))
    if isinstance(error, ddp.LostRankError) and error.spoken:
        sys.exit(2)
    if error is not caught:
        raise error from None


def _is_finished(run: Run) -> bool:
    """Whether a resumed run has nothing left to train; says so."""
    if run.resumption is None:
        return False
    step, limit = run.resumption.step, run.cfg.train.max_steps
    if 0 < limit <= step:
        why = f"train.max_steps={limit} is reached; a larger value goes on"
    elif run.resumption.position >= run.datamodule.num_batches:
        why = "every row of the log was trained on"
    else:
        return False
    if run.trainer.is_global_zero:
        print(f"{run.folder.path}: nothing is left to train after step {step}: {why}", flush=True)
    return True


def _make_up_evaluation(run: Run) -> None:
    """Evaluates at the checkpoint's step, where ``wants_evaluation``."""
    if run.resumption is None or not wants_evaluation(run):
        return
    run.module.holdout_step = run.resumption.step
    run.trainer.validate(
        run.module, datamodule=run.datamodule, ckpt_path=str(run.resumption.path), verbose=False, weights_only=True
    )
    run.module.holdout_step = None


def _say_start(run: Run) -> None:
    """Says in one line what will be trained, and warns of what looks wrong. Every rank looks, the first one speaks."""
    cfg = run.cfg
    limit, per_step = cfg.train.max_steps, cfg.trainer.accumulate_grad_batches
    all_steps = -(-run.datamodule.num_batches // per_step)
    limited = 0 < limit < all_steps
    report = start_report(
        run.datamodule,
        parameters=run.module.net.count_parameters(),  # type: ignore[operator]
        steps=limit if limited else all_steps,
        limited=limited,
        warmup=cfg.train.warmup_steps,
        options=[f"{group}.{name}" for group in ("train", "data") for name in cfg[group]],
    )
    if run.trainer.is_global_zero:
        print(report.line, flush=True)
        if run.warm_start is not None:
            kept = run.warm_start.summary
            print(
                f"warm start from {run.warm_start.parent}: {kept['tensors']} tensors taken over, accumulators: "
                f"{kept['accumulators']}",
                flush=True,
            )
            for line in run.warm_start.lines:
                print(f"warm start: {line}", flush=True)
            if again := _trained_again(run):
                _LOGGER.warning(again)
        for warning in report.warnings:
            _LOGGER.warning(warning)
        if run.module.loss.ranking is not None and not cfg.data.get("keep_groups"):
            name, group = run.module.loss.ranking.name, run.datamodule.log.schema.group_names[0]
            _LOGGER.warning(
                f"loss={name} compares rows of one batch, and most rows of a group may be in other batches; "
                f"set data.keep_groups={group}"
            )


def _trained_again(run: Run) -> str:
    """A line that says how many rows the parent of a warm start has seen already; empty if none."""
    assert run.warm_start is not None
    last, log = run.warm_start.parent.identity["last_time_ms"], run.datamodule.log
    again = 0 if last is None else min(log.row_at_time(int(last) + 1), log.train_rows)
    if not again:
        return ""
    return (
        f"{again:,} of {log.train_rows:,} training rows are from before the last row of the parent "
        f"({lineage.iso(last)}) and are trained on again; data.days=[FIRST,LAST] chooses days, the last of which is "
        "the hold-out"
    )


def finish(
    run: Run, status: str, reason: str, seconds: float, more: Mapping[str, object] | None = None
) -> dict[str, object]:
    """Writes the summary, the model card and what the trackers want of a run that has ended.

    Args:
        run: the run.
        status: as of ``run_summary.summarise``, as the other arguments.
        reason: likewise.
        seconds: likewise.
        more: likewise.

    Returns:
        The summary.
    """
    summary = run_summary.summarise(run, status=status, reason=reason, seconds=seconds, more=more)
    if run.trainer.is_global_zero:
        run.folder.save_summary(summary)
        _write_card(run)
        if status in FINISHED and trackers.wants(run.loggers, "report"):
            _write_page(run)
        trackers.write_summary(run.loggers, summary, run.folder)
    return summary


def _write_card(run: Run) -> None:
    """Writes the model card of the newest checkpoint beside it. Only of the last step are there metrics."""
    found = by_step(run.folder.checkpoints)
    if not found:
        return
    step, last = step_of(found[-1]), run.trainer.global_step
    measured = {n.removeprefix(f"{TEST}/"): x for n, x in run.module.holdout.items() if n.startswith(f"{TEST}/")}
    card = model_card.card_of(
        run.folder,
        log=run.datamodule.log,
        step=step,
        checkpoint="the newest checkpoint",
        metrics=measured if step == last else {},
    )
    model_card.write_card(run.folder.checkpoints, card)


def _write_page(run: Run) -> None:
    """Writes the page of a run that ended, for the trackers."""
    from ranker.reports.run_page import Recorded, render

    for logger in run.loggers:
        logger.save()
    write_text(run.folder.path / PAGE, render(Recorded.read(run.folder.path)))


def why(error: BaseException, run: Run) -> str:
    """Why a run failed, in one line."""
    if isinstance(error, ddp.LostRankError):  # the state is sound, so a sweep goes on with it
        return f"interrupted at step {run.trainer.global_step}: {error}"
    if isinstance(error, UserError):
        return str(error)
    if _asked_to_stop(error, run):
        step = run.trainer.global_step or (run.resumption.step if run.resumption else 0)
        number = run.interruption.stopped or stop_signals.received()
        return f"interrupted at step {step} by {stop_signals.name_of(number)}; go on with: {_resume_command(run)}"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _asked_to_stop(error: BaseException, run: Run) -> bool:
    """Whether a run ended because of a signal. Lightning turns its exception into a SystemExit."""
    asked = run.interruption.stopped or stop_signals.received()
    return isinstance(error, KeyboardInterrupt) or (bool(asked) and isinstance(error, SystemExit))


def _resume_command(run: Run) -> str:
    if by_step(run.folder.checkpoints):
        again = f"{command_line('train')} resume={run.folder.path}"
        ranks = meeting.current()
        if ranks is not None and ranks.launch.size > 1:
            return f"{again}, behind {ranks.launch.program} as before"
        return again
    return "the same command and force=true, since no checkpoint was written yet"
