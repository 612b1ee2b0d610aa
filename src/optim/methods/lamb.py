"""LAMB: the step's norm is a fixed fraction of the weights', whatever the size of r.

    sigma = trust_coefficient * norm2(w) / norm2(r)      (phi is the identity)

Where norm2(w) or norm2(r) is 0 the ratio is 1, as in the authors' code. Sigma may exceed 1: this rule scales, it does
not clip. `lamb` is LAMB on Adagrad (Tang et al., KDD 2023); `lamb_adam` the original on Adam, where weight decay
joins r before the norm.

Source: You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", ICLR 2020, Algorithm 2.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from optim.hyperparameters import Hyperparameter
from optim.reductions import UPDATE_NORM, WEIGHT_NORM, Settings
from optim.registry import register_rule
from optim.updates import ADAGRAD, ADAM


def trust_coefficient(default: float) -> Hyperparameter:
    """Return mu with the default of one variant."""
    return Hyperparameter(
        name="trust_coefficient",
        default=default,
        low=0.0,
        low_open=True,
        unit="none",
        doc="mu, the step's norm over the weights' at learning rate 1.",
    )


@register_rule(
    "lamb_adam",
    summary="LAMB on Adam, the original.",
    reference="You et al., ICLR 2020",
    update=ADAM,
    reductions=(WEIGHT_NORM, UPDATE_NORM),
    hyperparameters=(trust_coefficient(1.0),),
    defaults={"lr": 1e-3, "eps": 1e-6},
)
@register_rule(
    "lamb",
    summary="LAMB on Adagrad: every tensor moves by a fixed fraction of its norm.",
    reference="You et al., ICLR 2020; Tang et al., KDD 2023",
    update=ADAGRAD,
    reductions=(WEIGHT_NORM, UPDATE_NORM),
    hyperparameters=(trust_coefficient(1e-2),),
)
def lamb(reduced: Mapping[str, Tensor], settings: Settings) -> Tensor:
    """Return sigma."""
    weight_norm, update_norm = reduced["weight_norm"], reduced["update_norm"]
    ratio = (weight_norm / update_norm).where((weight_norm != 0) & (update_norm != 0), 1.0)
    return settings["trust_coefficient"] * ratio
