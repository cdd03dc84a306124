import pytest
import torch
import torch.nn.functional as F

from nnunetv2_semi.losses import voxel_contrast as module
from nnunetv2_semi.losses.voxel_contrast import (
    Voxels,
    confident_of_other_classes,
    most_confident_per_class,
    unit_rows,
    voxel_contrast,
)


def naive_contrast(view_1, view_2, classes, negatives, number, temperature, bidirectional):
    """The equation, anchor by anchor."""
    total = torch.zeros((), dtype=view_1.dtype)
    for anchors, positives in [(view_1, view_2), (view_2, view_1)][:2 if bidirectional else 1]:
        for anchor, positive, label in zip(anchors, positives, classes, strict=True):
            others = [(float(c), f) for f, k, c in zip(negatives.features, negatives.classes, negatives.confidence,
                                                       strict=True) if k != label]
            chosen = [f for _, f in sorted(others, key=lambda pair: -pair[0])[:number]]
            numerator = torch.exp(anchor @ positive / temperature)
            denominator = numerator + sum(torch.exp(anchor @ f / temperature) for f in chosen)
            total = total - torch.log(numerator / denominator)
    return total / len(classes)


def random_input(anchors=12, pool=17, channels=5, classes=3, seed=0):
    torch.manual_seed(seed)
    leaves = [torch.randn(rows, channels, dtype=torch.float64).requires_grad_() for rows in (anchors, anchors, pool)]
    return leaves, torch.randint(0, classes, (anchors,)), torch.randint(0, classes, (pool,)), torch.rand(pool)


def with_units(leaves, pool_classes, confidence):
    first, second, pool = (F.normalize(leaf, dim=1) for leaf in leaves)
    return first, second, Voxels(pool, pool_classes, confidence)


@pytest.mark.parametrize("number", [1, 4, 100])
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("block", [3, 4096])
def test_equals_the_equation_written_out(monkeypatch, number, classes, bidirectional, block):
    monkeypatch.setattr(module, "_ANCHORS_AT_ONCE", block)
    leaves, anchor_classes, pool_classes, confidence = random_input(classes=classes)
    first, second, negatives = with_units(leaves, pool_classes, confidence)
    ours = voxel_contrast(first, second, anchor_classes, negatives, number, 0.3, bidirectional)
    theirs = naive_contrast(first, second, anchor_classes, negatives, number, 0.3, bidirectional)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
    for a, b in zip(torch.autograd.grad(3 * ours, leaves, retain_graph=True),
                    torch.autograd.grad(3 * theirs, leaves), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_order_of_anchors_order_of_negatives_and_names_of_classes_do_not_matter():
    leaves, classes, pool_classes, confidence = random_input()
    first, second, negatives = with_units(leaves, pool_classes, confidence)
    expected = voxel_contrast(first, second, classes, negatives, 4)
    order, pool_order = torch.randperm(len(first)), torch.randperm(len(negatives))
    assert torch.allclose(expected, voxel_contrast(first[order], second[order], classes[order],
                                                   negatives.chosen(pool_order), 4))
    assert torch.allclose(expected, voxel_contrast(second, first, classes, negatives, 4))
    renamed = Voxels(negatives.features, 7 * negatives.classes + 1, negatives.confidence)
    assert torch.allclose(expected, voxel_contrast(first, second, 7 * classes + 1, renamed, 4))


def test_a_hundred_classes_and_absent_ones():
    leaves, classes, pool_classes, confidence = random_input(anchors=60, pool=50, classes=100)
    first, second, negatives = with_units(leaves, pool_classes, confidence)
    assert torch.allclose(voxel_contrast(first, second, classes, negatives, 6, 0.3),
                          naive_contrast(first, second, classes, negatives, 6, 0.3, True), atol=1e-12)


def test_one_class_everywhere_gives_zero_that_can_be_differentiated():
    leaves, classes, pool_classes, confidence = random_input(classes=1)
    loss = voxel_contrast(*with_units(leaves, pool_classes, confidence)[:2], classes,
                          with_units(leaves, pool_classes, confidence)[2])
    loss.backward()
    assert loss.item() == 0
    assert all(leaf.grad.abs().max() == 0 for leaf in leaves)


def test_no_more_negatives_than_there_are_and_none_of_the_anchors_class():
    _, _, pool_classes, confidence = random_input(pool=30)
    voxels = Voxels(torch.zeros(30, 2), pool_classes, confidence)
    chosen = confident_of_other_classes(voxels, 1, 100)
    assert len(chosen) == (pool_classes != 1).sum() and (pool_classes[chosen] != 1).all()
    few = confident_of_other_classes(voxels, 1, 5)
    worst_chosen = confidence[few].min()
    assert len(few) == 5 and (confidence[chosen] >= worst_chosen).sum() == 5


def test_the_best_of_each_class_hold_whatever_would_be_chosen():
    _, _, pool_classes, confidence = random_input(pool=80, classes=4)
    voxels = Voxels(torch.randn(80, 2), pool_classes, confidence)
    kept = most_confident_per_class(voxels, 6)
    assert len(kept) <= 4 * 6
    for label in range(5):
        assert set(confident_of_other_classes(voxels, label, 6).tolist()) <= set(kept.tolist())


def test_loss_is_large_where_views_look_like_negatives():
    same, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    label = torch.tensor([0])

    def loss(view_2, negative):
        return float(voxel_contrast(same, view_2, label, Voxels(negative, label + 1, torch.ones(1))))
    assert loss(same, other) < 1e-3 < loss(same, same) < loss(other, same)


def test_half_precision_is_computed_in_single_precision():
    features = torch.randn(2, 8, 3, 4, 5)
    assert unit_rows(features.half()).dtype == torch.float32
    rows = unit_rows(features)
    classes = torch.arange(120) % 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = voxel_contrast(rows, rows.flip(0), classes, Voxels(rows, classes, torch.rand(120)))
    assert inside.dtype == torch.float32 and torch.isfinite(inside)


@pytest.mark.parametrize("change, message", [
    ({"view_2": torch.zeros(3, 2)}, "same voxels"), ({"temperature": 0.0}, "temperature"),
    ({"num_negatives": 0}, "num_negatives")])
def test_wrong_input_is_refused(change, message):
    rows = torch.zeros(4, 2)
    arguments = {"view_1": rows, "view_2": rows, "classes": torch.zeros(4, dtype=torch.long),
                 "negatives": Voxels(rows, torch.zeros(4), torch.zeros(4)), **change}
    with pytest.raises(ValueError, match=message):
        voxel_contrast(**arguments)
