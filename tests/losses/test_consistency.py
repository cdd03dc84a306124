import math

import pytest
import torch

from nnunetv2_semi.losses.consistency import mean_squared_difference, predictive_entropy


def drawn(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("channels", [1, 3])
def test_difference_is_the_mean_over_what_counts_in_value_and_gradient(channels):
    first, second = drawn(2, 3, 4, 5), drawn(2, 3, 4, 5).flip(0)
    counted = drawn(2, channels, 4, 5).flip(2) > 0.5
    first.requires_grad_()
    chosen = counted.expand_as(first)
    expected = sum((a - b) ** 2 for a, b in zip(first[chosen], second[chosen], strict=True)) / chosen.sum()
    value = mean_squared_difference(first, second, counted)
    assert torch.allclose(value, expected, atol=1e-12)
    gradients = [torch.autograd.grad(v, first)[0] for v in (value, expected)]
    assert torch.allclose(*gradients, atol=1e-12)


def test_difference_where_nothing_and_where_everything_counts():
    first, second = drawn(2, 3, 4).requires_grad_(), drawn(2, 3, 4).flip(0)
    nothing = mean_squared_difference(first, second, torch.zeros(2, 1, 4, dtype=torch.bool))
    gradient, = torch.autograd.grad(nothing, first)
    assert nothing.item() == 0 and (gradient == 0).all()
    everything = mean_squared_difference(first, second, torch.ones(2, 1, 4, dtype=torch.bool))
    assert torch.allclose(everything, mean_squared_difference(first, second))
    assert torch.allclose(everything, mean_squared_difference(first.flip(0), second.flip(0)))


def test_entropy_is_minus_the_sum_of_p_log_p():
    p = drawn(2, 3, 4).softmax(1)
    expected = [[-sum(p[b, c, v] * math.log(p[b, c, v]) for c in range(3)) for v in range(4)] for b in range(2)]
    assert torch.allclose(predictive_entropy(p, False)[:, 0], torch.tensor(expected, dtype=torch.float64))
    q = drawn(2, 3, 4)
    expected = -(q * q.log() + (1 - q) * (1 - q).log())
    assert torch.allclose(predictive_entropy(q, True), expected)


def test_entropy_at_its_ends():
    certain = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1)
    assert float(predictive_entropy(certain, False)) == 0
    assert predictive_entropy(certain, True).abs().max() == 0
    assert float(predictive_entropy(torch.full((1, 3, 1), 1 / 3), False)) == pytest.approx(math.log(3))
    assert float(predictive_entropy(torch.full((1, 1, 1), 0.5), True)) == pytest.approx(math.log(2))
    wider = torch.cat([torch.full((1, 3, 1), 1 / 3), torch.zeros(1, 1, 1)], 1)
    assert float(predictive_entropy(wider, False)) == pytest.approx(math.log(3))
