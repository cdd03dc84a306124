import math

import pytest
import torch

from nnunetv2_semi.losses.masked_dice_ce import masked_dice_ce


def drawn(classes=3, regions=False, spatial=(3, 4), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, classes, *spatial, generator=generator, dtype=dtype)
    labels = torch.randint(0, 2 if regions else classes, (2, classes if regions else 1, *spatial), generator=generator)
    return logits, labels, torch.rand(2, 1, *spatial, generator=generator) > 0.4


def naive(logits, labels, counted, regions):
    """The equations voxel by voxel, on flat lists."""
    patches, classes = logits.shape[:2]
    z, y, keep = (tensor.flatten(2) for tensor in (logits, labels, counted))
    entropy, terms, dice = 0.0, 0, []
    for b in range(patches):
        sums = [[0.0, 0.0, 0.0] for _ in range(classes)]
        for v in range(z.shape[2]):
            if not keep[b, 0, v]:
                continue
            exponents = [torch.exp(z[b, c, v]) for c in range(classes)]
            for c in range(classes):
                p = exponents[c] / (1 + exponents[c]) if regions else exponents[c] / sum(exponents)
                true = int(y[b, c, v]) if regions else int(y[b, 0, v] == c)
                sums[c] = [sums[c][0] + p * true, sums[c][1] + p, sums[c][2] + true]
                if regions:
                    entropy, terms = entropy - torch.log(p if true else 1 - p), terms + 1
                elif true:
                    entropy, terms = entropy - torch.log(p), terms + 1
        dice += [(2 * both + 1e-5) / (p + true + 1e-5) for both, p, true in sums]
    return (1 - sum(dice) / len(dice) + (entropy / terms if terms else 0.0)) / 2


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("spatial", [(3, 4), (2, 3, 2)])
def test_value_and_gradient_are_the_equations(regions, spatial):
    logits, labels, counted = drawn(3, regions, spatial)
    values, gradients = [], []
    for function in (masked_dice_ce, naive):
        z = logits.clone().requires_grad_()
        value = function(z, labels, counted, regions)
        gradients.append(torch.autograd.grad(value, z)[0])
        values.append(value.detach())
    assert torch.allclose(*values, atol=1e-12) and torch.allclose(*gradients, atol=1e-12)


@pytest.mark.parametrize("regions", [False, True])
def test_voxels_that_do_not_count_do_not_matter(regions):
    logits, labels, counted = drawn(3, regions)
    other_logits = torch.where(counted, logits, 7 * logits + 1)
    other_labels = torch.where(counted, labels, 255)  # such as an ignore label
    z = logits.clone().requires_grad_()
    value = masked_dice_ce(z, labels, counted, regions)
    assert torch.allclose(value, masked_dice_ce(other_logits, other_labels, counted, regions))
    gradient, = torch.autograd.grad(value, z)
    assert (gradient[~counted.expand_as(gradient)] == 0).all()


@pytest.mark.parametrize("regions", [False, True])
def test_where_nothing_counts_it_is_zero_with_a_zero_gradient(regions):
    logits, labels, counted = drawn(3, regions)
    z = logits.clone().requires_grad_()
    value = masked_dice_ce(z, labels, torch.zeros_like(counted), regions)
    gradient, = torch.autograd.grad(value, z)
    assert value.item() == 0 and (gradient == 0).all()


def test_a_right_and_certain_prediction_costs_nothing_even_if_classes_are_absent():
    labels = torch.zeros(1, 1, 4, dtype=torch.long)
    labels[..., 2:] = 2
    logits = 200.0 * torch.nn.functional.one_hot(labels[:, 0], 4).movedim(-1, 1)
    assert float(masked_dice_ce(logits, labels, torch.ones_like(labels, dtype=torch.bool), False)) < 1e-6


def test_order_of_patches_does_not_matter():
    logits, labels, counted = drawn()
    assert torch.allclose(masked_dice_ce(logits, labels, counted, False),
                          masked_dice_ce(logits.flip(0), labels.flip(0), counted.flip(0), False))


def test_boolean_region_targets_and_half_precision():
    logits, labels, counted = drawn(2, True, dtype=torch.float32)
    value = masked_dice_ce(logits.half(), labels.bool(), counted, True)
    assert value.dtype == torch.float32
    assert math.isclose(value, masked_dice_ce(logits.half().float(), labels, counted, True), rel_tol=1e-6)
