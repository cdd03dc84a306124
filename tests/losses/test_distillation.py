import math

import pytest
import torch

from nnunetv2_semi.losses.distillation import at_grid, distillation_loss, softened

SHAPES = [(2, 3, 4, 2), (1, 2, 2, 3, 2), (3, 4, 5)]


def naive_loss(logits, teacher, temperature, regions):
    """Voxel by voxel: T^2 times the mean of sum_k q_k log(q_k / p_k)."""
    z, t = logits.flatten(2) / temperature, teacher.flatten(2) / temperature
    values = []
    for b in range(z.shape[0]):
        for v in range(z.shape[2]):
            if regions:
                pairs = [(1 / (1 + (-t[b, k, v]).exp()), 1 / (1 + (-z[b, k, v]).exp())) for k in range(z.shape[1])]
                values += [q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log() for q, p in pairs]
            else:
                q, p = t[b, :, v].exp() / t[b, :, v].exp().sum(), z[b, :, v].exp() / z[b, :, v].exp().sum()
                values.append(sum(q[k] * (q[k] / p[k]).log() for k in range(z.shape[1])))
    return temperature**2 * sum(values) / len(values)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_loss_is_the_definition_in_value_and_gradient(shape, regions, temperature):
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (2 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()
    ours = distillation_loss(logits, softened(teacher, temperature, regions), temperature, regions)
    naive = naive_loss(logits, teacher, temperature, regions)
    assert torch.allclose(ours, naive, rtol=1e-10)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (ours, naive)]
    assert torch.allclose(*gradients, rtol=1e-8, atol=1e-14) and gradients[0].abs().max() > 1e-3


@pytest.mark.parametrize("regions", [False, True])
def test_a_student_that_agrees_has_no_loss_and_no_gradient(regions):
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = distillation_loss(logits, softened(logits.detach(), 2.0, regions), 2.0, regions)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert torch.autograd.grad(loss, logits)[0].abs().max() < 1e-6


@pytest.mark.parametrize("regions", [False, True])
def test_the_gradient_keeps_its_size_at_high_temperature(regions):
    """Hinton et al., section 2: it tends to (z - t) / K, of regions (z - t) / 4, for logits of zero mean."""
    z, t = (x - x.mean(1, keepdim=True) for x in torch.randn(2, 1, 3, 1, dtype=torch.float64))
    z.requires_grad_()
    gradient = torch.autograd.grad(distillation_loss(z, softened(t, 1e4, regions), 1e4, regions), z)[0]
    assert torch.allclose(gradient, (z - t) / (12 if regions else 3), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_that_are_certain_give_finite_values(dtype):
    logits = torch.tensor([60.0, -60.0]).view(1, 2, 1).to(dtype)
    loss = distillation_loss(logits, softened(-logits, 1.0, False), 1.0, False)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(120)
    assert distillation_loss(logits, softened(-logits, 1.0, True), 1.0, True).item() == pytest.approx(60)


def test_softened_is_flatter_at_a_higher_temperature():
    logits = torch.tensor([2.0, 0.0]).view(1, 2, 1, 1)
    assert softened(logits, 2.0, False)[0, 0].item() == pytest.approx(math.e / (math.e + 1))
    assert softened(logits, 2.0, True)[0, 0].item() == pytest.approx(math.e / (math.e + 1))


@pytest.mark.parametrize("dims", [2, 3])
def test_a_coarser_soft_label_is_the_mean_of_what_it_covers(dims):
    probability = torch.rand(2, 3, *[4] * dims)
    coarse = at_grid(probability, [2, *[4] * (dims - 1)])
    assert torch.allclose(coarse, (probability[:, :, 0::2] + probability[:, :, 1::2]) / 2)
    assert at_grid(probability, [4] * dims) is probability
