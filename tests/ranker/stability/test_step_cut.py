"""The step cut: known accumulators, every optimizer, saved state."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from optim import build_optimizer
from ranker.stability.step_cut import StepCut, shared_weights


def adagrad(*shapes: tuple[int, ...], start: float = 1.0) -> tuple[dict[str, Tensor], torch.optim.Optimizer]:
    weights = {f"layer{i}": torch.zeros(shape, requires_grad=True) for i, shape in enumerate(shapes)}
    return weights, torch.optim.Adagrad(weights.values(), lr=0.1, initial_accumulator_value=start)


def run(cut: StepCut, steps: int, change: Callable[[int], None] = lambda _: None) -> list[list[float]]:
    """Reduced values after each step; ``change`` does to the accumulators what the step does."""
    found = []
    for step in range(1, steps + 1):
        change(step)
        found.append(cut.update().tolist())
    return found


def test_the_cut_is_the_ratio_of_the_roots_until_the_span_is_over() -> None:
    weights, optimizer = adagrad((60, 40))
    total = optimizer.state[weights["layer0"]]["sum"]
    cut = StepCut(weights, optimizer, every=4, span=8)

    found = run(cut, 24, lambda step: total.mul_(100.0) if step == 10 else None)

    assert all(math.isnan(x) for x in found[3])  # there is nothing yet to compare with
    assert found[8] == [1.0, 1.0, 0.0]
    # Samples are taken at steps 1, 5, 9, 13, ...: from 13 to 17 the sample of two before is from before the jump.
    assert found[12] == found[16] == [10.0, 10.0, 1.0]
    assert found[20] == [1.0, 1.0, 0.0]


def test_share_and_median_are_those_of_the_whole_tensor() -> None:
    """Half of the columns grew: a sample that follows one stride would see all of them, or none."""
    weights, optimizer = adagrad((256, 512))
    cut = StepCut(weights, optimizer, every=1, span=1, sample=1024)
    total = optimizer.state[weights["layer0"]]["sum"]

    def step(number: int) -> None:
        if number == 2:
            total[:, ::2] *= 1e4
            total[:, 1::2] *= 4.0

    run(cut, 2, step)

    layer = cut.by_layer()["layer0"]
    assert float(layer.grown) == pytest.approx(0.5, abs=0.03)
    assert float(layer.cut) in (2.0, 100.0)


def test_the_reduction_is_the_worst_layer_the_middle_one_and_the_largest_share() -> None:
    weights, optimizer = adagrad((9, 9), (5, 5), (3, 3))
    cut = StepCut(weights, optimizer, every=1, span=1)

    def step(number: int) -> None:
        for weight, factor in zip(weights.values(), (4.0, 1.0, 1e6), strict=True):
            optimizer.state[weight]["sum"].mul_(factor if number == 2 else 1.0)

    found = run(cut, 2, step)

    assert found[1] == [1000.0, 2.0, 1.0]
    assert {name: float(layer.cut) for name, layer in cut.by_layer().items()} == {
        "layer0": 2.0,
        "layer1": 1.0,
        "layer2": 1000.0,
    }


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_an_accumulator_that_is_not_finite_has_cut_everything(value: float) -> None:
    weights, optimizer = adagrad((4, 4), start=0.0)
    total = optimizer.state[weights["layer0"]]["sum"]
    cut = StepCut(weights, optimizer, every=1, span=1)

    found = run(cut, 2, lambda step: total.fill_(value) if step == 2 else None)

    assert found[1] == [math.inf, math.inf, 1.0]
    assert run(StepCut(weights, optimizer, every=1, span=1), 1)[0][0] != 1.0


@pytest.mark.parametrize("method", ["adagrad", "gc", "agc", "lamb", "clippy", "clippy_adam", "sgd", "adam"])
def test_every_optimizer_with_an_accumulator_shows_a_spike_of_its_gradients(method: str) -> None:
    torch.manual_seed(0)
    net = nn.Linear(20, 20)
    if method in ("sgd", "adam"):
        optimizer = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[method](net.parameters(), lr=1e-3)
    else:
        optimizer = build_optimizer(method, net, lr=1e-3)
    cut = StepCut({"only": net.weight}, optimizer, every=1, span=2)

    def step(number: int) -> None:
        for parameter in net.parameters():
            parameter.grad = torch.randn_like(parameter) * (1e4 if number == 20 else 1.0)
        optimizer.step()

    found = run(cut, 20, step)

    if method == "sgd":
        assert all(math.isnan(x) for row in found for x in row)
        return
    assert found[18][0] < 2.0
    assert found[19][0] > 50.0
    assert found[19][2] > 0.9


def test_a_layer_without_an_accumulator_is_nan_and_does_not_hide_the_others() -> None:
    weights, optimizer = adagrad((6, 6))
    cut = StepCut({"none": torch.zeros(3, 3), **weights}, optimizer, every=1, span=1)
    total = optimizer.state[weights["layer0"]]["sum"]

    found = run(cut, 2, lambda step: total.mul_(16.0) if step == 2 else None)

    assert found[1] == [4.0, 4.0, 1.0]
    assert math.isnan(cut.by_layer()["none"].cut)


def test_saved_samples_go_on_as_if_nothing_had_happened() -> None:
    def grow(total: Tensor) -> Callable[[int], None]:
        return lambda step: total.mul_(3.0 if step == 7 else 1.01)

    weights, optimizer = adagrad((10, 10))
    whole = StepCut(weights, optimizer, every=2, span=6)
    change = grow(optimizer.state[weights["layer0"]]["sum"])
    first = [(change(step), whole.update())[1] for step in range(1, 6)]
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    second = StepCut(weights, optimizer, every=2, span=6)
    second.load_state_dict(torch.load(file, weights_only=True))

    for step in range(6, 20):
        change(step)
        assert torch.equal(second.update(), whole.update())
    assert len(first) == 5
    other = StepCut({"another": weights["layer0"]}, optimizer, every=2, span=6)
    other.load_state_dict(whole.state_dict())  # of other layers: it starts anew
    assert bool(other.update().isnan().all())


def test_wrong_numbers_are_refused() -> None:
    weights, optimizer = adagrad((2, 2))
    for wrong in ({"every": 0}, {"every": 5, "span": 24}, {"sample": 0}):
        with pytest.raises(ValueError, match="multiple of every"):
            StepCut(weights, optimizer, **wrong)


def test_shared_weights_are_matrices_that_are_neither_tables_nor_heads() -> None:
    net = nn.Module()
    net.embeddings, net.bottom = nn.Embedding(5, 2), nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    net.head = nn.Linear(3, 1)
    assert list(shared_weights(net.named_parameters(), heads={"head"}, embeddings="embeddings.")) == ["bottom.0"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_nothing_waits() -> None:
    weight = torch.zeros(300, 300, device="cuda", requires_grad=True)
    optimizer = torch.optim.Adagrad([weight], lr=0.1, initial_accumulator_value=1.0)
    cut = StepCut({"only": weight}, optimizer)
    run_once = [cut.update() for _ in range(2)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(60):
            cut.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert cut.update().tolist() == [1.0, 1.0, 0.0]
    assert len(run_once) == 2
