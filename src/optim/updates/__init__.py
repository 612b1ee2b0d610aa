"""Updates: how a gradient becomes the direction r that a rule then scales by sigma."""

from optim.updates.adagrad import ADAGRAD
from optim.updates.adam import ADAM
from optim.updates.base import Direction, Update
from optim.updates.sgd import SGD

__all__ = ["ADAGRAD", "ADAM", "SGD", "Direction", "Update"]
