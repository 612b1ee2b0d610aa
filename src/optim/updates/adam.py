"""Adam, for the rules that carry over to it.

    m_t = beta1 * m_{t-1} + (1 - beta1) * g_t
    v_t = beta2 * v_{t-1} + (1 - beta2) * g_t^2
    r_t = (m_t / (1 - beta1^t)) / (sqrt(v_t / (1 - beta2^t)) + eps)

Source: Kingma, Ba, "Adam", ICLR 2015, Algorithm 1. AdamW is the same update with `decoupled_weight_decay`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from optim.hyperparameters import Hyperparameter
from optim.pages import new_state
from optim.reductions import Settings
from optim.updates.base import Direction


class Adam:
    """Moments are kept in float32 or wider. Sparse gradients move the moments of the touched rows only ("lazy")."""

    name = "adam"
    hyperparameters = (
        Hyperparameter(
            name="betas", default=(0.9, 0.999), low=0.0, high=1.0, high_open=True, doc="Decay of m and of v a step."
        ),
        Hyperparameter(name="eps", default=1e-8, low=0.0, unit="gradient", doc="Added to the root of v."),
    )

    def init(self, weight: Tensor, _settings: Settings) -> dict[str, Tensor]:
        """Return zero moments and a step count of 0, on the device so that nothing waits for it."""
        return {
            "step": torch.zeros((), dtype=torch.float32, device=weight.device),
            "exp_avg": new_state(weight, 0.0),
            "exp_avg_sq": new_state(weight, 0.0),
        }

    def direction(self, grad: Tensor, state: Mapping[str, Tensor], settings: Settings) -> Direction:
        """Return r_t."""
        beta1, beta2 = settings["betas"]
        after = self.advance(grad, state, settings)
        # float64 because 1 - 0.999^t loses half its digits in float32 at t = 1.
        step = after["step"].double()
        correction1 = (1 - beta1**step).to(grad.dtype)
        correction2 = (1 - beta2**step).to(grad.dtype)
        root = (after["exp_avg_sq"] / correction2).sqrt_().add_(settings["eps"])
        return Direction(after["exp_avg"] / correction1 / root, None)

    def advance(self, grad: Tensor, state: Mapping[str, Tensor], settings: Settings) -> dict[str, Tensor]:
        """Return the moments and the count after this gradient."""
        beta1, beta2 = settings["betas"]
        return {
            "step": state["step"] + 1,
            "exp_avg": state["exp_avg"].lerp(grad, 1 - beta1),
            "exp_avg_sq": (state["exp_avg_sq"] * beta2).addcmul_(grad, grad, value=1 - beta2),
        }


ADAM = Adam()
