"""Clippy: sigma per tensor is the largest factor with which no coordinate moves further than its bound.

    b_i   = lambda_rel * abs(w_i) + lambda_abs + lambda_acc * G_i^(-1/2)
    sigma = min(1, min_i b_i / (eta * abs(r_i)))

computed as 1 / max(1, eta * max_i abs(r_i) / b_i): the factor by which the worst coordinate overshoots. A coordinate
with r_i = 0 never limits sigma. One with b_i = 0 and r_i != 0 makes it 0.

With r of Adagrad and the current accumulator abs(r_i) <= 1, so sigma = 1 for certain while eta <= lambda_abs.

Source: Tang et al., "Improving Training Stability for Multitask Ranking Models in Recommender Systems", KDD 2023,
Algorithm 1 (preset "paper"), and TensorFlow Recommenders' ClippyAdagrad (preset "tfrs"), from which lambda_acc comes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Unpack

import torch
from torch import Tensor

from optim.hyperparameters import Hyperparameter
from optim.optimizer import Common, Params, SigmaOptimizer
from optim.registry import Coordinates, Method, Reduction, Settings, register
from optim.updates import ADAGRAD, ADAM, SGD
from optim.updates import Adagrad as AdagradUpdate

LAMBDA_REL = Hyperparameter(
    name="lambda_rel", default=0.5, low=0.0, unit="1", doc="A coordinate's largest move, as a fraction of its weight."
)
LAMBDA_ABS = Hyperparameter(
    name="lambda_abs", default=1e-2, low=0.0, unit="weight", doc="A coordinate's largest move whatever its weight."
)


def bound_terms(at: Coordinates, settings: Settings) -> dict[str, Tensor]:
    """Return the terms that b is the sum of."""
    terms = {
        "relative": settings["lambda_rel"] * at.weight.abs(),
        "absolute": torch.full_like(at.weight, settings["lambda_abs"]),
    }
    if settings.get("lambda_acc", 0.0):
        assert at.scale is not None, "only Adagrad offers lambda_acc"
        terms["accumulator"] = settings["lambda_acc"] * at.scale
    return terms


def overshoot(at: Coordinates, settings: Settings) -> Tensor:
    """Return abs(r_i) / b_i, and 0 where r_i = 0."""
    bound = torch.mul(at.weight.abs(), settings["lambda_rel"]).add_(settings["lambda_abs"])
    if settings.get("lambda_acc", 0.0):
        assert at.scale is not None, "only Adagrad offers lambda_acc"
        bound.add_(at.scale, alpha=settings["lambda_acc"])
    size = at.update.abs()
    return (size / bound).where(size != 0, 0.0)


def bound_coefficients(settings: Settings) -> tuple[float, float, float]:
    """Return the factors of abs(w), 1 and G^(-1/2) in b."""
    return settings["lambda_rel"], settings["lambda_abs"], settings.get("lambda_acc", 0.0)


OVERSHOOT = Reduction("overshoot", "max", overshoot, kernel="overshoot", bound=bound_coefficients)


def clippy(reduced: Mapping[str, Tensor], settings: Settings) -> Tensor:
    """Return sigma. It is 1 for an overshoot of at most 1 / eta, and for eta = 0, where nothing moves."""
    lr = settings["lr"]
    worst: Tensor = reduced["overshoot"] * lr
    if isinstance(lr, Tensor):
        # b_i = 0 makes it infinity * 0. A condition on another device (lr may be on the CPU) would wait for this one.
        worst = worst.where(torch.zeros_like(worst) + lr != 0, 0.0)
    elif lr == 0:
        worst = torch.zeros_like(worst)
    return worst.clamp(min=1.0).reciprocal()


def cannot_clip(settings: Settings) -> bool:
    """Whether Adagrad's abs(r_i) <= 1 keeps every step within lambda_abs. False where eta is a tensor."""
    lr = settings["lr"]
    return not isinstance(lr, Tensor) and settings["accumulator"] == "current" and lr <= settings["lambda_abs"]


def adagrad_for(settings: Settings) -> AdagradUpdate:
    """Return the update: G_{t-1} in place of G_t, and epsilon inside the root, as the authors' code has them."""
    return AdagradUpdate(delayed=settings["accumulator"] == "delayed", epsilon_inside=settings["preset"] == "tfrs")


PRESETS = {
    "paper": {
        "lambda_rel": 0.5,
        "lambda_abs": 1e-2,
        "lambda_acc": 0.0,
        "initial_accumulator_value": 0.1,
        "eps": 1e-10,
        "accumulator": "current",
        "clip_accumulator": False,
    },
    "tfrs": {
        "lambda_rel": 0.1,
        "lambda_abs": 1e-7,
        "lambda_acc": 0.0,
        "initial_accumulator_value": 0.1,
        "eps": 1e-7,
        "accumulator": "delayed",
        "clip_accumulator": False,
    },
}

register(
    Method(
        name="clippy",
        summary="Clippy on Adagrad: the update's infinity norm, relative to a bound, is held below 1.",
        reference="Tang et al., KDD 2023",
        update=ADAGRAD,
        sigma=clippy,
        reductions=(OVERSHOOT,),
        update_for=adagrad_for,
        feeds_clipped=lambda settings: settings["clip_accumulator"],
        never_clips=cannot_clip,
        limiting=OVERSHOOT,
        terms=bound_terms,
        presets=PRESETS,
        hyperparameters=(
            Hyperparameter(
                name="preset",
                default="paper",
                choices=tuple(PRESETS),
                doc="Where unset hyperparameters come from: Algorithm 1, or the authors' code (epsilon in the root).",
            ),
            LAMBDA_REL,
            LAMBDA_ABS,
            Hyperparameter(
                name="lambda_acc",
                default=0.0,
                low=0.0,
                unit="weight * gradient",
                doc="A coordinate's largest move per G^(-1/2); 0 leaves the term out.",
            ),
            Hyperparameter(
                name="accumulator",
                default="current",
                choices=("current", "delayed"),
                doc="Whether r_t divides by the root of G_t or of G_{t-1}.",
            ),
            Hyperparameter(name="clip_accumulator", default=False, doc="Feed the accumulator (sigma * g)^2."),
        ),
    )
)

for _name, _update, _defaults, _what in (
    ("clippy_adam", ADAM, {"lr": 1e-3}, "Adam"),
    ("clippy_adamw", ADAM, {"lr": 1e-3, "weight_decay": 1e-2, "decoupled_weight_decay": True}, "AdamW"),
    ("clippy_sgd", SGD, {}, "plain gradient descent"),
):
    register(
        Method(
            name=_name,
            summary=f"Clippy's bound on the update of {_what}.",
            reference="Tang et al., KDD 2023",
            update=_update,
            sigma=clippy,
            reductions=(OVERSHOOT,),
            limiting=OVERSHOOT,
            terms=bound_terms,
            hyperparameters=(LAMBDA_REL, LAMBDA_ABS),
            defaults=_defaults,
        )
    )


class Clippy(SigmaOptimizer):
    """Adagrad with sigma = min(1, min_i (lambda_rel * abs(w_i) + lambda_abs) / (lr * abs(r_i))) per tensor.

    Args and errors are those of `build_optimizer("clippy", ...)`. None means that the preset decides.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        *,
        preset: str = "paper",
        lambda_rel: float | None = None,
        lambda_abs: float | None = None,
        lambda_acc: float | None = None,
        accumulator: str | None = None,
        clip_accumulator: bool | None = None,
        initial_accumulator_value: float | None = None,
        eps: float | None = None,
        **common: Unpack[Common],
    ) -> None:
        bound = {"lambda_rel": lambda_rel, "lambda_abs": lambda_abs, "lambda_acc": lambda_acc}
        form = {"preset": preset, "accumulator": accumulator, "clip_accumulator": clip_accumulator}
        adagrad = {"initial_accumulator_value": initial_accumulator_value, "eps": eps}
        super().__init__(params, "clippy", lr=lr, **bound, **form, **adagrad, **common)


class ClippyAdam(SigmaOptimizer):
    """Clippy's bound on the update of Adam. Args and errors are those of `build_optimizer("clippy_adam", ...)`."""

    METHOD = "clippy_adam"

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        *,
        lambda_rel: float = 0.5,
        lambda_abs: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **common: Unpack[Common],
    ) -> None:
        bound = {"lambda_rel": lambda_rel, "lambda_abs": lambda_abs}
        super().__init__(params, self.METHOD, lr=lr, **bound, betas=betas, eps=eps, **common)


class ClippyAdamW(ClippyAdam):
    """Clippy's bound on the update of AdamW, with weight_decay = 1e-2, decoupled, unless given.

    Args and errors are those of `build_optimizer("clippy_adamw", ...)`.
    """

    METHOD = "clippy_adamw"


class ClippySGD(SigmaOptimizer):
    """Clippy's bound on gradient descent. Args and errors are those of `build_optimizer("clippy_sgd", ...)`."""

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        *,
        lambda_rel: float = 0.5,
        lambda_abs: float = 1e-2,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, "clippy_sgd", lr=lr, lambda_rel=lambda_rel, lambda_abs=lambda_abs, **common)
