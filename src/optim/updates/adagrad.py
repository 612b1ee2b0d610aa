"""Adagrad, the update of the paper's family.

    G_t = G_{t-1} + g_t^2        G_0 = initial_accumulator_value
    r_t = g_t / (sqrt(G_t) + eps)

Source: Duchi, Hazan, Singer, "Adaptive Subgradient Methods", JMLR 12 (2011); epsilon as in torch.optim.Adagrad.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from optim.hyperparameters import Hyperparameter
from optim.pages import new_state
from optim.reductions import Settings
from optim.updates.base import Direction

ARRANGEMENT = ("preset", "accumulator", "clip_accumulator")
"""Settings of some rules that belong to the update: they change r or G, not sigma."""


def reads_previous(settings: Settings) -> bool:
    """Whether r_t uses G_{t-1} (the accumulator is "delayed") and not G_t."""
    return settings.get("accumulator", "current") == "delayed"


def epsilon_inside(settings: Settings) -> bool:
    """Whether epsilon stands inside the root, (G + eps)^(-1/2), as the authors' code has it."""
    return settings.get("preset") == "tfrs"


class Adagrad:
    """G is kept in the parameter's dtype, and in float32 where that is narrower.

    Deviations on request: `accumulator="delayed"` divides by the root of G_{t-1}; `preset="tfrs"` puts epsilon inside
    the root.
    """

    name = "adagrad"
    hyperparameters = (
        Hyperparameter(
            name="initial_accumulator_value", default=0.1, low=0.0, unit="gradient^2", doc="G_0 of every coordinate."
        ),
        Hyperparameter(name="eps", default=1e-10, low=0.0, unit="gradient", doc="Added to the root of G."),
    )

    def init(self, weight: Tensor, settings: Settings) -> dict[str, Tensor]:
        """Return G_0."""
        return {"sum": new_state(weight, settings["initial_accumulator_value"])}

    def direction(self, grad: Tensor, state: Mapping[str, Tensor], settings: Settings) -> Direction:
        """Return r_t, and G^(-1/2) as its scale."""
        total = state["sum"]
        if not reads_previous(settings):
            total = torch.addcmul(total, grad, grad)
        eps = settings["eps"]
        scale = (total + eps).rsqrt() if epsilon_inside(settings) else total.sqrt().add_(eps).reciprocal_()
        return Direction(grad * scale, scale)

    def advance(self, grad: Tensor, state: Mapping[str, Tensor], _settings: Settings) -> dict[str, Tensor]:
        """Return G_t."""
        return {"sum": torch.addcmul(state["sum"], grad, grad)}


ADAGRAD = Adagrad()
