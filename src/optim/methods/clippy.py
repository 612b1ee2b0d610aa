"""Clippy: no coordinate moves further than a bound, and the whole tensor slows down together.

    b_i   = lambda_rel * abs(w_i) + lambda_abs + lambda_acc * G_i^(-1/2)
    sigma = min(1, min_i b_i / (eta * abs(r_i)))

computed as 1 / max(1, eta * max_i abs(r_i) / b_i): the factor by which the worst coordinate overshoots. A coordinate
with r_i = 0 never limits sigma; one with b_i = 0 and r_i != 0 makes it 0.

With r of Adagrad and the current accumulator abs(r_i) <= 1, so that sigma = 1 for sure while eta <= lambda_abs.

Source: Tang et al., "Improving Training Stability for Multitask Ranking Models in Recommender Systems", KDD 2023,
Algorithm 1 (preset "paper"), and TensorFlow Recommenders' ClippyAdagrad (preset "tfrs"), from which lambda_acc comes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from optim.hyperparameters import Hyperparameter
from optim.reductions import Coordinates, Reduction, Settings
from optim.registry import Method, register
from optim.updates import ADAGRAD, ADAM, SGD

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


OVERSHOOT = Reduction("overshoot", "max", overshoot)
"""A backend may give any smaller number for one of at most 1 / eta: sigma is 1 either way."""


def clippy(reduced: Mapping[str, Tensor], settings: Settings) -> Tensor:
    """Return sigma; with eta = 0 nothing moves, and it is 1."""
    lr = settings["lr"]
    worst = reduced["overshoot"] * lr
    if isinstance(lr, Tensor):
        worst = worst.where(lr != 0, 0.0)  # b_i = 0 makes it infinity * 0
    elif lr == 0:
        worst = torch.zeros_like(worst)
    return worst.clamp(min=1.0).reciprocal()


def cannot_clip(settings: Settings) -> bool:
    """Whether Adagrad's abs(r_i) <= 1 keeps every step within lambda_abs; False where only the device knows eta."""
    lr = settings["lr"]
    return not isinstance(lr, Tensor) and settings["accumulator"] == "current" and lr <= settings["lambda_abs"]


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
        binding=OVERSHOOT,
        terms=bound_terms,
        idle=cannot_clip,
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
            binding=OVERSHOOT,
            terms=bound_terms,
            hyperparameters=(LAMBDA_REL, LAMBDA_ABS),
            defaults=_defaults,
        )
    )
