import math

import pytest
import torch
import torch.nn.functional as F

from nnunetv2_semi.losses.soft_labels import soft_cross_entropy, soft_dice_loss, weighted_soft_cross_entropy

SHAPES = [(2, 3, 4, 2), (1, 2, 2, 3, 2), (3, 1, 5)]


def pair(shape, regions):
    """Logits that ask for gradients, and a soft label."""
    generator = torch.Generator().manual_seed(0)
    logits, label = (2 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return logits.requires_grad_(), label.sigmoid() if regions else label.softmax(1)


def naive_cross_entropy(logits, label, regions, weight=None):
    """Voxel by voxel, channel by channel."""
    z, q = logits.flatten(2), label.flatten(2)
    w = torch.ones_like(q[:, :1]) if weight is None else weight.flatten(2)
    total = 0.0
    for b in range(z.shape[0]):
        for v in range(z.shape[2]):
            of_voxel = 0.0
            for k in range(z.shape[1]):
                if regions:
                    p = 1 / (1 + (-z[b, k, v]).exp())
                    term = q[b, k, v] * p.log() + (1 - q[b, k, v]) * (1 - p).log()
                    of_voxel = of_voxel - term / z.shape[1]
                else:
                    p = z[b, k, v].exp() / z[b, :, v].exp().sum()
                    of_voxel = of_voxel - q[b, k, v] * p.log()
            total = total + w[b, 0, v] * of_voxel
    return total / w.sum()


def naive_dice_loss(probability, label, regions):
    p, q = probability.flatten(2), label.flatten(2)
    ratios = [(2 * sum(p[b, k, v] * q[b, k, v] for v in range(p.shape[2])) + 1e-5)
              / (sum(p[b, k, v] ** 2 + q[b, k, v] ** 2 for v in range(p.shape[2])) + 1e-5)
              for b in range(p.shape[0]) for k in range(0 if regions else 1, p.shape[1])]
    return 1 - sum(ratios) / len(ratios)


def assert_same(ours, naive, leaf):
    assert torch.allclose(ours, naive, rtol=1e-12)
    gradients = [torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in (ours, naive)]
    assert torch.allclose(*gradients, rtol=1e-9, atol=1e-14) and gradients[0].abs().max() > 1e-4


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("regions", [False, True])
def test_cross_entropy_is_the_definition_in_value_and_gradient(shape, regions):
    logits, label = pair(shape if regions or shape[1] > 1 else (3, 2, 5), regions)
    assert_same(soft_cross_entropy(logits, label, regions), naive_cross_entropy(logits, label, regions), logits)


@pytest.mark.parametrize("regions", [False, True])
def test_weighted_cross_entropy_is_the_weighted_mean_over_voxels(regions):
    logits, label = pair((2, 3, 4, 2), regions)
    weight = torch.rand(2, 1, 4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight[0, 0, 1] = 0
    ours = weighted_soft_cross_entropy(logits, label, weight, regions)
    assert_same(ours, naive_cross_entropy(logits, label, regions, weight), logits)
    gradient, = torch.autograd.grad(ours, logits)
    assert (gradient[0, :, 1] == 0).all() and (gradient[0, :, 0] != 0).all()
    ones = torch.full_like(weight, 0.3)
    assert torch.allclose(weighted_soft_cross_entropy(logits, label, ones, regions),
                          soft_cross_entropy(logits, label, regions))


def test_weights_that_are_all_0_give_0_with_a_gradient_of_0():
    logits, label = pair((2, 3, 4), False)
    value = weighted_soft_cross_entropy(logits, label, torch.zeros(2, 1, 4), False)
    gradient, = torch.autograd.grad(value, logits)
    assert value == 0 and (gradient == 0).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("regions", [False, True])
def test_dice_is_the_definition_in_value_and_gradient(shape, regions):
    logits, label = pair(shape if regions or shape[1] > 1 else (3, 2, 5), regions)
    probability = logits.sigmoid() if regions else logits.softmax(1)
    assert_same(soft_dice_loss(probability, label, regions), naive_dice_loss(probability, label, regions), logits)


def test_a_structure_that_neither_shows_costs_nothing():
    empty = torch.zeros(1, 2, 6)
    assert soft_dice_loss(empty, empty, False) == 0


@pytest.mark.parametrize("regions", [False, True])
def test_both_are_lowest_at_the_soft_label_itself(regions):
    torch.manual_seed(0)
    label_logits = torch.randn(2, 3, 8, dtype=torch.float64)
    label = label_logits.sigmoid() if regions else label_logits.softmax(1)
    logits = label_logits.clone().requires_grad_()
    p = logits.sigmoid() if regions else logits.softmax(1)
    total = soft_cross_entropy(logits, label, regions) + soft_dice_loss(p, label, regions)
    gradient, = torch.autograd.grad(total, logits)
    assert gradient.abs().max() < 1e-12
    assert soft_dice_loss(p, label, regions).item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("regions", [False, True])
def test_of_a_hard_label_they_are_the_usual_ones(regions):
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 8)
    hard = (torch.rand(2, 3, 8) > 0.5).float() if regions else \
        F.one_hot(torch.randint(0, 3, (2, 8)), 3).movedim(-1, 1).float()
    expected = F.binary_cross_entropy_with_logits(logits, hard) if regions else F.cross_entropy(logits, hard.argmax(1))
    assert torch.allclose(soft_cross_entropy(logits, hard, regions), expected)


@pytest.mark.parametrize("regions", [False, True])
def test_half_precision_logits_are_computed_in_single_precision(regions):
    """The sum over these voxels is beyond the largest number of half precision."""
    logits = torch.full((1, 2, 4000), 40.0, dtype=torch.float16)
    logits[:, 0] = -40
    label = torch.zeros(1, 2, 4000)
    label[:, 0] = 1
    value = soft_cross_entropy(logits, label, regions)
    assert value.dtype == torch.float32
    assert math.isclose(float(value), 40.0 if regions else 80.0, rel_tol=1e-6)
