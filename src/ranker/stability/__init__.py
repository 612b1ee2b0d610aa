"""Stability tools: divergence detection, early signs, sharpness. They use PyTorch alone; ranker.training calls them.

A name is imported when it is first asked for, because ``--help`` needs the detector's settings and not PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ranker.stability.detector import DivergenceDetector
    from ranker.stability.detector_interface import Event, pack, reduce_signals
    from ranker.stability.detector_settings import DetectorSettings
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
_MODULES = {
    "DivergenceDetector": "detector",
    "Event": "detector_interface",
    "pack": "detector_interface",
    "reduce_signals": "detector_interface",
    "DetectorSettings": "detector_settings",
    "LayerActivations": "early_signs",
    "layer_signs": "early_signs",
    "task_gradients": "early_signs",
    "Preconditioner": "optimizer_state",
    "ReportsSteps": "optimizer_state",
    "adaptation": "optimizer_state",
    "step_preconditioner": "optimizer_state",
    "measure_sharpness": "sharpness",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = found
    return found
