"""Stability: see a divergence, classify it, measure how near it is. Pure PyTorch; ranker.training calls it."""

from ranker.stability.dead_relus import DeadReluShare
from ranker.stability.detector import DivergenceDetector
from ranker.stability.events import Event
from ranker.stability.settings import DetectorSettings
from ranker.stability.signals import reduce_signals

__all__ = ["DeadReluShare", "DetectorSettings", "DivergenceDetector", "Event", "reduce_signals"]
