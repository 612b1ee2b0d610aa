"""The quality gate: may this model serve? A pure judgement on evidence that others collect."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ranker.errors import UserError, suggest


@dataclass(frozen=True, kw_only=True)
class GateSettings:
    """What a model must show; the values stand in conf/gate, which says more of each.

    Attributes:
        statuses: how the run may have ended.
        tasks: names of the judged tasks; None for all.
        min_positives: rows of either label that a binary task needs to be judged.
        min_auc: least AUC on the hold-out.
        max_auc_drop: how far it may lie below the best evaluation of the run.
        noise: standard errors that the rules on AUC and on the calibration of binary tasks forgive.
        min_calibration: least mean prediction / mean label.
        max_calibration: largest.
        agreement_rows: rows on which exported and eager outputs are compared.
        max_difference: largest |exported - eager| / max(1, |eager|).
    """

    statuses: Sequence[str]
    tasks: Sequence[str] | None
    min_positives: int
    min_auc: float
    max_auc_drop: float
    noise: float
    min_calibration: float
    max_calibration: float
    agreement_rows: int
    max_difference: float

    def __post_init__(self) -> None:
        for name in ("statuses", "tasks"):
            given = getattr(self, name)
            if isinstance(given, str) or (given is None and name == "statuses"):
                raise UserError(f"gate: {name} must be a list of names, got {given!r}")
        for name in ("min_auc", "max_auc_drop", "noise", "min_calibration", "max_calibration", "max_difference"):
            if not getattr(self, name) >= 0:
                raise UserError(f"gate: {name} must be 0 or more, got {getattr(self, name)}")
        for name in ("min_positives", "agreement_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"gate: {name} must be 1 or more, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of a model.

    Attributes:
        status: how its run ended: completed, diverged, failed, or running where it has not.
        reason: why, in plain words.
        nonfinite_weights: names of the parameters and buffers that hold NaN or infinity.
        tasks: by name of each task, its type.
        metrics: of the model on the whole hold-out, by ``<task>/<metric>``, as from ``TaskMetrics``.
        rows: by task, observed rows of the hold-out.
        positives: by binary task, how many of them are positive.
        best_auc: by binary task, the best AUC that the run itself saw on the hold-out, and at which step.
        best_share: share of the hold-out that those evaluations looked at, above 0 and at most 1.
        differences: by format, the largest |exported - eager| / max(1, |eager|); empty before the export.
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
    """One rule and what became of it.

    Attributes:
        rule: the setting it comes from.
        about: what was looked at: a task, a format, the run.
        passed: whether it holds; None where it could not be asked, with the reason in ``words``.
        found: the number that was judged; None where there is none.
        words: what was found and what was wanted, in one line.
    """

    rule: str
    about: str
    passed: bool | None
    found: float | None = None
    words: str


@dataclass(frozen=True)
class Verdict:
    """All checks of a model.

    Attributes:
        checks: in the order they were made.
    """

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not self.reasons

    @property
    def reasons(self) -> list[str]:
        """Why it is refused, a line each."""
        return [f"{check.about}: {check.words}" for check in self.checks if check.passed is False]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for a report."""
        return {"passed": self.passed, "reasons": self.reasons, "checks": [asdict(check) for check in self.checks]}


def judge(evidence: Evidence, settings: GateSettings) -> Verdict:
    """Judges a model by every rule, also after the first that fails.

    Raises:
        UserError: ``settings.tasks`` names a task that the model does not have.
    """
    for name in settings.tasks or ():
        if name not in evidence.tasks:
            raise UserError(f"gate: no task '{name}'; {suggest(name, evidence.tasks)}")
    judged = [name for name in evidence.tasks if settings.tasks is None or name in settings.tasks]
    checks = [_status(evidence, settings), _weights(evidence)]
    checks += [_outputs(evidence, name) for name in evidence.tasks]
    for name in judged:
        if evidence.tasks[name] == "binary":
            checks += _aucs(evidence, name, settings)
        checks.append(_calibration(evidence, name, settings))
    checks += [_agreement(form, found, settings) for form, found in evidence.differences.items()]
    return Verdict(tuple(checks))


def auc_standard_error(auc: float, positives: float, negatives: float) -> float:
    """Standard error of an AUC, nan without rows of both labels.

        se^2 = (A (1 - A) + (p - 1)(Q1 - A^2) + (n - 1)(Q2 - A^2)) / (p n)
        Q1 = A / (2 - A)        Q2 = 2 A^2 / (1 + A)

    A the AUC, p positives, n negatives.

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


def _aucs(evidence: Evidence, task: str, settings: GateSettings) -> list[Check]:
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
    forgiven = settings.noise * error if error == error else 0.0
    floor = Check(
        rule="min_auc",
        about=f"{task} AUC",
        passed=auc + forgiven >= settings.min_auc,  # false for nan
        found=_number(auc),
        words=f"{auc:.4f} (chance {forgiven:.4f}) on the hold-out; wanted: at least {settings.min_auc:g}",
    )
    if task not in evidence.best_auc:
        words = "the run wrote no evaluation to metrics.csv to compare with"
        return [floor, Check(rule="max_auc_drop", about=f"{task} AUC", passed=None, words=words)]
    best, step = evidence.best_auc[task]
    share = evidence.best_share
    forgiven = settings.noise * math.hypot(error, auc_standard_error(best, positives * share, negatives * share))
    forgiven = forgiven if forgiven == forgiven else 0.0
    drop = Check(
        rule="max_auc_drop",
        about=f"{task} AUC",
        passed=best - auc <= settings.max_auc_drop + forgiven,
        found=_number(best - auc),
        words=f"{auc:.4f} on the hold-out, {best:.4f} at its best (step {step}); "
        f"wanted: at most {settings.max_auc_drop:g} below, and {forgiven:.4f} for chance",
    )
    return [floor, drop]


def _calibration(evidence: Evidence, task: str, settings: GateSettings) -> Check:
    found = evidence.metrics.get(f"{task}/calibration", math.nan)
    about, rule = f"{task} calibration", "calibration"
    few = evidence.tasks[task] == "binary" and evidence.positives[task] < settings.min_positives
    if few or evidence.rows[task] == 0:
        count = f"{evidence.positives[task]:,} positive rows" if few else "no observed row"
        return Check(rule=rule, about=about, passed=None, words=f"not judged: {count} on the hold-out")
    # The mean label rests on so many positives: its relative standard error is near 1 / sqrt(positives).
    binary = evidence.tasks[task] == "binary"
    chance = 1.0 + settings.noise / math.sqrt(evidence.positives[task]) if binary else 1.0
    low, high = settings.min_calibration / chance, settings.max_calibration * chance
    return Check(
        rule=rule,
        about=about,
        passed=low <= found <= high,
        found=_number(found),
        words=f"mean prediction / mean label is {found:.3f}; wanted: {low:.3g} to {high:.3g}",
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
