"""The backend that runs the two functions of a step under torch.compile gives the results of plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import optim
from optim import eager

CASES = [
    ("clippy", {"collect_stats": True, "on_nonfinite": "skip"}),
    ("agc", {"by": "unit", "weight_decay": 0.1, "decoupled_weight_decay": True}),
    pytest.param("lamb_adam", {"collect_stats": True}, marks=pytest.mark.slow),
    pytest.param("clippy", {"preset": "tfrs", "lambda_acc": 0.1, "clip_accumulator": True}, marks=pytest.mark.slow),
]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def use(compiler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the backend compile by something else, with nothing compiled yet."""
    torch._dynamo.reset()
    monkeypatch.setattr(eager.COMPILED, "compiler", compiler)
    for name in ("reduce_piece", "step_piece"):
        eager.COMPILED.__dict__.pop(name, None)


def run(name: str, backend: str, given: dict[str, Any], steps: int = 4) -> tuple[list[torch.Tensor], Any]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((30, 5), (7,), (), (4, 3, 2))
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    table = nn.Embedding(9, 4, sparse="weight_decay" not in given)
    with torch.no_grad():
        table.weight.copy_(torch.randn(9, 4, generator=generator))
    optimizer = optim.build_optimizer(name, [*params, table.weight], lr=0.3, backend=backend, **given)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.3 / (1 + step)
        optimizer.zero_grad()
        table(torch.tensor([1, 1, 4 + step])).square().sum().backward()
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
    return [param.detach() for param in (*params, table.weight)], optimizer.clip_stats()


def assert_same(name: str, given: dict[str, Any]) -> None:
    (mine, report), (theirs, expected) = run(name, "compiled", given), run(name, "eager", given)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    for key, row in report.items():
        assert row["sigma"] == pytest.approx(expected[key]["sigma"], rel=1e-4)
        assert row["coordinate"] == expected[key]["coordinate"]


@pytest.mark.parametrize(("name", "given"), CASES)
def test_compiled_steps_as_plain_torch(name: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    use("eager", monkeypatch)
    assert_same(name, given)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", optim.list_optimizers())
def test_compiled_by_inductor_steps_as_plain_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use("inductor", monkeypatch)
    decay = {"weight_decay": 0.1} if name == "clippy_adamw" else {}  # its default, which sparse gradients cannot have
    assert_same(name, {"collect_stats": True, **decay})


def test_neither_shapes_nor_learning_rates_compile_again(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounter()
    use(counter, monkeypatch)
    params = [nn.Parameter(torch.randn(shape)) for shape in ((30, 5), (7,), (4, 3, 2), (11, 13))]
    optimizer = optim.build_optimizer("clippy", params, lr=0.3, backend="compiled")
    for step in range(5):
        if step == 1:
            # A reduction and a step, for vectors and for what is flattened to one.
            assert counter.frame_count == 4
            params += [nn.Parameter(torch.randn(shape)) for shape in ((3, 17), (2, 3, 4, 5), (70_000,))]
            optimizer.add_param_group({"params": params[-3:]})
        optimizer.param_groups[0]["lr"] = 0.3 / (1 + step)
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
    assert counter.frame_count == 4
