"""Hydra's private API still behaves as ``ranker.hydra_private`` expects."""

from __future__ import annotations

import pytest
from hydra.errors import HydraException

from ranker.hydra_private import expand, parse

CHANGED = "Hydra's BasicSweeper.split_arguments changed; adapt ranker/hydra_private.py"


def test_comma_separated_values_become_jobs_and_the_last_value_of_a_key_wins() -> None:
    expected = [["optim=gc", "seed=0"], ["optim=gc", "seed=1"]]
    assert expand(parse(["optim=clippy", "optim=gc", "seed=0,1"])) == expected, CHANGED
    assert expand(parse([])) == [[]], CHANGED


def test_an_interval_cannot_be_expanded() -> None:
    with pytest.raises(HydraException, match="does not support sweep type"):
        expand(parse(["lr_mult=interval(1,2)"]))
