"""Judges the model of a day on the day after, by the quality gate and beside the served model on the same rows.

Runs as a process of its own (``python -m ranker.daily.judge REQUEST.json``), so that its memory is given back and a
crash is one failed job.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ranker.atomic import write_text
from ranker.cli import command
from ranker.export.release import Candidate, Weights, origin, write_export
from ranker.parts import make_net, open_log
from ranker.runs import run_lock
from ranker.runs.config_identity import config_hash
from ranker.runs.lineage import parent
from ranker.runs.log_identity import check_schema
from ranker.runs.model_card import card_of
from ranker.runs.run_folder import RunFolder, plain
from ranker.stability.gate import Check, Evidence, GateSettings, auc_standard_error, judge

LAST = "the last one"  # as export.py calls it


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is judged.

    Attributes:
        run: the folder of the day's run; its hold-out is the day after.
        candidate: judge the model of this run; False evaluates the served model alone.
        served: training state of the model that is served; None before the first.
        destination: where the export goes.
        answer: file that gets the answer.
        gate: settings of the quality gate.
        max_auc_drop: how far an AUC may be below that of the served model.
        onnx: also write an ONNX program.
        trusted: names of ``_target_`` in the user's own configuration.
    """

    run: str
    candidate: bool
    served: str | None
    destination: str
    answer: str
    gate: dict[str, Any]
    max_auc_drop: float
    onnx: bool
    trusted: list[str] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Writes the request as JSON."""
        write_text(path, json.dumps(asdict(self)) + "\n")


def answer(request: Request) -> None:
    """Evaluates, judges and exports, and writes the answer when all of it is done.

    The answer has ``passed``, ``reasons``, and the metrics on the day after of the day's model (``metrics``) and of
    the model that was served before (``served``).

    Raises:
        UserError: the run has no checkpoint, or a model does not fit its configuration.
    """
    folder = RunFolder.existing(request.run)
    cfg = folder.load_config(trusted=request.trusted)
    log = open_log(cfg)
    check_schema(folder.path, log.schema)
    served, note = _served(request, log)
    found: dict[str, Any] = {"passed": False, "run": folder.path.name, "reasons": [], "metrics": None}
    found |= {"served": served, "note": note}
    if request.candidate:
        with run_lock.held(folder.path, wait=True):
            found |= _judged(request, folder, cfg, log, served)
    write_text(Path(request.answer), json.dumps(plain(found), allow_nan=False) + "\n")


def _judged(
    request: Request, folder: RunFolder, cfg: Any, log: Any, served: Mapping[str, float] | None
) -> dict[str, Any]:
    destination = Path(request.destination)
    for leftover in destination.parent.glob(f".{destination.name}.*"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    weights = Weights.read(folder.newest_checkpoint())
    candidate = _loaded(cfg, weights, log)
    metrics, positives = candidate.evaluate()
    evidence = candidate.evidence(folder.path, metrics, positives, eval_max_rows=cfg.data.eval_max_rows)
    settings = GateSettings(**request.gate)
    worse = [] if served is None else [
        check.words for check in compared(evidence, served, settings, request.max_auc_drop) if not check.passed
    ]  # fmt: skip
    verdict = judge(evidence, settings)
    reasons = verdict.reasons + worse
    if not reasons:
        about = origin(
            cfg,
            weights,
            run=folder.path.name,
            which=LAST,
            log=log,
            config_hash=config_hash(cfg),
            parent=parent(cfg),
        )
        reasons = write_export(
            candidate,
            evidence,
            settings,
            destination=destination,
            onnx=request.onnx,
            force=True,
            about=about,
            card=card_of(folder, log=log, step=weights.step, checkpoint=LAST, metrics=metrics),
        ).reasons
    return {"passed": not reasons, "reasons": reasons, "metrics": metrics, "step": weights.step}


def compared(
    evidence: Evidence, served: Mapping[str, float], settings: GateSettings, max_auc_drop: float
) -> list[Check]:
    """Whether no AUC is clearly below that of the served model on the same rows.

        AUC_served - AUC <= max_auc_drop + noise * standard error of the AUC

    Args:
        evidence: of the day's model.
        served: metrics of the served model, by ``<task>/<metric>``.
        settings: of the gate; gives ``noise``, and the tasks and rows that it takes to judge.
        max_auc_drop: see above.
    """
    checks = []
    for task, kind in evidence.tasks.items():
        key = f"{task}/auc"
        if kind != "binary" or key not in served or (settings.tasks is not None and task not in settings.tasks):
            continue
        positives = evidence.positives[task]
        negatives = evidence.rows[task] - positives
        if min(positives, negatives) < settings.min_positives:
            continue
        now, before = evidence.metrics[key], served[key]
        chance = settings.noise * auc_standard_error(before, positives, negatives)
        checks.append(
            Check(
                rule="max_auc_drop",
                about=f"{task} AUC",
                passed=before - now <= max_auc_drop + chance,  # false for nan
                found=before - now,
                words=f"{task} AUC: {now:.4f}, {before:.4f} of the served model on the same rows; wanted: at most "
                f"{max_auc_drop:g} below, and {chance:.4f} for chance",
            )
        )
    return checks


def _served(request: Request, log: Any) -> tuple[dict[str, float] | None, str]:
    """Metrics of the served model on the hold-out, or why there are none."""
    if request.served is None:
        return None, ""
    folder = RunFolder.existing(request.served)
    cfg = folder.load_config(trusted=request.trusted)
    try:
        check_schema(folder.path, log.schema)
    except ValueError as error:
        return None, f"the served model was not compared: {error}"
    metrics, _ = _loaded(cfg, Weights.read(folder.newest_checkpoint()), log).evaluate()
    return metrics, ""


def _loaded(cfg: Any, weights: Weights, log: Any) -> Candidate:
    return Candidate.load(make_net(cfg, log.schema), weights, log=log, eval_batch_size=cfg.scale.eval_batch_size)


@command
def main() -> int:
    """Answers the request in the file that the first argument names."""
    answer(Request(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
