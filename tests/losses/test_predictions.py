import pytest
import torch
from nnunetv2.training.loss.dice import get_tp_fp_fn_tn

from nnunetv2_semi.losses.predictions import (
    agreement,
    confusion_counts,
    decision_dice,
    dice_from_counts,
    hard_foreground,
    probabilities,
)


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


def decided(*maps, heads=3):
    """Probabilities that decide the classes of ``maps``, each a string of digits: (B, heads, voxels)."""
    classes = torch.tensor([[int(c) for c in single] for single in maps])
    return torch.nn.functional.one_hot(classes, heads).movedim(-1, 1).float() * 0.8 + 0.05


def test_decision_dice_of_each_patch_over_the_classes_that_either_predicts():
    first, second = decided("00112", "00110", "00000"), decided("00122", "00110", "00000")
    # class 1: 2 * 1 / (2 + 1); class 2: 2 * 1 / (1 + 2)
    expected = torch.tensor([2 / 3, 1.0, 1.0])
    assert torch.allclose(decision_dice(first, second, regions=False), expected)


def test_decision_dice_where_only_one_predicts_a_class_is_0():
    assert decision_dice(decided("0000"), decided("0100"), regions=False).tolist() == [0.0]
    assert decision_dice(decided("0011"), decided("0012"), regions=False)[0] == pytest.approx((2 / 3 + 0) / 2)


def test_decision_dice_of_regions():
    first = torch.tensor([[[0.9, 0.9, 0.1], [0.1, 0.1, 0.1]]])
    second = torch.tensor([[[0.9, 0.1, 0.1], [0.1, 0.1, 0.1]]])
    assert decision_dice(first, second, regions=True)[0] == pytest.approx(2 / 3)
