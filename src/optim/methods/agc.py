"""AGC, adaptive gradient clipping: the norm of the gradient is bounded by a fraction of the norm of the weights.

    sigma = min(1, clip_factor * max(norm2(w), min_norm) / norm2(g))

by="tensor" takes the norms of the whole tensor (Tang et al., KDD 2023). by="unit" takes them per output unit:
row i of a Linear weight [out, in], filter i of a convolution, the whole of a bias or a scalar (Brock et al.).

Source: Brock, De, Smith, Simonyan, "High-Performance Large-Scale Image Recognition Without Normalization", ICML 2021,
eq. 3. Deviation: the paper on ranking has no min_norm (set 0); then a tensor that starts at 0 never moves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Unpack

from torch import Tensor

from optim.hyperparameters import Hyperparameter
from optim.methods.gc import CLIP_ACCUMULATOR, feeds_clipped
from optim.optimizer import Common, Params, SigmaOptimizer
from optim.registry import GRAD_NORM, WEIGHT_NORM, Settings, register_rule
from optim.updates import ADAGRAD


@register_rule(
    "agc",
    summary="Adaptive gradient clipping: norm2(g) is held below a fraction of norm2(w).",
    reference="Brock et al., ICML 2021; Tang et al., KDD 2023",
    update=ADAGRAD,
    reductions=(GRAD_NORM, WEIGHT_NORM),
    hyperparameters=(
        Hyperparameter(
            name="clip_factor",
            default=1e-2,
            low=0.0,
            low_open=True,
            unit="gradient / weight",
            doc="lambda, the largest norm2(g) / norm2(w).",
        ),
        Hyperparameter(
            name="min_norm", default=1e-3, low=0.0, unit="weight", doc="Floor of norm2(w), so that zeros can move."
        ),
        Hyperparameter(
            name="by", default="tensor", choices=("tensor", "unit"), doc="Norms of the tensor, or per output unit."
        ),
        CLIP_ACCUMULATOR,
    ),
    per_unit=lambda settings: settings["by"] == "unit",
    feeds_clipped=feeds_clipped,
)
def agc(reduced: Mapping[str, Tensor], settings: Settings) -> Tensor:
    """Return sigma; a gradient of 0 is not clipped, even where the bound is 0 too."""
    grad_norm = reduced["grad_norm"]
    limit: Tensor = settings["clip_factor"] * reduced["weight_norm"].clamp(min=settings["min_norm"])
    return (limit / grad_norm).clamp(max=1.0).where(grad_norm != 0, 1.0)


class AGC(SigmaOptimizer):
    """Adagrad with sigma = min(1, clip_factor * max(norm2(w), min_norm) / norm2(g)) per tensor or output unit.

    Args and errors are those of `build_optimizer("agc", ...)`.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        *,
        clip_factor: float = 1e-2,
        min_norm: float = 1e-3,
        by: str = "tensor",
        clip_accumulator: bool = False,
        initial_accumulator_value: float = 0.1,
        eps: float = 1e-10,
        **common: Unpack[Common],
    ) -> None:
        own = {"clip_factor": clip_factor, "min_norm": min_norm, "by": by, "clip_accumulator": clip_accumulator}
        adagrad = {"initial_accumulator_value": initial_accumulator_value, "eps": eps}
        super().__init__(params, "agc", lr=lr, **own, **adagrad, **common)
