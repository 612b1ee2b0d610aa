"""Optimizers of the form w <- w - lr * sigma * r that keep training stable: Clippy, GC, AGC and LAMB on Adagrad.

    optimizer = optim.build_optimizer("clippy", model, lr=0.1, embedding={"method": "adagrad"})

This package needs torch and nothing else. Read README.md beside this file for how to choose.
"""

from optim.build import build_optimizer
from optim.hyperparameters import Hyperparameter
from optim.optimizer import SigmaOptimizer
from optim.reductions import GRAD_NORM, UPDATE_MAX, UPDATE_NORM, WEIGHT_NORM, Coordinates, Reduction
from optim.registry import Method, get_info, list_optimizers, register, register_rule
from optim.what_if import what_if

__all__ = [
    "GRAD_NORM",
    "UPDATE_MAX",
    "UPDATE_NORM",
    "WEIGHT_NORM",
    "Coordinates",
    "Hyperparameter",
    "Method",
    "Reduction",
    "SigmaOptimizer",
    "build_optimizer",
    "get_info",
    "list_optimizers",
    "register",
    "register_rule",
    "what_if",
]
