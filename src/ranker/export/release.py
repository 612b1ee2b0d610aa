"""Exports the model of a run: reads the checkpoint, evaluates it, applies the quality gate, writes the folder."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ranker.data.batch import Batch
from ranker.data.dense_statistics import NOTHING, DenseStatistics
from ranker.data.loader import EvalLoader
from ranker.data.log import Log
from ranker.data.schema import SCHEMA_FILE, Schema
from ranker.errors import UserError
from ranker.export.bundle import ABOUT, FORMAT, GATE, METRICS, PROGRAMS, new_folder, unseen, write_checksums, write_json
from ranker.export.program import Served, to_onnx, to_program
from ranker.export.program_runtime import difference, open_program
from ranker.metrics import TaskMetrics
from ranker.runs.lineage import LINEAGE
from ranker.runs.metric_names import TEST, VAL, task_metric
from ranker.runs.model_card import write_card
from ranker.runs.run_folder import (
    AVERAGE,
    DATA_MODULE,
    GLOBAL_STEP,
    NET_PREFIX,
    SHARDED,
    STATE_DICT,
    SUMMARY,
    plain,
    versions,
    whole_lines,
)
from ranker.runs.run_folder import METRICS as CURVES
from ranker.stability.gate import Evidence, GateSettings, Verdict, judge
from ranker.training.table_checkpoints import read_checkpoint


@dataclass(frozen=True)
class Weights:
    """The contents of a checkpoint that concern the model.

    Attributes:
        net: state of the ranker.
        statistics: of the dense features after that step.
        step: number of optimizer steps.
        averaged: whether the dense weights are the moving average of the run's.
        lineage: what it and the runs before it were trained on, see ``ranker.runs.lineage``; empty if it is not known.
    """

    net: dict[str, Any]
    statistics: DenseStatistics
    step: int
    lineage: dict[str, Any] = field(default_factory=dict)
    averaged: bool = False

    @classmethod
    def read(cls, path: Path) -> Weights:
        """Reads a checkpoint. Does not execute code from the file.

        Raises:
            UserError: the file is not a checkpoint of a training run.
        """
        if not path.is_file():
            raise UserError(f"no checkpoint {path}")
        try:
            saved = read_checkpoint(path)
            state = saved[STATE_DICT]
            data = saved.get(DATA_MODULE, {})
            net = {name.removeprefix(NET_PREFIX): x for name, x in state.items() if name.startswith(NET_PREFIX)}
            average = saved.get(AVERAGE, {})
            if SHARDED in saved:
                from ranker.training.stored_tables import gathered  # late: few runs have sharded tables

                net |= gathered(saved, path)
            net |= average
            step = int(saved[GLOBAL_STEP])
        except UserError:  # its tables are missing
            raise
        except Exception as error:  # torch raises many types of errors for an invalid file
            raise UserError(f"{path} is not a checkpoint of a run ({' '.join(str(error).split())[:120]})") from error
        known = data.get("dense_statistics")
        lineage = {key: value for key, value in saved.get(LINEAGE, {}).items() if key != "schema"}
        return cls(net, NOTHING if known is None else DenseStatistics.from_state(known), step, lineage, bool(average))


@dataclass(frozen=True)
class Candidate:
    """A model to export.

    Attributes:
        net: the ranker with the weights of the checkpoint, on the CPU, in evaluation mode.
        weights: the checkpoint.
        log: the log that the run was trained on.
        eval_batch_size: rows per batch in evaluations on the hold-out.
    """

    net: nn.Module
    weights: Weights
    log: Log
    eval_batch_size: int

    @classmethod
    def load(cls, net: nn.Module, weights: Weights, *, log: Log, eval_batch_size: int) -> Candidate:
        """Loads the weights of a checkpoint into a net.

        Args:
            net: the ranker; changed in place.
            weights: the checkpoint.
            log: the log that the run was trained on.
            eval_batch_size: rows per batch.

        Raises:
            UserError: the weights do not fit the net.
        """
        try:
            net.load_state_dict(weights.net)
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines()]
            raise UserError(f"the checkpoint does not fit the run's model: {' '.join(lines[:2])}") from error
        return cls(net.eval().requires_grad_(False), weights, log, eval_batch_size)

    @property
    def schema(self) -> Schema:
        """Features and tasks."""
        return self.log.schema

    def holdout(self, rows: int | None = None) -> EvalLoader:
        """The hold-out, not normalised; or blocks of it with about this number of rows."""
        size = self.eval_batch_size if rows is None else min(rows, self.eval_batch_size)
        return EvalLoader(self.log, start=self.log.train_rows, stop=self.log.num_rows, batch_size=size, max_rows=rows)

    def sample(self, rows: int) -> Batch:
        """About this number of rows, spread evenly over the hold-out."""
        return Batch.concat(list(self.holdout(rows)))

    def evaluate(self, advance: Callable[[int], None] = unseen) -> tuple[dict[str, float], dict[str, int]]:
        """Metrics on the whole hold-out, and the number of positive labels (above 0) of each task.

        Args:
            advance: called with the number of rows of each batch.
        """
        metrics = TaskMetrics(self.schema)
        positives_T = torch.zeros(len(self.schema.tasks), dtype=torch.int64)
        with torch.inference_mode():
            for batch in self.holdout():
                known = self.weights.statistics.normalise(batch)
                metrics.add(self.net(known), known)
                positives_T += ((known.labels_BT > 0) & known.mask_BT).sum(0)
                advance(len(batch))
        return metrics.compute(), dict(zip(self.schema.task_names, positives_T.tolist(), strict=True))

    def evidence(
        self, folder: Path, metrics: Mapping[str, float], positives: Mapping[str, int], *, eval_max_rows: int | None
    ) -> Evidence:
        """The evidence for the quality gate.

        Args:
            folder: the run folder.
            metrics: from ``evaluate``.
            positives: from ``evaluate``.
            eval_max_rows: rows of the hold-out in each evaluation during training; None for all.
        """
        state = {**dict(self.net.named_parameters()), **dict(self.net.named_buffers())}
        status, reason = run_status(folder)
        rows = self.log.num_rows - self.log.train_rows
        return Evidence(
            status=status,
            reason=reason,
            nonfinite_weights=[n for n, x in state.items() if x.is_floating_point() and not bool(x.isfinite().all())],
            tasks={task.name: task.type for task in self.schema.tasks},
            metrics=metrics,
            rows={name: int(metrics[f"{name}/observed"]) for name in self.schema.task_names},
            positives=positives,
            best_auc=best_aucs(folder / CURVES, self.schema),
            best_share=min(1.0, eval_max_rows / rows) if eval_max_rows else 1.0,
        )


def run_status(folder: Path) -> tuple[str, str]:
    """Status and reason from summary.json; ``running`` if there is none, ``unsettled`` if a verdict is missing."""
    path = folder / SUMMARY
    if not path.is_file():
        return "running", f"there is no {SUMMARY}"
    summary = json.loads(path.read_text(encoding="utf-8"))
    unsettled = summary["status"] == "completed" and summary.get("divergence", {}).get("unsettled")
    return "unsettled" if unsettled else str(summary["status"]), str(summary.get("reason") or "")


def best_aucs(path: Path, schema: Schema) -> dict[str, tuple[float, int]]:
    """The highest AUC of all evaluations on the hold-out and its step, by binary task."""
    if not path.is_file():
        return {}
    rows = list(csv.DictReader(whole_lines(path).decode().splitlines()))
    best: dict[str, tuple[float, int]] = {}
    for task in schema.tasks:
        for name in (task_metric(VAL, task.name, "auc"), task_metric(TEST, task.name, "auc")):
            found = [(float(row[name]), int(row["step"])) for row in rows if row.get(name)]
            found = [(auc, step) for auc, step in found if math.isfinite(auc)]
            if found:
                best[task.name] = max(found + ([best[task.name]] if task.name in best else []))
    return best


def normalisation(statistics: DenseStatistics, schema: Schema) -> dict[str, Any] | None:
    """Mean and standard deviation of the dense features, for export.json; None if they are not normalised."""
    if statistics.rows == 0:
        return None
    std_F = np.sqrt(statistics.squares_F / statistics.rows)
    names = [feature.name for feature in schema.dense]
    return {
        "rows": statistics.rows,
        "mean": dict(zip(names, statistics.mean_F.tolist(), strict=True)),
        "std": dict(zip(names, std_F.tolist(), strict=True)),
    }


def origin(
    cfg: Any, weights: Weights, *, run: str, which: str, log: Log, config_hash: str, parent: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Where an exported model comes from, for export.json.

    Args:
        cfg: the configuration of the run.
        weights: the checkpoint.
        run: name of the run folder.
        which: which checkpoint it is, in words.
        log: the log that the run was trained on.
        config_hash: of the configuration.
        parent: what the run continued; None where it began with random weights.
    """
    return {
        "model": cfg.model.name,
        "optim": cfg.optim.name,
        "data": cfg.data.name,
        "run": run,
        "step": weights.step,
        "config_hash": config_hash,
        LINEAGE: weights.lineage or None,
        "warm_start": parent,
        "checkpoint": which,
        "averaged": weights.averaged,
        "holdout_rows": log.num_rows - log.train_rows,
        "id_types": log.id_types,
        "versions": versions(),
    }


class _RefusedError(Exception):
    """Leaves the block of ``new_folder``, so that the draft is removed."""


def write_export(
    candidate: Candidate,
    evidence: Evidence,
    settings: GateSettings,
    *,
    destination: Path,
    onnx: bool,
    force: bool,
    about: Mapping[str, Any],
    card: Mapping[str, Any],
) -> Verdict:
    """Applies the gate, converts the model, applies the gate to the outputs of the programs, and writes the folder.

    A model that the gate refuses is not converted.

    Args:
        candidate: the model.
        evidence: from ``Candidate.evidence``.
        settings: of the gate.
        destination: the export folder.
        onnx: also write an ONNX program.
        force: replace an existing export.
        about: origin of the model, for export.json.
        card: the model card, from ``ranker.runs.model_card``; the verdict is added to it.

    Raises:
        UserError: the destination exists, or packages are missing.
    """
    verdict = judge(evidence, settings)
    if not verdict.passed:
        return verdict
    rows = candidate.sample(settings.agreement_rows)
    statistics = candidate.weights.statistics
    served = Served(candidate.net, schema=candidate.schema, statistics=statistics)
    try:
        with new_folder(destination, replace=force) as draft:
            program = to_program(served)
            torch.export.save(program, draft / PROGRAMS["pt2"])
            if onnx:
                to_onnx(program, served, draft / PROGRAMS["onnx"])
            differences = {
                form: difference(
                    open_program(draft / file, schema=candidate.schema), served, candidate.net, rows, statistics
                )
                for form, file in PROGRAMS.items()
                if (draft / file).is_file()
            }
            verdict = judge(replace(evidence, differences=differences), settings)
            if not verdict.passed:
                raise _RefusedError
            candidate.schema.to_yaml(draft / SCHEMA_FILE)
            write_json(draft / METRICS, plain(evidence.metrics))
            write_json(draft / GATE, plain(verdict.to_dict() | {"agreement_rows": len(rows)}))
            signature = served.signature.describe()
            known = {"dense_statistics": normalisation(statistics, candidate.schema)}
            write_json(draft / ABOUT, {"format": FORMAT, **plain(about), **known, **signature})
            write_card(draft, {**card, "gate": plain(verdict.to_dict())})
            write_checksums(draft)
    except _RefusedError:
        pass
    return verdict
