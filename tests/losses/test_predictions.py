import pytest
import torch
from nnunetv2.training.loss.dice import get_tp_fp_fn_tn

from nnunetv2_semi.losses.predictions import (
    agreement,
    confusion_counts,
    dice_from_counts,
    hard_foreground,
    probabilities,
)
from nnunetv2_semi.losses.soft_labels import soft_cross_entropy, soft_dice_loss


@pytest.mark.parametrize("ignore_label", [None, 3])
def test_softmax_counts_equal_nnunets(ignore_label):
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, 6, 7)
    target = torch.randint(0, 3, (2, 1, 5, 6, 7))
    mask = None
    if ignore_label is not None:
        target[torch.rand(target.shape) > 0.7] = ignore_label
        mask = (target != ignore_label).float()
    onehot = torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1)
    expected = get_tp_fp_fn_tn(onehot, torch.where(target == 3, 0, target), axes=[0, 2, 3, 4], mask=mask)[:3]
    counts = confusion_counts(logits.softmax(1), target, False, ignore_label)
    assert torch.equal(counts, torch.stack(expected)[:, 1:].double())


@pytest.mark.parametrize("ignore_label", [None, 4])
def test_region_counts_equal_nnunets(ignore_label):
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, 6)
    target = torch.rand(2, 4 if ignore_label else 3, 5, 6) > 0.5
    mask = ~target[:, -1:] if ignore_label else None
    expected = get_tp_fp_fn_tn((logits.sigmoid() > 0.5).long(), target[:, :3], axes=[0, 2, 3], mask=mask)[:3]
    counts = confusion_counts(logits.sigmoid(), target, True, ignore_label)
    assert torch.equal(counts, torch.stack(expected).double())


def test_dice_leaves_out_classes_that_never_occur():
    counts = torch.tensor([[4.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert float(dice_from_counts(counts)) == pytest.approx(0.8)


def test_hard_decisions_and_agreement():
    p = torch.tensor([[0.6, 0.1], [0.3, 0.2], [0.1, 0.7]])[None]
    assert hard_foreground(p, False)[0].tolist() == [[False, False], [False, True]]
    assert hard_foreground(p, True)[0].tolist() == [[True, False], [False, False], [False, True]]
    assert float(agreement(p, p.flip(2), False)) == 0.0
    assert float(agreement(p, p, True)) == 1.0


def test_half_precision_logits_give_single_precision_probabilities():
    assert probabilities([torch.randn(1, 2, 4).half()], False).dtype == torch.float32


@pytest.mark.parametrize("regions", [False, True])
def test_soft_losses_are_lowest_at_the_soft_label_itself(regions):
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
def test_soft_losses_of_a_hard_label_are_the_usual_ones(regions):
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 8)
    hard = (torch.rand(2, 3, 8) > 0.5).float() if regions else torch.nn.functional.one_hot(
        torch.randint(0, 3, (2, 8)), 3).movedim(-1, 1).float()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, hard) if regions else \
        torch.nn.functional.cross_entropy(logits, hard.argmax(1))
    assert torch.allclose(soft_cross_entropy(logits, hard, regions), expected)
