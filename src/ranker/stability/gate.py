"""The quality gate: rules that decide from collected evidence whether a model may be exported."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ranker.errors import UserError, suggest
from ranker.stability.worth import relative_loss


@dataclass(frozen=True, kw_only=True)
class GateSettings:
    """Thresholds of the gate. Their values are in conf/gate, with more explanation.

    Attributes:
        statuses: accepted statuses of the run.
        tasks: names of the tasks to check; None for all.
        min_positives: number of rows of each label that a binary task needs to be checked, and of observed rows of a
            regression.
        min_judged: number of tasks whose AUC or loss must have been checked: a hold-out of a few rows says nothing.
        min_auc: smallest AUC on the hold-out.
        max_auc_drop: largest distance of that AUC below the best evaluation of the run.
        noise: tolerance of the rules on AUC and on the calibration of binary tasks, in standard errors.
        min_calibration: smallest mean prediction / mean label.
        max_calibration: largest mean prediction / mean label.
        max_relative_loss: the loss must be less than this many times that of the best constant prediction: the
            normalised entropy of a binary task, MSE / variance of the labels of a regression.
        agreement_rows: number of rows on which exported and eager outputs are compared.
        max_difference: largest |exported - eager| / max(1, |eager|).

    Raises:
        UserError: a value is out of range.
    """

    statuses: Sequence[str]
    tasks: Sequence[str] | None
    min_positives: int
    min_judged: int
    min_auc: float
    max_auc_drop: float
    noise: float
    min_calibration: float
    max_calibration: float
    max_relative_loss: float
    agreement_rows: int
    max_difference: float

    def __post_init__(self) -> None:
        for name in ("statuses", "tasks"):
            given = getattr(self, name)
            if isinstance(given, str) or (given is None and name == "statuses"):
                raise UserError(f"gate: {name} must be a list of names, got {given!r}")
        numbers = ("min_auc", "max_auc_drop", "noise", "min_calibration", "max_calibration", "max_relative_loss")
        for name in (*numbers, "max_difference", "min_judged"):
            if not getattr(self, name) >= 0:
                raise UserError(f"gate: {name} must be 0 or more, got {getattr(self, name)}")
        for name in ("min_positives", "agreement_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"gate: {name} must be 1 or more, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known about a model.

    Attributes:
        status: status of its run: completed, diverged, failed or running; ``unsettled`` if it completed before it was
            known whether it recovered from a divergence.
        reason: explanation of the status.
        nonfinite_weights: names of the parameters and buffers that contain NaN or infinity.
        tasks: type of each task, by name.
        metrics: metrics of the model on the whole hold-out, by ``<task>/<metric>``, as from ``TaskMetrics``.
        rows: number of observed rows of the hold-out, by task.
        positives: number of these rows that are positive, by binary task.
        best_auc: best AUC on the hold-out during the run and the step of that evaluation, by binary task.
        best_share: share of the hold-out that these evaluations used, above 0 and at most 1.
        differences: largest |exported - eager| / max(1, |eager|), by format; empty before the export.
    """

    status: str
    reason: str = ""
    nonfinite_weights: Sequence[str] = ()
    tasks: Mapping[str, str]
    metrics: Mapping[str, float]
    rows: Mapping[str, int]
    positives: Mapping[str, int]
    best_auc: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    best_share: float = 1.0
    differences: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Check:
    """The result of one rule.

    Attributes:
        rule: name of the setting that the rule uses.
        about: what was checked: a task, a format, the run.
        passed: whether the rule holds; None where it could not be checked, with the reason in ``words``.
        found: the number that was checked; None where there is none.
        words: what was found and what was required, in one line.
    """

    rule: str
    about: str
    passed: bool | None
    found: float | None = None
    words: str

    @property
    def settings(self) -> tuple[str, ...]:
        """Names of the settings that change the rule; none where nothing does, as for weights that are not finite."""
        return {"finite": (), "calibration": ("min_calibration", "max_calibration")}.get(self.rule, (self.rule,))


@dataclass(frozen=True)
class Verdict:
    """All checks of a model.

    Attributes:
        checks: the checks, in order.
    """

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not self.reasons

    @property
    def reasons(self) -> list[str]:
        """The failed checks, one line each."""
        return [f"{check.about}: {check.words}" for check in self.checks if check.passed is False]

    def to_dict(self) -> dict[str, Any]:
        """The verdict as JSON values."""
        return {"passed": self.passed, "reasons": self.reasons, "checks": [asdict(check) for check in self.checks]}


def judge(evidence: Evidence, settings: GateSettings) -> Verdict:
    """Checks a model by all rules, also after the first failure.

    Raises:
        UserError: ``settings.tasks`` names a task that the model does not have.
    """
    for name in settings.tasks or ():
        if name not in evidence.tasks:
            raise UserError(f"gate: no task '{name}'; {suggest(name, evidence.tasks)}")
    checked = [name for name in evidence.tasks if settings.tasks is None or name in settings.tasks]
    checks = [_status(evidence, settings), _weights(evidence)]
    checks += [_outputs(evidence, name) for name in evidence.tasks]
    for name in checked:
        if evidence.tasks[name] == "binary":
            checks += _auc(evidence, name, settings)
        checks += [_calibration(evidence, name, settings), _relative_loss(evidence, name, settings)]
    checks.append(_judged(checks, checked, evidence, settings))
    checks += [_agreement(form, found, settings) for form, found in evidence.differences.items()]
    return Verdict(tuple(checks))


def auc_standard_error(auc: float, positives: float, negatives: float) -> float:
    """Standard error of an AUC; nan without rows of both labels.

        se^2 = (A (1 - A) + (p - 1)(Q1 - A^2) + (n - 1)(Q2 - A^2)) / (p n)
        Q1 = A / (2 - A)        Q2 = 2 A^2 / (1 + A)

    A is the AUC, p the number of positives, n the number of negatives.

    Source: Hanley and McNeil (1982), The Meaning and Use of the Area under a ROC Curve, equations 1 and 2.
    """
    if positives <= 0 or negatives <= 0 or not 0 <= auc <= 1:
        return math.nan
    first, second = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    square = auc * (1 - auc)
    square += max(positives - 1, 0) * (first - auc**2) + max(negatives - 1, 0) * (second - auc**2)
    return math.sqrt(max(square, 0.0) / (positives * negatives))


def _status(evidence: Evidence, settings: GateSettings) -> Check:
    why = f" ({evidence.reason})" if evidence.reason else ""
    wanted = " or ".join(settings.statuses)
    return Check(
        rule="statuses",
        about="run",
        passed=evidence.status in settings.statuses,
        words=f"its status is {evidence.status}{why}; wanted: {wanted}",
    )


def _judged(checks: Sequence[Check], tasks: Sequence[str], evidence: Evidence, settings: GateSettings) -> Check:
    """Whether the hold-out says enough: of each judged task, the AUC or the loss could be checked."""
    found = {
        c.about.rpartition(" ")[0]
        for c in checks
        if c.rule in ("min_auc", "max_relative_loss") and c.passed is not None
    }
    rows = ", ".join(f"{name} {evidence.rows[name]:,}" for name in tasks)
    return Check(
        rule="min_judged",
        about="hold-out",
        passed=len(found) >= settings.min_judged,
        found=float(len(found)),
        words=f"{len(found)} of {len(tasks)} tasks could be judged on its rows ({rows}); wanted: at least "
        f"{settings.min_judged:g}",
    )


def _weights(evidence: Evidence) -> Check:
    broken = list(evidence.nonfinite_weights)
    more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
    words = f"NaN or infinity in {', '.join(broken[:3])}{more}" if broken else "all finite"
    return Check(rule="finite", about="weights", passed=not broken, words=words)


def _outputs(evidence: Evidence, task: str) -> Check:
    bad = evidence.metrics.get(f"{task}/nonfinite", 0.0)
    return Check(
        rule="finite",
        about=f"{task} predictions",
        passed=bad == 0,
        found=bad,
        words=f"{bad:,.0f} of {evidence.rows[task]:,} are NaN or infinite" if bad else "all finite",
    )


def _auc(evidence: Evidence, task: str, settings: GateSettings) -> list[Check]:
    positives = evidence.positives[task]
    negatives = evidence.rows[task] - positives
    if min(positives, negatives) < settings.min_positives:
        words = (
            f"not judged: {positives:,} positive and {negatives:,} negative rows on the hold-out, "
            f"fewer than {settings.min_positives} of one"
        )
        return [Check(rule="min_auc", about=f"{task} AUC", passed=None, words=words)]
    auc = evidence.metrics.get(f"{task}/auc", math.nan)
    error = auc_standard_error(auc, positives, negatives)
    tolerance = settings.noise * error if error == error else 0.0
    floor = Check(
        rule="min_auc",
        about=f"{task} AUC",
        passed=auc + tolerance >= settings.min_auc,  # false for nan
        found=_number(auc),
        words=f"{auc:.4f} (chance {tolerance:.4f}) on the hold-out; wanted: at least {settings.min_auc:g}",
    )
    if task not in evidence.best_auc:
        words = "the run wrote no evaluation to metrics.csv to compare with"
        return [floor, Check(rule="max_auc_drop", about=f"{task} AUC", passed=None, words=words)]
    best, step = evidence.best_auc[task]
    share = evidence.best_share
    tolerance = settings.noise * math.hypot(error, auc_standard_error(best, positives * share, negatives * share))
    tolerance = tolerance if tolerance == tolerance else 0.0
    drop = Check(
        rule="max_auc_drop",
        about=f"{task} AUC",
        passed=best - auc <= settings.max_auc_drop + tolerance,
        found=_number(best - auc),
        words=f"{auc:.4f} on the hold-out, {best:.4f} at its best (step {step}); "
        f"wanted: at most {settings.max_auc_drop:g} below, and {tolerance:.4f} for chance",
    )
    return [floor, drop]


def _calibration(evidence: Evidence, task: str, settings: GateSettings) -> Check:
    found = evidence.metrics.get(f"{task}/calibration", math.nan)
    about, rule = f"{task} calibration", "calibration"
    binary = evidence.tasks[task] == "binary"
    if few := _too_few(evidence, task, settings):
        return Check(rule=rule, about=about, passed=None, words=few)
    # The relative standard error of the mean label of a binary task is about 1 / sqrt(positives).
    chance = 1.0 + settings.noise / math.sqrt(evidence.positives[task]) if binary else 1.0
    low, high = settings.min_calibration / chance, settings.max_calibration * chance
    return Check(
        rule=rule,
        about=about,
        passed=low <= found <= high,
        found=_number(found),
        words=f"mean prediction / mean label is {found:.3f}; wanted: {low:.3g} to {high:.3g}",
    )


def _too_few(evidence: Evidence, task: str, settings: GateSettings) -> str:
    """Why a task is not judged; empty where its hold-out has enough positive or observed rows."""
    binary = evidence.tasks[task] == "binary"
    count = evidence.positives[task] if binary else evidence.rows[task]
    kind = "positive" if binary else "observed"
    few = f"not judged: {count:,} {kind} rows on the hold-out, fewer than {settings.min_positives}"
    return few if count < settings.min_positives else ""


def _relative_loss(evidence: Evidence, task: str, settings: GateSettings) -> Check:
    found = relative_loss(evidence.metrics, task)
    about, rule = f"{task} loss", "max_relative_loss"
    few = _too_few(evidence, task, settings)
    if few or math.isnan(found):
        words = few or "not judged: undefined on the hold-out, for example because all labels are equal"
        return Check(rule=rule, about=about, passed=None, words=words)
    # The relative standard error of the log loss of a binary task is about that of its number of positives.
    binary = evidence.tasks[task] == "binary"
    chance = settings.noise * found / math.sqrt(evidence.positives[task]) if binary else 0.0
    return Check(
        rule=rule,
        about=about,
        passed=found - chance < settings.max_relative_loss,
        found=_number(found),
        words=f"{found:.4g}x that of a constant prediction on the hold-out; wanted: below "
        f"{settings.max_relative_loss:g}",
    )


def _agreement(form: str, found: float, settings: GateSettings) -> Check:
    return Check(
        rule="max_difference",
        about=f"exported {form}",
        passed=found <= settings.max_difference,  # false for nan
        found=_number(found),
        words=f"differs from the eager model by {found:.2g}; wanted: at most {settings.max_difference:g}",
    )


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
