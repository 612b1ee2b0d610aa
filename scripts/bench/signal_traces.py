"""Generated traces of signals with known events, for the detector's tests and its benchmark."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

TASKS = ("click", "like", "follow", "watch_time")
_ROWS = 1024  # rows per batch
_POSITIVE = (0.4, 0.03, 0.0005)  # share of positives per binary task
_AUC = (0.7, 0.72, 0.65)
_MEMORY = 100  # number of steps that the running AUC averages over


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Signals of a run, one row per step. The first step is step 1.

    Attributes:
        losses_NT: loss per task.
        auc_NT: training AUC per task; nan for the regression.
        spread_NT: standard deviation of the logits per task.
        nonfinite_N: whether a prediction is not finite.
        batch_auc_NT: AUC of each batch alone per task; nan for the regression.
        positives_NT: positive labels of each batch per task; 0 for the regression.
        variance_NT: variance of the labels of each batch per task.
        eval_auc_T: AUC per task on the hold-out after the last step.
    """

    losses_NT: Tensor
    auc_NT: Tensor
    spread_NT: Tensor
    nonfinite_N: Tensor
    batch_auc_NT: Tensor
    positives_NT: Tensor
    variance_NT: Tensor
    eval_auc_T: Tensor

    def __len__(self) -> int:
        return len(self.losses_NT)

    def signals(self, i: int) -> dict[str, Tensor]:
        """The signals of step i + 1, as keyword arguments of ``DivergenceDetector.update``."""
        return {
            "losses_T": self.losses_NT[i],
            "auc_T": self.auc_NT[i],
            "spread_T": self.spread_NT[i],
            "nonfinite": self.nonfinite_N[i],
            "batch_auc_T": self.batch_auc_NT[i],
            "positives_T": self.positives_NT[i],
            "labels_T": torch.full_like(self.losses_NT[i], _ROWS),
            "variance_T": self.variance_NT[i],
        }


def healthy(
    *, steps: int, seed: int, learned_after: int = 60, drift: float = 0.2, skill: float = 1.0, wild: int = 0
) -> Trace:
    """A run without events, with the noise of real runs.

    Losses fall from those of an untrained model. The noise of a binary task comes from its number of positives
    (Poisson, down to one positive in two batches). The noise of the regression is heavy-tailed (mean of squared
    lognormal errors). Levels drift as sine waves with a different period per task.

    Args:
        steps: number of steps N.
        seed: seed of the noise.
        learned_after: number of steps in which the distance from the best possible loss falls by a factor of e.
        drift: amplitude of the drift of the logarithm of the loss.
        skill: factor on AUC - 0.5; 0 for a model that learns nothing.
        wild: number of first steps with losses up to 1,000 times as high, as with Adagrad at a high learning rate.
    """
    g = torch.Generator().manual_seed(seed)
    n = torch.arange(1, steps + 1, dtype=torch.float64)
    learned_N = 1.0 - torch.exp(-n / learned_after)
    positive_B = torch.tensor(_POSITIVE, dtype=torch.float64)
    phase_T = 2 * math.pi * torch.rand(len(TASKS), generator=g)
    period_T = torch.tensor([3000.0, 2000.0, 2500.0, 4000.0])
    wave_NT = torch.exp(drift * torch.sin(2 * math.pi * n[:, None] / period_T + phase_T))

    count_NB = torch.poisson(_ROWS * positive_B * wave_NT[:, :-1].double(), generator=g)
    p_NB = (count_NB / _ROWS).clamp(max=0.95)
    gap_NB = torch.log(positive_B * wave_NT[:, :-1])
    known_NB = -(p_NB * gap_NB + (1 - p_NB) * torch.log1p(-torch.exp(gap_NB).clamp(max=0.95)))
    noise_N = torch.exp(1.2 * torch.randn(steps, 64, generator=g)).mean(1) / math.exp(0.72)
    known_NT = torch.cat([0.95 * known_NB, (2.0 * noise_N * wave_NT[:, -1]).double()[:, None]], dim=1)
    untrained_T = torch.tensor([0.7, 0.7, 0.7, 8.0], dtype=torch.float64)
    losses_NT = known_NT + (1 - learned_N)[:, None] * (untrained_T - known_NT.mean(0)).clamp(min=0)
    losses_NT[0] = untrained_T
    if wild:
        losses_NT[1:wild] *= 10 ** (3 * torch.rand(wild - 1, 1, generator=g))

    auc_NB = 0.5 + skill * learned_N[:, None] * (torch.tensor(_AUC, dtype=torch.float64) - 0.5)
    positives_NB = _ROWS * positive_B * n.clamp(max=_MEMORY)[:, None]
    slow_NB = _smooth(torch.randn(steps, 3, generator=g)).double()
    negatives_NB = _ROWS - count_NB
    pairs_NB = (count_NB * negatives_NB / _ROWS).clamp(min=1e-3)
    batch_NB = auc_NB + 0.29 * torch.randn(steps, 3, generator=g).double() / pairs_NB.sqrt()
    batch_NB = torch.where(count_NB > 0, batch_NB.clamp(0, 1), math.nan)
    auc_NB = (auc_NB + 0.29 * slow_NB / positives_NB.sqrt()).clamp(0, 1)
    return Trace(
        losses_NT=losses_NT.float(),
        auc_NT=torch.cat([auc_NB, torch.full((steps, 1), math.nan)], dim=1).float(),
        spread_NT=0.3 + 0.5 * learned_N[:, None].float() * torch.rand(steps, len(TASKS), generator=g),
        nonfinite_N=torch.zeros(steps, dtype=torch.bool),
        batch_auc_NT=torch.cat([batch_NB, torch.full((steps, 1), math.nan)], dim=1).float(),
        positives_NT=torch.cat([count_NB, torch.zeros(steps, 1)], dim=1).float(),
        variance_NT=torch.cat([p_NB * (1 - p_NB), 40.0 * wave_NT[:, -1:].double()], dim=1).float(),
        eval_auc_T=torch.cat([0.5 + skill * (torch.tensor(_AUC) - 0.5), torch.tensor([math.nan])]),
    )


def spike(trace: Trace, *, at: int, length: int, factor: float, tasks: slice = slice(None)) -> Trace:
    """Losses ``factor`` times as high in steps ``at`` to ``at + length - 1``; the second half decays by e."""
    losses_NT = trace.losses_NT.clone()
    k = torch.arange(min(length, len(trace) + 1 - at))
    decay = torch.exp(-2 * (k - length // 2).clamp(min=0) / length)
    part = slice(at - 1, at - 1 + len(k))
    losses_NT[part, tasks] *= (1 + (factor - 1) * decay)[:, None]
    return replace(trace, losses_NT=losses_NT)


def not_a_number(trace: Trace, *, at: int, length: int) -> Trace:
    """Losses and predictions that are nan in ``length`` steps."""
    losses_NT, nonfinite_N = trace.losses_NT.clone(), trace.nonfinite_N.clone()
    losses_NT[at - 1 : at - 1 + length] = math.nan
    nonfinite_N[at - 1 : at - 1 + length] = True
    return replace(trace, losses_NT=losses_NT, nonfinite_N=nonfinite_N)


def blow_up(trace: Trace, *, at: int, rate: float) -> Trace:
    """Losses that grow by ``rate`` per step from step ``at`` on, up to 10,000 times, and AUCs that fall to 0.5."""
    k = (torch.arange(len(trace)) - (at - 1)).clamp(min=0)
    growth_N = torch.exp((rate * k).clamp(max=math.log(1e4)))
    return replace(forget(trace, at=at + int(1 / rate)), losses_NT=trace.losses_NT * growth_N[:, None])


def step_up(trace: Trace, *, at: int, factor: float) -> Trace:
    """Losses ``factor`` times as high from step ``at`` on, and AUCs that fall to 0.5."""
    losses_NT = trace.losses_NT.clone()
    losses_NT[at - 1 :] *= factor
    return replace(forget(trace, at=at), losses_NT=losses_NT)


def forget(trace: Trace, *, at: int) -> Trace:
    """AUCs that fall to 0.5 from step ``at`` on, as fast as a running average; losses do not change."""
    k = (torch.arange(len(trace)) - (at - 1)).clamp(min=0)
    kept_N = torch.exp(-3.0 * k / _MEMORY)
    eval_auc_T = torch.where(trace.eval_auc_T.isnan(), math.nan, 0.5)
    batch_auc_NT = trace.batch_auc_NT.clone()
    batch_auc_NT[at - 1 :] -= (trace.eval_auc_T - 0.5).nan_to_num()
    return replace(
        trace,
        auc_NT=0.5 + (trace.auc_NT - 0.5) * kept_N[:, None],
        batch_auc_NT=batch_auc_NT.clamp(0, 1),
        eval_auc_T=eval_auc_T,
    )


def die(trace: Trace, *, at: int) -> Trace:
    """Predictions that do not depend on the input from step ``at`` on; losses are 5 % higher."""
    losses_NT, spread_NT = trace.losses_NT.clone(), trace.spread_NT.clone()
    losses_NT[at - 1 :] *= 1.05
    spread_NT[at - 1 :] = 0.0
    return replace(forget(trace, at=at), losses_NT=losses_NT, spread_NT=spread_NT)


def _smooth(noise_NB: Tensor) -> Tensor:
    """Noise averaged over ``_MEMORY`` steps, with standard deviation 1."""
    steps = len(noise_NB)
    kernel = torch.ones(1, 1, _MEMORY) / math.sqrt(_MEMORY)
    padded = torch.nn.functional.pad(
        noise_NB.T[:, None], (_MEMORY - 1, 0), mode="reflect" if steps > _MEMORY else "constant"
    )
    return torch.nn.functional.conv1d(padded, kernel)[:, 0, :steps].T
