"""Stability tools: divergence detection, early signs, sharpness. They use PyTorch alone; ranker.training calls them."""

from ranker.stability.detector import DivergenceDetector
from ranker.stability.detector_interface import DetectorSettings, Event, pack, reduce_signals
from ranker.stability.early_signs import LayerActivations, layer_signs, task_gradients
from ranker.stability.optimizer_state import Preconditioner, ReportsSteps, adaptation, step_preconditioner
from ranker.stability.sharpness import measure_sharpness

__all__ = [
    "DetectorSettings",
    "DivergenceDetector",
    "Event",
    "LayerActivations",
    "Preconditioner",
    "ReportsSteps",
    "adaptation",
    "layer_signs",
    "measure_sharpness",
    "pack",
    "reduce_signals",
    "step_preconditioner",
    "task_gradients",
]
