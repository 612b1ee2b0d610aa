"""The statistics of scripts/bench/stability_overhead.py, on times whose overhead is known."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import ModuleType

import pytest


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("stability_overhead")


def blocks_of(script: ModuleType, cost: float, rare_cost: float, *, drift: float, noise: float = 0.02) -> list[object]:
    """Blocks in turns, bare and not, on a machine that gets slower and faster: what is rare comes every 20 steps."""
    draw, blocks, step = random.Random(0), [], 20
    for number in range(121):
        name = script.BARE if number % 2 == 0 else script.ALL
        block = script.Block(name)
        speed = 1 + drift * (number % 40) / 40
        for _ in range(script.BLOCK):
            seconds = 0.05 * speed * draw.uniform(1 - noise, 1 + noise)
            if name == script.ALL:
                seconds *= 1 + cost + (rare_cost if step % 20 == 0 else 0)
            block.add(step, seconds)
            step += 1
        blocks.append(block)
    return blocks


@pytest.mark.parametrize("drift", [0.0, 1.0])
@pytest.mark.parametrize(("cost", "rare_cost"), [(0.0, 0.0), (0.02, 0.0), (0.01, 0.4)])
def test_the_known_overhead_is_found_while_the_machine_changes(
    script: ModuleType, cost: float, rare_cost: float, drift: float
) -> None:
    samples = script.samples_of(blocks_of(script, cost, rare_cost, drift=drift))
    bare = samples[script.BARE]

    found = script.overhead(samples[script.ALL], bare)

    # A step in 20 takes longer; that of periods 50, 100 and 200 which fall on one count with their own share.
    assert found == pytest.approx(cost + rare_cost / 20, abs=0.004)


def test_resamples_lie_around_what_was_found(script: ModuleType) -> None:
    samples = script.samples_of(blocks_of(script, 0.02, 0.0, drift=1.0))
    draw = random.Random(0)

    drawn = sorted(
        script.overhead(samples[script.ALL].drawn(draw), samples[script.BARE].drawn(draw)) for _ in range(99)
    )

    assert drawn[0] < script.overhead(samples[script.ALL], samples[script.BARE]) < drawn[-1]
    assert drawn[-1] - drawn[0] < 0.02
