"""LAMB: the step's norm is a fixed fraction of the weights', whatever the size of r.

    sigma = trust_coefficient * norm2(w) / norm2(r)      (phi is the identity)

Where norm2(w) or norm2(r) is 0 the ratio is 1, as in the authors' code. Sigma may exceed 1: this rule scales, it does
not clip. `lamb` is LAMB on Adagrad (Tang et al., KDD 2023), `lamb_adam` the original on Adam. In the original weight
decay is part of r: r = m / (sqrt(v) + eps) + weight_decay * w, with m and v corrected for their start at 0.

Source: You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", ICLR 2020, Algorithm 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Unpack

from torch import Tensor

from optim.hyperparameters import Hyperparameter
from optim.optimizer import Common, Params, SigmaOptimizer
from optim.registry import UPDATE_NORM, WEIGHT_NORM, Settings, register_rule
from optim.updates import ADAGRAD, LAMB_ADAM


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
    update=LAMB_ADAM,
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
    sigma: Tensor = settings["trust_coefficient"] * ratio
    return sigma


class LAMB(SigmaOptimizer):
    """Adagrad with sigma = trust_coefficient * norm2(w) / norm2(r) per tensor.

    Args and errors are those of `build_optimizer("lamb", ...)`.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        *,
        trust_coefficient: float = 1e-2,
        initial_accumulator_value: float = 0.1,
        eps: float = 1e-10,
        **common: Unpack[Common],
    ) -> None:
        adagrad = {"initial_accumulator_value": initial_accumulator_value, "eps": eps}
        super().__init__(params, "lamb", lr=lr, trust_coefficient=trust_coefficient, **adagrad, **common)


class LAMBAdam(SigmaOptimizer):
    """LAMB as published: Adam with sigma = trust_coefficient * norm2(w) / norm2(r) per tensor.

    r = m / (sqrt(v) + eps) + weight_decay * w. With decoupled_weight_decay the decay is beside the step, as in AdamW.

    Args and errors are those of `build_optimizer("lamb_adam", ...)`.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        *,
        trust_coefficient: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            params, "lamb_adam", lr=lr, trust_coefficient=trust_coefficient, betas=betas, eps=eps, **common
        )
