from __future__ import annotations

import math

import pytest
import torch

from ranker.errors import UserError
from ranker.models.mlp import MLP, dense_layer, fused_linear


def set_layer(layer, weight, bias):
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.copy_(torch.tensor(bias))


def test_two_layers_by_hand():
    mlp = MLP(2, [2, 1])
    set_layer(mlp.layers[0], [[1.0, 2.0], [-1.0, 1.0]], [0.5, 0.0])
    set_layer(mlp.layers[1], [[2.0, 3.0]], [-1.0])
    # Row 1: pre-activations 1*1 + 2*1 + 0.5 = 3.5 and 0, then 7 - 1. Row 2: -0.5 and 2 (relu 0, 2), then 6 - 1.
    out = mlp(torch.tensor([[1.0, 1.0], [-1.5, 0.5]]))
    torch.testing.assert_close(out, torch.tensor([[6.0], [5.0]]))


def test_the_last_layer_has_a_relu_too():
    mlp = MLP(1, [1])
    set_layer(mlp.layers[0], [[1.0]], [0.0])
    assert mlp(torch.tensor([[-3.0]])).item() == 0.0


def test_clipped_activations_stay_within_the_bound_and_small_ones_pass():
    mlp = MLP(1, [1], clip_activations=2.0)
    set_layer(mlp.layers[0], [[1.0]], [0.0])
    torch.testing.assert_close(mlp(torch.tensor([[1.5], [5.0], [-9.0]])), torch.tensor([[1.5], [2.0], [0.0]]))


def test_layer_norm_comes_before_the_relu():
    mlp = MLP(1, [2], layer_norm=True)
    set_layer(mlp.layers[0], [[3.0], [1.0]], [0.0, 0.0])
    # Pre-activations 300 and 100: normalised to 1 and -1, then relu.
    torch.testing.assert_close(mlp(torch.tensor([[100.0]])), torch.tensor([[1.0, 0.0]]))


def test_no_layers_are_the_identity():
    mlp = MLP(3, [])
    x = torch.randn(2, 3)
    assert mlp(x) is x
    assert mlp.output_width == 3


def test_layers_start_glorot_uniform_with_zero_bias():
    layer = dense_layer(300, 100)
    bound = math.sqrt(6 / 400)
    assert layer.bias.eq(0).all()
    assert layer.weight.abs().max() <= bound
    # Standard deviation of a uniform distribution on (-a, a) is a / sqrt(3).
    assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_a_fused_product_equals_the_layers_side_by_side():
    layers = [dense_layer(4, 2), dense_layer(4, 3)]
    set_layer(layers[1], [[1.0] * 4] * 3, [1.0, 2.0, 3.0])
    x = torch.randn(5, 4)
    torch.testing.assert_close(fused_linear(layers, x), torch.cat([layer(x) for layer in layers], 1))


@pytest.mark.parametrize("widths", [[0], [64, -1], "64", 64, [1.5], [True]])
def test_widths_that_make_no_layer_are_refused(widths):
    with pytest.raises(UserError, match="hidden must be a list"):
        MLP(2, widths)


def test_a_bound_of_zero_is_refused():
    with pytest.raises(UserError, match="clip_activations"):
        MLP(2, [2], clip_activations=0.0)
