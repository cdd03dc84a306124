import pytest
import torch
import torch.nn.functional as F

from nnunetv2_semi.losses.rectified_pseudo_supervision import (
    PseudoTarget,
    cosine_consistency,
    divergence,
    rectified_pseudo_supervision,
    two_class_logits,
)


def naive(view, target, temperature):
    """The equation with autograd doing every derivative."""
    sharpened, q = (target / temperature).softmax(1), target.softmax(1)
    cross_entropy = F.cross_entropy(view, sharpened, reduction="none")
    kl = F.kl_div(view.log_softmax(1), q, reduction="none").sum(1)
    return (torch.exp(-kl) * cross_entropy).mean() + kl.mean()


def random_logits(*shape, seed=0):
    torch.manual_seed(seed)
    return [2 * torch.randn(*shape, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("shape", [(1, 2, 5, 4), (3, 4, 3, 4, 5)])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_equals_the_equation_with_gradient(shape, temperature):
    view, target = random_logits(*shape)
    view.requires_grad_()
    ours = rectified_pseudo_supervision(view, PseudoTarget.from_logits(target, temperature))
    theirs = naive(view, target, temperature)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
    (first,), (second,) = torch.autograd.grad(5 * ours, view), torch.autograd.grad(5 * theirs, view)
    assert torch.allclose(first, second, rtol=0, atol=1e-12)


def test_gradient_holds_against_finite_differences():
    view, target = random_logits(1, 3, 2, 2)
    pseudo = PseudoTarget.from_logits(target)
    assert torch.autograd.gradcheck(lambda v: rectified_pseudo_supervision(v, pseudo), view.requires_grad_())


def test_regions_are_binary_problems():
    view, target = random_logits(2, 3, 4, 4)
    ours = rectified_pseudo_supervision(two_class_logits(view), PseudoTarget.from_logits(two_class_logits(target)))
    p, q, y = view.sigmoid(), target.sigmoid(), (target / 0.5).sigmoid()
    kl = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    expected = (torch.exp(-kl) * F.binary_cross_entropy(p, y, reduction="none")).mean() + kl.mean()
    assert torch.allclose(ours, expected, rtol=0, atol=1e-12)


def test_without_rectification_it_is_cross_entropy_to_the_sharpened_target():
    view, target = random_logits(2, 3, 4, 4)
    plain = rectified_pseudo_supervision(view, PseudoTarget.from_logits(target, 0.5), rectify=False)
    assert torch.allclose(plain, F.cross_entropy(view, (target / 0.5).softmax(1)))


def test_no_gradient_reaches_the_target_and_extreme_logits_stay_finite():
    view, target = (logits.float().requires_grad_() for logits in random_logits(1, 2, 4, 4))
    rectified_pseudo_supervision(view, PseudoTarget.from_logits(target)).backward()
    assert target.grad is None and view.grad is not None
    extreme = torch.tensor([[[80.0]], [[-80.0]]]).unsqueeze(0).requires_grad_()
    loss = rectified_pseudo_supervision(extreme, PseudoTarget.from_logits(-extreme))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(extreme.grad).all()


def test_divergence_is_zero_between_equal_predictions_and_grows():
    view, target = random_logits(1, 3, 4, 4)
    pseudo = PseudoTarget.from_logits(target)
    assert divergence(target, pseudo).abs().max() < 1e-12
    assert (divergence(view, pseudo) > 0).all() and divergence(view, pseudo).shape == (1, 4, 4)


def test_cosine_consistency_is_over_channels():
    first = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).T.view(1, 2, 2, 1)
    second = torch.tensor([[3.0, 0.0], [1.0, 0.0]]).T.view(1, 2, 2, 1)
    assert float(cosine_consistency(first, second)) == pytest.approx(0.5)
    assert float(cosine_consistency(first, first)) == pytest.approx(0.0, abs=1e-6)


def test_half_precision_and_wrong_input():
    view, target = (logits.half() for logits in random_logits(1, 2, 4, 4))
    loss = rectified_pseudo_supervision(view, PseudoTarget.from_logits(target))
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    with pytest.raises(ValueError, match="same shape"):
        rectified_pseudo_supervision(view[..., :2], PseudoTarget.from_logits(target))
    with pytest.raises(ValueError, match="temperature"):
        PseudoTarget.from_logits(target, 0.0)
