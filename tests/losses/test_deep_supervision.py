"""The weighted sum of a loss over a network's outputs."""

import pytest
import torch

from nnunetv2_semi.losses.deep_supervision import summed_over_scales


def squared(output, target):
    return ((output - target) ** 2).mean()


def test_each_output_counts_with_its_weight_in_value_and_gradient():
    outputs = [torch.full((1, 1, size), float(size), requires_grad=True) for size in (4, 2, 1)]
    targets = [torch.zeros(1, 1, size) for size in (4, 2, 1)]
    loss = summed_over_scales((0.5, 0.3, 0.2), squared, outputs, targets)
    assert loss.item() == pytest.approx(0.5 * 16 + 0.3 * 4 + 0.2 * 1)
    loss.backward()
    assert [output.grad.sum().item() for output in outputs] == pytest.approx([0.5 * 8, 0.3 * 4, 0.2 * 2])


def test_an_output_of_weight_zero_is_left_out_even_where_its_loss_is_not_finite():
    seen = []

    def loss(output):
        seen.append(output.shape[-1])
        return output.mean()
    assert summed_over_scales((1.0, 0.0), loss, [torch.ones(1, 1, 2), torch.full((1, 1, 1), torch.nan)]).item() == 1
    assert seen == [2]


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(ValueError):
        summed_over_scales((0.7, 0.3), squared, [torch.ones(1, 1, 2)] * 2, [torch.ones(1, 1, 2)])
