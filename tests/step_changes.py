"""What may change between two steps of an optimizer of three parameters, the second with a method of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

import optim

SHAPES = ((300, 400), (6,), (5, 3))  # two chunks; small; small
Change = Callable[[list[nn.Parameter], optim.SigmaOptimizer], object]


def in_place(params: list[nn.Parameter], _optimizer: optim.SigmaOptimizer) -> None:
    for param in params:
        assert param.grad is not None
        param.grad.mul_(3)


def learning_rate(_params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 0.7


def tensor_learning_rate(_params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.7)


def idle(_params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 1e-3


def hyperparameter(_params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    optimizer.param_groups[0]["lambda_abs"] = 1e-3


def method(_params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    optimizer.param_groups[0]["method"] = "adagrad"


def weight_decay(_params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    optimizer.param_groups[1]["weight_decay"] = 0.5


def maximize(_params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    optimizer.param_groups[0]["maximize"] = True


def no_gradient(params: list[nn.Parameter], _optimizer: optim.SigmaOptimizer) -> None:
    params[0].grad = None


def other_memory(params: list[nn.Parameter], _optimizer: optim.SigmaOptimizer) -> None:
    for param in params:
        param.data = param.data.clone() * 2


def other_shape(params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    total = optimizer.state[params[2]]["sum"]
    params[2].data, total.data = params[2].data[:2], total.data[:2]
    params[2].grad = torch.tensor([[1e-3], [1e-3], [1e3], [1e3], [1e3]]).expand(SHAPES[2]).clone()[:2]


def other_order_in_memory(params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    total = optimizer.state[params[0]]["sum"]
    params[0].data, total.data = params[0].data.t(), total.data.t()
    params[0].grad = torch.randn(params[0].shape, generator=torch.Generator().manual_seed(5))


def other_dtype(params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    for param in params:
        param.grad = None
        param.data = param.data.double()
        optimizer.state[param]["sum"] = optimizer.state[param]["sum"].double()
        param.grad = torch.ones_like(param)


def strided_gradient(params: list[nn.Parameter], _optimizer: optim.SigmaOptimizer) -> None:
    params[0].grad = torch.randn(SHAPES[0][::-1], generator=torch.Generator().manual_seed(5)).t()


def sparse_gradient(params: list[nn.Parameter], _optimizer: optim.SigmaOptimizer) -> None:
    params[2].grad = torch.sparse_coo_tensor([[1, 3, 1]], torch.ones(3, 3), SHAPES[2], check_invariants=True)


def wide_gradient(params: list[nn.Parameter], _optimizer: optim.SigmaOptimizer) -> None:
    narrow, params[2].grad = params[2].data, None
    params[2].data = narrow.double()
    params[2].grad = torch.ones_like(params[2])
    params[2].data = narrow


def other_state(params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    optimizer.state[params[0]]["sum"] = torch.full(SHAPES[0], 9.0)


def fresh_state(_params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    optimizer.state.clear()


def smaller_state(params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    for param in params:
        assert param.grad is not None
        param.grad.mul_(1e-3)  # of which nothing clips where G is as it was
    optimizer.state[params[0]]["sum"][1, 100:200] = 1e-9


def smaller_state_behind_the_scenes(params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    optimizer.state[params[0]]["sum"].data.fill_(1e-6)


def state_elsewhere(params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    for param in params:
        assert param.grad is not None
        param.grad.mul_(1e-3)  # of which nothing clips where G is as it was
    total = optimizer.state[params[0]]["sum"]
    total.data = total.data.clone()
    total.data[1, 100:200] = 1e-9


def other_group(_params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    optimizer.param_groups[0] = dict(optimizer.param_groups[0])
    optimizer.param_groups[0]["lr"] = 0.7


def new_entry(_params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    for group in optimizer.param_groups:
        if group["method"] == "gc":
            group["accumulator"] = "delayed"


def loaded(_params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["sum"] *= 2
    optimizer.load_state_dict(saved)


def late_group(params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    params.append(nn.Parameter(torch.ones(3)))
    optimizer.add_param_group({"params": [("late", params[-1])]})
    params[-1].grad = torch.ones(3)


def left_out(_params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    optimizer.param_groups[0]["params"].pop()
    optimizer.param_groups[0]["param_names"].pop()


def exchanged(params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    params[2] = nn.Parameter(torch.ones(SHAPES[2]))
    params[2].grad = torch.ones(SHAPES[2])
    place = next(index for index, group in enumerate(optimizer.param_groups) if "p2" in group["param_names"])
    group = optimizer.param_groups[place]
    group["params"][group["param_names"].index("p2")] = params[2]


def plain_torch(_params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    optimizer.defaults["backend"] = "eager"


def statistics(_params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    optimizer.collect_stats = True


def not_finite(params: list[nn.Parameter], optimizer: optim.SigmaOptimizer) -> None:
    optimizer.defaults["on_nonfinite"] = "skip"
    assert params[1].grad is not None
    params[1].grad[0] = torch.nan


READ_ANEW = (in_place, learning_rate, tensor_learning_rate, idle)
"""What a step looks at anyway."""
OTHERS = (
    hyperparameter,
    method,
    weight_decay,
    maximize,
    no_gradient,
    other_memory,
    other_shape,
    other_order_in_memory,
    other_dtype,
    strided_gradient,
    sparse_gradient,
    wide_gradient,
    other_state,
    fresh_state,
    smaller_state,
    smaller_state_behind_the_scenes,
    state_elsewhere,
    loaded,
    other_group,
    new_entry,
    late_group,
    left_out,
    exchanged,
    plain_torch,
    statistics,
    not_finite,
)
"""What it must notice."""
