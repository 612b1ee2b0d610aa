from __future__ import annotations

import math

import pytest
import torch

from ranker.errors import UserError
from ranker.models.layers import MLP, CrossLayer, CrossNet, dense_layer, fused_linear


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


def set_full(layer, weight, bias):
    with torch.no_grad():
        layer.up.weight.copy_(torch.tensor(weight))
        layer.up.bias.copy_(torch.tensor(bias))


def test_one_layer_by_hand_with_the_bias_inside_the_product():
    layer = CrossLayer(2)
    set_full(layer, [[1.0, 2.0], [0.0, -1.0]], [1.0, 0.5])
    x0, x = torch.tensor([[2.0, 10.0]]), torch.tensor([[3.0, 1.0]])
    # W x + b = (6, -0.5); x0 * that = (12, -5); plus x = (15, -4). With b outside it would be (14, -8.5).
    torch.testing.assert_close(layer(x0, x), torch.tensor([[15.0, -4.0]]))


def test_every_layer_multiplies_by_the_input_not_by_the_layer_below():
    net = CrossNet(1, layers=2, layer_norm=False)
    for layer in net.layers:
        set_full(layer, [[1.0]], [0.0])
    # x0 = 3: x1 = 3*3 + 3 = 12, x2 = 3*12 + 12 = 48. Multiplying by x1 would give 156.
    assert net(torch.tensor([[3.0]])).item() == 48.0


def test_a_low_rank_layer_equals_the_full_one_with_the_product_of_its_factors():
    low, full = CrossLayer(5, rank=2), CrossLayer(5)
    with torch.no_grad():
        low.up.bias.normal_()
        full.up.weight.copy_(low.up.weight @ low.down.weight)
        full.up.bias.copy_(low.up.bias)
    x0, x = torch.randn(4, 5), torch.randn(4, 5)
    torch.testing.assert_close(low(x0, x), full(x0, x))
    assert sum(p.numel() for p in low.parameters()) == 5 * 2 * 2 + 5


def test_a_layer_of_zeros_is_the_identity():
    net = CrossNet(3, layers=4, layer_norm=False)
    for parameter in net.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.randn(2, 3)
    torch.testing.assert_close(net(x), x)


def test_the_output_is_normalised_so_that_large_inputs_do_not_reach_the_layers_above():
    out = CrossNet(8, layers=2)(1e4 * torch.randn(6, 8))
    torch.testing.assert_close(out.mean(1), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.square().mean(1), torch.ones(6), atol=1e-3, rtol=0)


def test_matrices_start_as_a_truncated_normal_and_biases_at_zero():
    layer = CrossLayer(200)
    assert layer.up.bias.eq(0).all()
    assert layer.up.weight.abs().max() <= 0.1
    # A standard normal cut off at two deviations has a deviation of 0.880.
    assert layer.up.weight.std().item() == pytest.approx(0.05 * 0.880, rel=0.02)


@pytest.mark.parametrize("options", [{"layers": 0}, {"layers": 1, "rank": 0}, {"layers": True}])
def test_counts_below_one_are_refused(options):
    with pytest.raises(UserError, match="at least 1"):
        CrossNet(4, **options)
