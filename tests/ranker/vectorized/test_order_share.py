"""The parts of a variance that the study of the order of rows names are those that were put in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


@pytest.fixture
def study(load_script: Any) -> Any:
    return load_script("order_share")


def test_parts_of_a_variance_are_found_again(study: Any) -> None:
    draw = np.random.default_rng(0)
    order, weights, rest = (draw.standard_normal(shape) for shape in ((200, 1), (1, 200), (200, 200)))
    found = study.shares(5.0 + 2.0 * order + 1.0 * weights + 1.0 * rest)

    assert found["order"] == pytest.approx(4 / 6, abs=0.08)
    assert found["weights"] == pytest.approx(1 / 6, abs=0.05)
    assert found["rest"] == pytest.approx(1 / 6, abs=0.05)
    assert found["standard_deviation"] == pytest.approx(6**0.5, rel=0.1)
    assert found["order"] + found["weights"] + found["rest"] == pytest.approx(1.0)


def test_an_order_that_does_not_matter_has_no_part(study: Any) -> None:
    weights = np.random.default_rng(0).standard_normal((1, 8))
    found = study.shares(np.repeat(weights, 6, 0))
    assert [found[part] for part in ("order", "weights", "rest")] == pytest.approx([0.0, 1.0, 0.0])
    with pytest.raises(ValueError, match="two orders"):
        study.shares(np.zeros((1, 8)))
