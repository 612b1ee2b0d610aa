"""The detector's settings, without torch: ``--help`` shows them."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ranker.errors import UserError

MAX_PROOF_STEPS = 200  # bounds what is kept of past batches


@dataclass(frozen=True, kw_only=True)
class DetectorSettings:
    """Settings of ``DivergenceDetector``.

    A loss is high when it exceeds its baseline by more than each of ``jump_ratio``, ``jump_scales`` and ``jump_floor``
    require. Each of them guards against one kind of noise: drift of a quiet loss, heavy tails, and rare positives
    (where positives are one row in a thousand, one more positive multiplies the loss of a batch).

    Attributes:
        window: number of accepted losses that the baseline is the median of.
        jump_ratio: smallest ratio of a high loss to the baseline.
        jump_scales: smallest distance of a high loss from the baseline, in robust standard deviations.
        jump_floor: smallest distance of a high loss from the baseline, as a share of the loss of the untrained model
            (the first loss, and at least log 2 for a binary task).
        outlier_steps: number of steps that a spike of fewer than half of the tasks must last. One outlier row can raise
            a squared error 30 times for one step without harm to the model.
        lone_factor: where there is one task only, a shorter spike must exceed the threshold this many times.
        max_rise: number of steps in which the baseline may at most double; a loss that grows faster is not drift.
        startup: number of first steps in which a spike that recovers is not an event: the first steps of Adagrad are
            noisy.
        settle: number of consecutive steps below the threshold after which a spike is over.
        patience: number of steps that a spike may last; a model takes 10 to 300 steps to recover.
        lost_ratio: after ``patience`` steps, a loss this many times its baseline, for most tasks, means a lost model.
        lost_ratio_alone: the same for a single task.
        blowup_ratio: a spike to this many times the loss of the untrained model is a blow-up. A model that has learned
            nothing after a blow-up is lost; without a blow-up it may be slow.
        nonfinite_patience: number of consecutive steps with a loss or prediction that is not finite.
        dead_spread: standard deviation of logits below which predictions do not depend on the input.
        dead_patience: number of consecutive steps at which all tasks are below ``dead_spread``.
        unborn_patience: the same for a model that was never above it (heads may start at zero, during warm-up).
        auc_tolerance: AUCs that exceed 0.5 by less than this on average are at chance (see ``auc_above_chance``).
        auc_patience: number of consecutive steps with training AUCs at chance, after better AUCs or a blow-up.
        proof_steps: number of batches over which the skill is measured after a spike (``Skill``).
        recovery_steps: number of steps after a spike within which the skill must have come back.
        lost_share: share of an AUC's distance from 0.5 that must be missing for it to count as lost.
        lost_step_cut: cut of the median step size of a layer (``StepCut``) at which a spike has ended learning, if the
            AUC is lost too.
        fast_steps: number of batches from the first step of the spike that this verdict needs.
        min_labels: number of labels that a loss must be the mean of. Batches with fewer are added up.
        lost_ne: smallest normalised entropy on the hold-out (log loss divided by the log loss of always predicting the
            base rate), median over binary tasks, at which a model is lost if its median AUC there is at chance.
    """

    window: int = 128
    jump_ratio: float = 1.5
    jump_scales: float = 12.0
    jump_floor: float = 0.1
    outlier_steps: int = 3
    lone_factor: float = 5.0
    max_rise: int = 500
    startup: int = 50
    settle: int = 10
    patience: int = 400
    lost_ratio: float = 3.0
    lost_ratio_alone: float = 10.0
    blowup_ratio: float = 30.0
    nonfinite_patience: int = 20
    dead_spread: float = 1e-3
    dead_patience: int = 50
    unborn_patience: int = 300
    auc_tolerance: float = 0.02
    auc_patience: int = 200
    proof_steps: int = 50
    recovery_steps: int = 250
    lost_share: float = 0.2
    lost_step_cut: float = 200.0
    fast_steps: int = 8
    min_labels: int = 8
    lost_ne: float = 3.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise UserError(f"divergence detector: {field.name} must be a number above 0, got {value!r}")
        bounds = {"window": 16, "jump_ratio": 1.0, "lost_ratio": self.jump_ratio, "lost_step_cut": 1.0}
        for name, least in bounds.items():
            if getattr(self, name) < least:
                raise UserError(f"divergence detector: {name} must be at least {least:g}, got {getattr(self, name):g}")
        if self.lost_share > 1:
            raise UserError(f"divergence detector: lost_share must be at most 1, got {self.lost_share:g}")
        if not self.proof_steps <= min(self.recovery_steps, MAX_PROOF_STEPS):
            raise UserError(
                f"divergence detector: proof_steps must be at most recovery_steps and at most {MAX_PROOF_STEPS}, "
                f"got {self.proof_steps} and {self.recovery_steps}"
            )
