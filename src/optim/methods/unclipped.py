"""Adagrad without clipping: sigma = 1.

w_{t+1} = w_t - eta * r_t: the baseline that the paper's table shows to diverge, and the method for embeddings.
"""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from optim.optimizer import Common, Params, SigmaOptimizer
from optim.registry import Method, register
from optim.updates import ADAGRAD

register(
    Method(
        name="adagrad",
        summary="Adagrad as it is; sigma = 1.",
        reference="Duchi, Hazan, Singer, JMLR 12 (2011)",
        update=ADAGRAD,
    )
)


class Adagrad(SigmaOptimizer):
    """Adagrad, w <- w - lr * g / (sqrt(G) + eps), as in torch.optim.Adagrad(fused=True).

    Args and errors are those of `build_optimizer("adagrad", ...)`.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        *,
        initial_accumulator_value: float = 0.1,
        eps: float = 1e-10,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            params, "adagrad", lr=lr, initial_accumulator_value=initial_accumulator_value, eps=eps, **common
        )
