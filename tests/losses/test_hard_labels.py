import math

import pytest
import torch
import torch.nn.functional as F

from nnunetv2_semi.losses.hard_labels import hard_labels, known_labels, nearest, voxel_cross_entropy


def logits(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_class_labels_are_the_most_probable_classes():
    probability = logits(2, 3, 2, 3).softmax(1)
    labels, confidence = hard_labels(probability, False)
    assert labels.shape == confidence.shape == (2, 1, 2, 3)
    for b in range(2):
        for y in range(2):
            for x in range(3):
                at = probability[b, :, y, x].tolist()
                assert at[labels[b, 0, y, x]] == max(at) == confidence[b, 0, y, x]


def test_region_labels_are_decided_region_by_region():
    probability = torch.tensor([0.2, 0.7]).view(1, 2, 1, 1)
    labels, confidence = hard_labels(probability, True)
    assert labels.flatten().tolist() == [0, 1]
    assert confidence.flatten().tolist() == pytest.approx([0.8, 0.7])


@pytest.mark.parametrize("shape", [(2, 3, 4, 3), (1, 3, 2, 3, 2)])
def test_cross_entropy_is_minus_log_probability_of_the_label(shape):
    z = logits(*shape)
    labels, _ = hard_labels(logits(*shape).flip(1).softmax(1), False)
    expected = -z.softmax(1).gather(1, labels).log()
    assert torch.allclose(voxel_cross_entropy(z, labels, False), expected, atol=1e-12)
    regions = (logits(*shape).flip(0, 1) > 0).long()
    p = z.sigmoid()
    expected = -(regions * p.log() + (1 - regions) * (1 - p).log())
    assert torch.allclose(voxel_cross_entropy(z, regions, True), expected, atol=1e-12)


def test_a_class_that_is_never_predicted_changes_nothing():
    z, labels = logits(2, 3, 4), torch.randint(0, 3, (2, 1, 4))
    wider = torch.cat([z, torch.full((2, 1, 4), -1e3, dtype=z.dtype)], 1)
    assert torch.allclose(voxel_cross_entropy(wider, labels, False), voxel_cross_entropy(z, labels, False))
    assert torch.equal(hard_labels(wider.softmax(1), False)[0], hard_labels(z.softmax(1), False)[0])


def test_half_precision_is_computed_in_single_precision():
    z = torch.tensor([[[60000.0], [-60000.0]]], dtype=torch.float16)
    loss = voxel_cross_entropy(z, torch.ones(1, 1, 1), False)
    assert loss.dtype == torch.float32 and float(loss) == pytest.approx(120000, rel=1e-3)


def test_known_labels_leave_the_ignore_label_out():
    target = torch.tensor([[[0, 2, 3]]])
    labels, known = known_labels(target, False, 3)
    assert labels is target and known.tolist() == [[[True, True, False]]]
    regions = torch.tensor([[[1, 0], [0, 0], [0, 1]]])
    labels, known = known_labels(regions, True, 3)
    assert labels.tolist() == [[[1, 0], [0, 0]]] and known.tolist() == [[[True, False]]]
    assert known_labels(regions, True, None)[1].tolist() == [[[True, True]]]


@pytest.mark.parametrize("size, wanted", [((9, 8), (5, 4)), ((7, 6), (4, 2)), ((5, 12, 10), (5, 6, 5)),
                                          ((20, 7, 3), (3, 7, 1))])
def test_labels_are_resampled_as_nnunet_resamples_its_targets(size, wanted):
    labels = torch.randint(0, 9, (2, 1, *size), generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(labels.float(), wanted, mode="nearest-exact").long()
    assert torch.equal(nearest(labels, wanted), expected)
    assert math.prod(nearest(labels, torch.Size(wanted)).shape) == expected.numel()
