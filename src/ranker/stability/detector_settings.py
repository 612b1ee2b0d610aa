"""What can be tuned in the detector, with units."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ranker.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DetectorSettings:
    """Settings of ``DivergenceDetector``.

    A loss is high when it lies above its baseline by more than all three of ``jump_ratio``, ``jump_scales`` and
    ``jump_floor`` ask for. Each guards against one kind of noise: drift of a quiet loss, heavy tails, and rare
    positives (one more of them multiplies the loss of a task with a positive in a thousand rows).

    Attributes:
        window: steps, accepted losses that the baseline is the median of.
        jump_ratio: a high loss is at least so many times the baseline.
        jump_scales: and above it by so many robust standard deviations.
        jump_floor: and above it by this share of the task's very first loss, that of the untrained model.
        outlier_steps: steps that a jump of less than half of the tasks must last: one row far out lifts a squared error
            30 times for one step, and the model is none the worse.
        lone_factor: where there is one task only, a shorter jump must lie so many times further above.
        max_rise: steps in which the baseline may double at most; a loss that grows faster is no drift.
        startup: steps at the start in which a jump that is over is no event: the first steps of Adagrad are wild.
        settle: steps in a row below the threshold until a jump is over.
        patience: steps that a jump may last; recovering takes a model 10 to 300.
        lost_ratio: at the end of patience, a loss this many times its baseline, of most tasks, means a lost model.
        lost_ratio_alone: the same for a single task.
        blowup_ratio: a jump to this many times a task's very first loss is a blow-up: a model that has learned nothing
            after one is lost, without one it may be slow.
        nonfinite_patience: steps in a row with a loss or prediction that is not finite.
        dead_spread: standard deviation of logits below which predictions do not depend on the input.
        dead_patience: steps in a row with all tasks below it.
        unborn_patience: the same for a model that never was above it (heads may start at zero, under warm-up).
        auc_tolerance: a mean AUC less than this above 0.5 is none (see ``skill``).
        auc_patience: steps in a row at which the AUC is back at 0.5, or has stayed there after a blow-up.
        lost_ne: normalised entropy on the hold-out (log loss over that of always predicting the base rate), median over
            the binary tasks, from which on a model whose median AUC there is at 0.5 is lost.
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
    lost_ne: float = 3.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise UserError(f"divergence detector: {field.name} must be a number above 0, got {value!r}")
        for name, least in (("window", 16), ("jump_ratio", 1.0), ("lost_ratio", self.jump_ratio)):
            if getattr(self, name) < least:
                raise UserError(f"divergence detector: {name} must be at least {least:g}, got {getattr(self, name):g}")
