"""GC, gradient clipping by the 2-norm of each tensor.

    sigma = min(1, clip_norm / norm2(g))

Source: Pascanu, Mikolov, Bengio, ICML 2013; per tensor and on Adagrad's step as in Tang et al. (KDD 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Unpack

from torch import Tensor

from optim.hyperparameters import Hyperparameter
from optim.optimizer import Common, Params, SigmaOptimizer
from optim.registry import GRAD_NORM, Settings, register_rule
from optim.updates import ADAGRAD

CLIP_ACCUMULATOR = Hyperparameter(
    name="clip_accumulator",
    default=False,
    doc="Feed the accumulator the clipped gradient: the step is then that of Adagrad on sigma * g, as after "
    "torch.nn.utils.clip_grad_norm_. False is the paper's form.",
)


def feeds_clipped(settings: Settings) -> bool:
    """Whether the accumulator is fed the clipped gradient."""
    return bool(settings["clip_accumulator"])


@register_rule(
    "gc",
    summary="Gradient clipping: the gradient's 2-norm is held below a constant.",
    reference="Pascanu, Mikolov, Bengio, ICML 2013; Tang et al., KDD 2023",
    update=ADAGRAD,
    reductions=(GRAD_NORM,),
    hyperparameters=(
        Hyperparameter(
            name="clip_norm", default=1e-1, low=0.0, low_open=True, unit="gradient", doc="lambda, the largest norm2(g)."
        ),
        CLIP_ACCUMULATOR,
    ),
    feeds_clipped=feeds_clipped,
)
def gc(reduced: Mapping[str, Tensor], settings: Settings) -> Tensor:
    """Return sigma; a gradient of 0 is not clipped."""
    sigma: Tensor = (settings["clip_norm"] / reduced["grad_norm"]).clamp(max=1.0)
    return sigma


class GC(SigmaOptimizer):
    """Adagrad with sigma = min(1, clip_norm / norm2(g)) per tensor.

    Args and errors are those of `build_optimizer("gc", ...)`.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        *,
        clip_norm: float = 1e-1,
        clip_accumulator: bool = False,
        initial_accumulator_value: float = 0.1,
        eps: float = 1e-10,
        **common: Unpack[Common],
    ) -> None:
        own = {"clip_norm": clip_norm, "clip_accumulator": clip_accumulator}
        adagrad = {"initial_accumulator_value": initial_accumulator_value, "eps": eps}
        super().__init__(params, "gc", lr=lr, **own, **adagrad, **common)
