"""The C kernels against plain torch, where blocks that they skip could make a difference."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

import optim
from optim.local_params import CHUNK


@pytest.mark.parametrize("accumulator", ["current", "delayed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernels_find_a_maximum_that_is_hardly_above_the_others(accumulator: str, dtype: torch.dtype) -> None:
    """Blocks are skipped where their squares are below a limit with a small margin. This one is just above it."""
    size = 3 * CHUNK + 100
    results = []
    for backend in ("auto", "eager"):
        weight = torch.nn.Parameter(torch.zeros(size, dtype=dtype))
        optimizer = optim.build_optimizer("clippy", [weight], lr=1.0, accumulator=accumulator, backend=backend)
        for step in range(6):
            weight.grad = torch.ones(size, dtype=dtype)
            weight.grad[2 * CHUNK + 1000 * step] = 1.02
            with torch.no_grad():
                weight.zero_()
            optimizer.step()
        results.append(weight.detach())
    torch.testing.assert_close(*results, rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [31, 512, 700, CHUNK, CHUNK + 700])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_kernels_find_the_maximum_wherever_it_lies(size: int, weight_decay: float) -> None:
    """No coordinate is missed at the ends of blocks, chunks and tensors."""
    places = sorted({p for p in (0, 31, 127, 128, size // 4, size // 2, size - 189, size - 1) if 0 <= p < size})
    for place in places:
        sigmas = []
        for backend in ("native", "eager"):
            weight = torch.nn.Parameter(torch.full((size,), 0.01))
            settings = {"lr": 1.0, "weight_decay": weight_decay, "collect_stats": True, "backend": backend}
            optimizer = optim.build_optimizer("clippy", [("w", weight)], **settings)
            weight.grad = torch.full((size,), 0.01)
            weight.grad[place] = 3.0
            optimizer.step()
            row = optimizer.clip_stats()["w"]
            assert row["coordinate"] == place, backend
            sigmas.append(row["sigma"])
        assert sigmas[0] == pytest.approx(sigmas[1], rel=1e-5)
        assert sigmas[0] < 0.02


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("place", [5, CHUNK + 3, 2 * CHUNK + 699])
def test_what_only_just_clips_is_found_and_what_only_just_does_not_leaves_sigma_at_1(
    place: int, tensor_lr: bool
) -> None:
    """Overshoots of at most 1 / lr are not searched for."""
    lr, size = 0.1, 2 * CHUNK + 700
    for above, clipped in ((1.0002, True), (0.9998, False)):
        sigmas = []
        for backend in ("native", "eager"):
            weight = torch.nn.Parameter(torch.zeros(size))
            rate = torch.tensor(lr) if tensor_lr else lr
            optimizer = optim.build_optimizer("clippy", [("w", weight)], lr=rate, collect_stats=True, backend=backend)
            weight.grad = torch.full((size,), 1e-4)
            r = 0.01 / lr * above  # lambda_abs / lr is the largest r that is not clipped
            weight.grad[place] = r * (0.1 / (1 - r * r)) ** 0.5  # r = g / sqrt(0.1 + g^2)
            optimizer.step()
            row = optimizer.clip_stats()["w"]
            assert row["coordinate"] == (place if clipped else None), backend
            sigmas.append(row["sigma"])
        assert sigmas[0] == pytest.approx(sigmas[1], rel=1e-6)
        assert (sigmas[0] < 1) is clipped


@pytest.mark.parametrize("method", ["gc", "lamb", "clippy"])
def test_a_step_is_the_same_to_the_bit_for_any_number_of_threads(method: str) -> None:
    """The number of threads decides which thread takes a chunk, not the result of the chunk."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            generator = torch.Generator().manual_seed(0)
            weights = [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in (2 * CHUNK + 5, 3, 4 * CHUNK)]
            optimizer = optim.build_optimizer(method, weights, lr=0.5, backend="native")
            for _ in range(3):
                for weight in weights:
                    weight.grad = torch.randn(weight.shape, generator=generator)
                optimizer.step()
            results.append([weight.detach() for weight in weights])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_a_step_that_is_infinite_beside_a_square_that_vanishes_is_found() -> None:
    sigmas = []
    for backend in ("native", "eager"):
        weight = torch.nn.Parameter(torch.zeros(CHUNK))
        given = {"lr": 1.0, "eps": 0.0, "collect_stats": True, "backend": backend}
        optimizer = optim.build_optimizer("clippy", [("w", weight)], **given)
        weight.grad = torch.ones(CHUNK)
        optimizer.step()
        optimizer.state[weight]["sum"][777] = 0.0
        weight.grad = torch.full((CHUNK,), 1e-3)
        weight.grad[777] = 1e-25  # whose square is 0 in float32, so that r = g / 0
        optimizer.step()
        sigmas.append(optimizer.clip_stats()["w"]["sigma"])
    assert sigmas == [0.0, 0.0]


def test_a_step_that_weight_decay_makes_large_is_found() -> None:
    sigmas = []
    for backend in ("native", "eager"):
        weight = torch.nn.Parameter(torch.zeros(CHUNK + 700))
        given = {"lr": 20.0, "weight_decay": 0.5, "collect_stats": True, "backend": backend}
        optimizer = optim.build_optimizer("clippy", [("w", weight)], **given)
        with torch.no_grad():
            weight[CHUNK - 777] = 10.0
        weight.grad = torch.full((CHUNK + 700,), 1e-6)  # nothing clips at gradients of this size
        optimizer.step()
        sigmas.append(optimizer.clip_stats()["w"]["sigma"])
    assert sigmas[0] < 0.5
    assert sigmas[0] == pytest.approx(sigmas[1], rel=1e-6)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of a fork where threads run, which is what is tested
def test_a_process_forked_after_a_step_on_several_threads_can_step(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    weight = torch.nn.Parameter(torch.ones(4 * CHUNK))
    optimizer = optim.build_optimizer("clippy", [weight], lr=0.5, backend="native")
    weight.grad = torch.ones(4 * CHUNK)
    try:
        torch.set_num_threads(2)
        optimizer.step()
        child = os.fork()
        if child == 0:
            optimizer.step()
            os._exit(0)
    finally:
        torch.set_num_threads(before)
    deadline = time.monotonic() + 30
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the child waits for threads that the fork did not copy")
        time.sleep(0.01)
