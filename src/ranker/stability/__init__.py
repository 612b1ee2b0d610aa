"""Stability: see a divergence, classify it, measure how near it is. Pure PyTorch; ranker.training calls it."""

from ranker.stability.activations import Activations, LayerActivations, infinity_norm
from ranker.stability.dead_relus import DeadReluShare
from ranker.stability.detector import DivergenceDetector
from ranker.stability.detector_settings import DetectorSettings
from ranker.stability.early_signs import LayerSigns, TaskGradients, layer_signs, task_gradients
from ranker.stability.event import Event
from ranker.stability.lanczos import Ritz, largest_eigenvalue
from ranker.stability.optimizer_state import Preconditioner, ReportsSteps, step_preconditioner
from ranker.stability.sharpness import Sharpness, hessian_product, measure_sharpness
from ranker.stability.step_signals import reduce_signals

__all__ = [
    "Activations",
    "DeadReluShare",
    "DetectorSettings",
    "DivergenceDetector",
    "Event",
    "LayerActivations",
    "LayerSigns",
    "Preconditioner",
    "ReportsSteps",
    "Ritz",
    "Sharpness",
    "TaskGradients",
    "hessian_product",
    "infinity_norm",
    "largest_eigenvalue",
    "layer_signs",
    "measure_sharpness",
    "reduce_signals",
    "step_preconditioner",
    "task_gradients",
]
