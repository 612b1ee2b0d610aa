"""GC, gradient clipping by the 2-norm, a tensor at a time.

    sigma = min(1, clip_norm / norm2(g))

Source: Pascanu, Mikolov, Bengio, ICML 2013; a tensor at a time and on Adagrad's step as in Tang et al. (KDD 2023).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from optim.hyperparameters import Hyperparameter
from optim.reductions import GRAD_NORM, Settings
from optim.registry import register_rule
from optim.updates import ADAGRAD

CLIP_ACCUMULATOR = Hyperparameter(
    name="clip_accumulator",
    default=False,
    doc="Feed the accumulator the clipped gradient: the step is then that of Adagrad on sigma * g, as after "
    "torch.nn.utils.clip_grad_norm_. False is the paper's form.",
)


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
)
def gc(reduced: Mapping[str, Tensor], settings: Settings) -> Tensor:
    """Return sigma; a gradient of 0 is not clipped."""
    return (settings["clip_norm"] / reduced["grad_norm"]).clamp(max=1.0)
