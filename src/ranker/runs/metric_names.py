"""Names of the metrics that a run writes, for the code that writes them and for reports and studies that read them.

A name is a path. ``train/loss``, ``train/<task>/<metric>``, ``val/<task>/<metric>``, ``test/<task>/<metric>``,
``progressive/<task>/<metric>``, ``signs/<role>/<sign>``, ``sigma/<parameter>``, ``sharpness/<quantity>``,
``divergence/<kind>``, ``ids/<table>/<quantity>``, and ``lr`` and ``window`` alone. A metric by groups has the group in
its name, as in ``gauc.<group>``.
"""

from __future__ import annotations

TRAIN, VAL, TEST, PROGRESSIVE = "train", "val", "test", "progressive"
TRAIN_LOSS, LEARNING_RATE, WINDOW = "train/loss", "lr", "window"
SIGNS, SIGMA, SHARPNESS, DIVERGENCE, IDS = "signs/", "sigma/", "sharpness/", "divergence/", "ids/"
COMMON = ("auc", "logloss", "ne", "calibration", "rmse", "r2", "observed", "nonfinite")  # metrics that every run has
TASK_NORM, TASK_COSINE = "signs/task_norm/", "signs/task_cosine/"


def task_metric(phase: str, task: str, metric: str) -> str:
    """Name of a metric of a task in a phase (``TRAIN``, ``VAL``, ``TEST``, ``PROGRESSIVE``)."""
    return f"{phase}/{task}/{metric}"


def sign(role: str, name: str) -> str:
    """Name of an early sign of a layer, by the layer's role in ``Ranker.layer_names``."""
    return f"{SIGNS}{role}/{name}"


def sigma(parameter: str) -> str:
    """Name of the clipping factor of a parameter."""
    return f"{SIGMA}{parameter}"


def sharpness(quantity: str) -> str:
    """Name of a quantity that the sharpness probe measures."""
    return f"{SHARPNESS}{quantity}"


def ids(quantity: str) -> str:
    """Name of a quantity of a table that counts its ids, such as ``user/admitted``."""
    return f"{IDS}{quantity}"


def divergence(kind: str) -> str:
    """Name under which an event of a kind is logged; its value is the step of the event."""
    return f"{DIVERGENCE}{kind}"
