"""The C kernels beside plain torch, where what they leave out for speed could show."""

from __future__ import annotations

import pytest
import torch

import optim
from optim.work import CHUNK


@pytest.mark.parametrize("accumulator", ["current", "delayed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernels_find_a_maximum_that_is_hardly_above_the_others(accumulator: str, dtype: torch.dtype) -> None:
    """Blocks are ruled out by a bound of G kept from step to step: were it a little too high, this one would be."""
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
