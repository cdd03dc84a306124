"""CDCR, also in `tests/reference`."""

import math

import pytest
import torch

from nnunetv2_semi.losses.consensus_divergence import consensus_loss, divergence_loss, same_decision


def two_predictions(heads, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, heads, *shape, generator=generator, dtype=torch.float64) * 2 for _ in range(2)]


def naive(first, second, regions):
    """Both losses, number by number; for regions each region is a softmax of two classes."""
    if regions:
        losses = [naive(*(torch.stack([1 - p[:, k], p[:, k]], 1) for p in (first, second)), False)
                  for k in range(first.shape[1])]
        return tuple(sum(values) / len(losses) for values in zip(*losses, strict=True))
    p, q = first.flatten(2), second.flatten(2)
    consensus = divergence = 0.0
    for b in range(p.shape[0]):
        for v in range(p.shape[2]):
            a, c = p[b, :, v].tolist(), q[b, :, v].tolist()
            if a.index(max(a)) == c.index(max(c)):
                consensus -= sum(x * math.log(x) for x in a + c) / 2
            else:
                divergence += sum((x - y) ** 2 for x, y in zip(a, c, strict=True))
    return consensus / p.numel(), divergence / p.numel()


@pytest.mark.parametrize("shape", [(5, 4), (3, 4, 2)])
@pytest.mark.parametrize("regions", [False, True])
def test_equals_the_naive_form(shape, regions):
    first, second = (z.sigmoid() if regions else z.softmax(1) for z in two_predictions(3, shape))
    consensus, divergence = naive(first, second, regions)
    assert consensus > 0 and divergence > 0
    assert float(consensus_loss(first, second, regions)) == pytest.approx(consensus, abs=1e-12)
    assert float(divergence_loss(first, second, regions)) == pytest.approx(divergence, abs=1e-12)


@pytest.mark.parametrize("regions", [False, True])
def test_symmetric(regions):
    first, second = (z.sigmoid() if regions else z.softmax(1) for z in two_predictions(3, (4, 4)))
    for loss in (consensus_loss, divergence_loss):
        assert float(loss(first, second, regions)) == pytest.approx(float(loss(second, first, regions)), abs=1e-15)


def test_agreeing_predictions_have_no_divergence_and_disagreeing_ones_no_consensus():
    sure = torch.tensor([0.9, 0.1]).view(1, 2, 1, 1).expand(1, 2, 4, 4)
    assert float(divergence_loss(sure, sure * 0.5 + 0.25, False)) == 0
    assert float(consensus_loss(sure, sure.flip(1), False)) == 0


@pytest.mark.parametrize("regions", [False, True])
def test_gradient_is_finite_where_a_probability_is_exactly_0_or_1(regions):
    logits = torch.tensor([200.0, -200.0]).view(1, 2, 1, 1).expand(1, 2, 3, 3).clone().requires_grad_()
    probability = logits.sigmoid() if regions else logits.softmax(1)
    assert float(probability.detach().min()) == 0
    (consensus_loss(probability, probability, regions) + divergence_loss(probability, probability, regions)).backward()
    assert torch.isfinite(logits.grad).all()


def test_decisions_of_regions_are_each_their_own():
    first, second = torch.tensor([0.7, 0.2]).view(1, 2, 1), torch.tensor([0.6, 0.9]).view(1, 2, 1)
    assert same_decision(first, second, True).flatten().tolist() == [True, False]
    assert same_decision(first, second, False).shape == (1, 1, 1)
