"""The moving average of the weights is part of a snapshot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ranker.training.fit import Fit
from ranker.training.snapshots import capture, restore
from ranker.training.weight_average import WeightAverage
from support import assert_equal


def test_a_rollback_takes_the_average_back(fit: Callable[..., Any]) -> None:
    trainer = fit()
    running = Fit(trainer)
    running.module.average = WeightAverage(running.module.net, decay=0.5)
    state = capture(running, None)
    kept = {name: value.clone() for name, value in running.module.average.state_dict().items()}
    with torch.no_grad():
        for parameter in running.module.net.parameters():
            parameter.add_(1.0)
    running.module.average.update()
    assert not torch.equal(
        kept["bottom.layers.0.weight"], running.module.average.state_dict()["bottom.layers.0.weight"]
    )
    restore(state, running, None)
    assert_equal(kept, running.module.average.state_dict())


def test_a_checkpoint_in_the_middle_of_an_evaluation_has_both_in_their_places(fit: Callable[..., Any]) -> None:
    running = Fit(fit())
    module = running.module
    module.average = WeightAverage(module.net, decay=0.5)
    with torch.no_grad():
        for parameter in module.net.parameters():
            parameter.add_(1.0)
    own = {name: value.clone() for name, value in module.net.state_dict().items()}
    average = {name: value.clone() for name, value in module.average.state_dict().items()}
    module.on_validation_epoch_start()
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert_equal(average, {name: value.clone() for name, value in checkpoint["average"].items()})
    assert_equal(own, {name: checkpoint["state_dict"][f"net.{name}"] for name in own})
