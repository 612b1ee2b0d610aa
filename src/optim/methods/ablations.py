"""Ablations of Clippy: its bound on the update or on the gradient, by the infinity norm or by the 2-norm.

With b of Clippy (methods/clippy.py), b_i = lambda_rel * abs(w_i) + lambda_abs:

    clippy                     sigma = min(1, min_i b_i / (eta * abs(r_i)))     the update, infinity norm
    clippy_norm2               sigma = min(1, norm2(b) / (eta * norm2(r)))      the update, 2-norm
    clippy_gradient            sigma = min(1, min_i b_i / abs(g_i))             the gradient, infinity norm
    clippy_gradient_norm2      sigma = min(1, norm2(b) / norm2(g))              the gradient, 2-norm

All step along Adagrad's r. A bound on the gradient ignores the learning rate and the accumulator, so lambda has another
unit there than in a bound on the update. Search it separately.

Source: Tang et al., KDD 2023, section 4, names the two changes against AGC; these rules make them one at a time.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from optim.methods.clippy import LAMBDA_ABS, LAMBDA_REL
from optim.registry import GRAD_NORM, UPDATE_NORM, Coordinates, Reduction, Settings, register_rule
from optim.updates import ADAGRAD


def bound(at: Coordinates, settings: Settings) -> Tensor:
    """Return b."""
    limit: Tensor = (settings["lambda_rel"] * at.weight.abs()).add_(settings["lambda_abs"])
    return limit


def gradient_overshoot(at: Coordinates, settings: Settings) -> Tensor:
    """Return abs(g_i) / b_i, and 0 where g_i = 0."""
    size = at.grad.abs()
    return (size / bound(at, settings)).where(size != 0, 0.0)


BOUND_NORM = Reduction("bound_norm", "norm", bound)
GRADIENT_OVERSHOOT = Reduction("gradient_overshoot", "max", gradient_overshoot)


@register_rule(
    "clippy_norm2",
    summary="Clippy's bound on the update, by the 2-norm.",
    reference="an ablation of Tang et al., KDD 2023",
    update=ADAGRAD,
    reductions=(BOUND_NORM, UPDATE_NORM),
    hyperparameters=(LAMBDA_REL, LAMBDA_ABS),
)
def clippy_norm2(reduced: Mapping[str, Tensor], settings: Settings) -> Tensor:
    """Return sigma."""
    return _ratio(reduced["bound_norm"], reduced["update_norm"] * settings["lr"])


@register_rule(
    "clippy_gradient",
    summary="Clippy's bound on the gradient, by the infinity norm.",
    reference="an ablation of Tang et al., KDD 2023",
    update=ADAGRAD,
    reductions=(GRADIENT_OVERSHOOT,),
    hyperparameters=(LAMBDA_REL, LAMBDA_ABS),
)
def clippy_gradient(reduced: Mapping[str, Tensor], settings: Settings) -> Tensor:  # noqa: ARG001
    """Return sigma."""
    return reduced["gradient_overshoot"].clamp(min=1.0).reciprocal()


@register_rule(
    "clippy_gradient_norm2",
    summary="Clippy's bound on the gradient, by the 2-norm.",
    reference="an ablation of Tang et al., KDD 2023",
    update=ADAGRAD,
    reductions=(BOUND_NORM, GRAD_NORM),
    hyperparameters=(LAMBDA_REL, LAMBDA_ABS),
)
def clippy_gradient_norm2(reduced: Mapping[str, Tensor], settings: Settings) -> Tensor:  # noqa: ARG001
    """Return sigma."""
    return _ratio(reduced["bound_norm"], reduced["grad_norm"])


def _ratio(limit: Tensor, size: Tensor) -> Tensor:
    """Return min(1, limit / size); a size of 0 is not clipped, even where the limit is 0 too."""
    return (limit / size).clamp(max=1.0).where(size != 0, 1.0)
