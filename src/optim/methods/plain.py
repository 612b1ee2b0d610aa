"""Naive Adagrad: sigma = 1.

w_{t+1} = w_t - eta * r_t, the baseline that the paper's table shows to diverge, and what embeddings keep.
"""

from __future__ import annotations

from optim.registry import Method, register
from optim.updates import ADAGRAD

register(
    Method(
        name="adagrad",
        summary="Adagrad as it is; sigma = 1.",
        reference="Duchi, Hazan, Singer, JMLR 12 (2011)",
        update=ADAGRAD,
    )
)
