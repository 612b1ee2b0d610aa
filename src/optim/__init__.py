"""Optimizers of the form w <- w - lr * sigma * r that keep training stable: Clippy, GC, AGC and LAMB on Adagrad.

    optimizer = optim.Clippy(model.parameters(), lr=0.1)
    optimizer = optim.build_optimizer("clippy", model, lr=0.1, embedding={"method": "adagrad"})

This package needs torch and nothing else. README.md beside this file says how to choose.
"""

from optim.factory import build_optimizer
from optim.hyperparameters import Hyperparameter
from optim.methods.agc import AGC
from optim.methods.clippy import Clippy, ClippyAdam, ClippyAdamW, ClippySGD
from optim.methods.gc import GC
from optim.methods.lamb import LAMB, LAMBAdam
from optim.methods.unclipped import Adagrad
from optim.optimizer import SigmaOptimizer
from optim.registry import (
    GRAD_NORM,
    UPDATE_MAX,
    UPDATE_NORM,
    WEIGHT_NORM,
    Coordinates,
    Method,
    Reduction,
    get_info,
    list_optimizers,
    register,
    register_rule,
)
from optim.what_if import what_if

__all__ = [
    "AGC",
    "GC",
    "GRAD_NORM",
    "LAMB",
    "UPDATE_MAX",
    "UPDATE_NORM",
    "WEIGHT_NORM",
    "Adagrad",
    "Clippy",
    "ClippyAdam",
    "ClippyAdamW",
    "ClippySGD",
    "Coordinates",
    "Hyperparameter",
    "LAMBAdam",
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
