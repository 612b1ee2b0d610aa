"""Ranking models: plain torch modules that map a ``Batch`` to logits_BT, built from a schema and layer widths.

Shape legend: B batch, F dense features, C one-hot features, R ragged features, D width of an input or embedding,
T tasks, E experts, H hidden.
"""

from __future__ import annotations

from ranker.models.moe import MMoE
from ranker.models.ple import PLE
from ranker.models.ranker_base import Ranker
from ranker.models.shared_bottom import SharedBottom

__all__ = ["PLE", "MMoE", "Ranker", "SharedBottom"]
