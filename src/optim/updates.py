"""The updates: how Adagrad, Adam and gradient descent turn a gradient into the direction r that sigma scales.

Adagrad, the update of the paper's family (Duchi, Hazan, Singer, JMLR 12, 2011; epsilon as in torch.optim.Adagrad):

    G_t = G_{t-1} + g_t^2        G_0 = initial_accumulator_value
    r_t = g_t / (sqrt(G_t) + eps)

Adam (Kingma, Ba, ICLR 2015, Algorithm 1). AdamW is the same update with `decoupled_weight_decay`:

    m_t = beta1 * m_{t-1} + (1 - beta1) * g_t
    v_t = beta2 * v_{t-1} + (1 - beta2) * g_t^2
    r_t = (m_t / (1 - beta1^t)) / (sqrt(v_t / (1 - beta2^t)) + eps)

LAMB's weight decay joins the direction after the moments (You et al., ICLR 2020, Algorithm 2), so that sigma sees it:

    r_t = (m_t / (1 - beta1^t)) / (sqrt(v_t / (1 - beta2^t)) + eps) + weight_decay * w_t

Gradient descent: r_t = g_t, no state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from optim.hyperparameters import Hyperparameter
from optim.registry import Direction, Settings


def _state_like(weight: Tensor, value: float) -> Tensor:
    """Return a tensor like a weight, filled with a number, in float32 where the weight's dtype is narrower."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.full_like(weight, value, dtype=dtype, memory_format=torch.preserve_format)


@dataclass(frozen=True, slots=True)
class Adagrad:
    """G is kept in the parameter's dtype, or in float32 where that is narrower.

    Attributes:
        delayed: Whether r_t divides by the root of G_{t-1}, not G_t.
        epsilon_inside: Whether epsilon is added under the root: r_t = g_t / sqrt(G_t + eps).
    """

    delayed: bool = False
    epsilon_inside: bool = False

    @property
    def hyperparameters(self) -> tuple[Hyperparameter, ...]:
        """G_0 and epsilon."""
        return _ADAGRAD_HYPERPARAMETERS

    def init(self, weight: Tensor, settings: Settings) -> dict[str, Tensor]:
        """Return G_0."""
        return {"sum": _state_like(weight, settings["initial_accumulator_value"])}

    def direction(self, grad: Tensor, state: Mapping[str, Tensor], settings: Settings) -> Direction:
        """Return r_t, and its factor 1 / (sqrt(G) + eps) as the scale."""
        total = state["sum"]
        if not self.delayed:
            total = torch.addcmul(total, grad, grad)
        eps = settings["eps"]
        scale = (total + eps).rsqrt() if self.epsilon_inside else total.sqrt().add_(eps).reciprocal_()
        return Direction(grad * scale, scale)

    def advance(self, grad: Tensor, state: Mapping[str, Tensor], _settings: Settings) -> dict[str, Tensor]:
        """Return G_t."""
        return {"sum": torch.addcmul(state["sum"], grad, grad)}


_ADAGRAD_HYPERPARAMETERS = (
    Hyperparameter(
        name="initial_accumulator_value", default=0.1, low=0.0, unit="gradient^2", doc="G_0 of every coordinate."
    ),
    Hyperparameter(name="eps", default=1e-10, low=0.0, unit="gradient", doc="Added to the root of G."),
)


@dataclass(frozen=True, slots=True)
class Adam:
    """Moments are kept in float32 or wider. Sparse gradients move the moments of the touched rows only ("lazy").

    Attributes:
        decays_update: Whether weight decay that is not decoupled is added to r, as in LAMB, not to g.
    """

    decays_update: bool = False

    @property
    def hyperparameters(self) -> tuple[Hyperparameter, ...]:
        """The decays of the moments, and epsilon."""
        return _ADAM_HYPERPARAMETERS

    def init(self, weight: Tensor, _settings: Settings) -> dict[str, Tensor]:
        """Return zero moments and a step count of 0, on the device so that no step waits for it."""
        return {
            "step": torch.zeros((), dtype=torch.float32, device=weight.device),
            "exp_avg": _state_like(weight, 0.0),
            "exp_avg_sq": _state_like(weight, 0.0),
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


_ADAM_HYPERPARAMETERS = (
    Hyperparameter(
        name="betas", default=(0.9, 0.999), low=0.0, high=1.0, high_open=True, doc="Decay of m and of v per step."
    ),
    Hyperparameter(name="eps", default=1e-8, low=0.0, unit="gradient", doc="Added to the root of v."),
)


class GradientDescent:
    """The gradient itself is the direction."""

    hyperparameters: tuple[Hyperparameter, ...] = ()

    def init(self, _weight: Tensor, _settings: Settings) -> dict[str, Tensor]:
        """Return no state."""
        return {}

    def direction(self, grad: Tensor, _state: Mapping[str, Tensor], _settings: Settings) -> Direction:
        """Return g_t."""
        return Direction(grad, None)

    def advance(self, _grad: Tensor, _state: Mapping[str, Tensor], _settings: Settings) -> dict[str, Tensor]:
        """Return no state."""
        return {}


ADAGRAD = Adagrad()
ADAM = Adam()
LAMB_ADAM = Adam(decays_update=True)
SGD = GradientDescent()
