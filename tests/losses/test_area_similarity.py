import math

import pytest
import torch

from nnunetv2_semi.losses.area_similarity import area_similarity, area_similarity_contrast, slices_as_areas


def naive_contrast(first, second, temperature=1.0):
    """The equation, area by area."""
    areas = [*first, *second]
    n = len(areas)

    def similarity(a, b):
        return (2 * (a * b).sum() + 1e-6) / ((a * a).sum() + (b * b).sum() + 1e-6) / temperature

    total = 0.0
    for i in range(n):
        positive = (i + n // 2) % n
        denominator = sum(torch.exp(similarity(areas[i], areas[j])) for j in range(n) if j != i)
        total = total - torch.log(torch.exp(similarity(areas[i], areas[positive])) / denominator)
    return total / n


def random_areas(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("shape", [(1, 1, 5, 4), (3, 1, 6, 7), (4, 3, 5, 5), (2, 2, 4, 3, 5)])
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_equals_the_equation_written_out(shape, temperature):
    first, second = random_areas(*shape, seed=1), random_areas(*shape, seed=2)
    ours = torch.autograd.grad(area_similarity_contrast(first, second, temperature), [first, second])
    theirs = torch.autograd.grad(naive_contrast(first, second, temperature), [first, second])
    assert torch.allclose(area_similarity_contrast(first, second, temperature),
                          naive_contrast(first, second, temperature), rtol=0, atol=1e-12)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_order_of_areas_and_of_modalities_does_not_matter():
    first, second = random_areas(5, 2, 6, 6, seed=1), random_areas(5, 2, 6, 6, seed=2)
    order = torch.tensor([3, 0, 4, 1, 2])
    loss = area_similarity_contrast(first, second)
    assert torch.allclose(loss, area_similarity_contrast(second, first))
    assert torch.allclose(loss, area_similarity_contrast(first[order], second[order]))


def test_a_class_that_is_nowhere_changes_nothing():
    first, second = random_areas(4, 1, 6, 6, seed=1), random_areas(4, 1, 6, 6, seed=2)
    absent = torch.zeros(4, 1, 6, 6, dtype=torch.float64)
    with_absent = area_similarity_contrast(torch.cat([first, absent], 1), torch.cat([second, absent], 1))
    assert torch.allclose(area_similarity_contrast(first, second), with_absent)


def test_one_area_has_no_negatives_and_no_loss():
    loss = area_similarity_contrast(random_areas(1, 2, 4, 4, seed=1), random_areas(1, 2, 4, 4, seed=2))
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-12)


def test_equal_and_empty_areas_have_similarity_one():
    areas = torch.zeros(2, 1, 4, 4)
    assert torch.equal(area_similarity(areas), torch.ones(2, 2))
    loss = area_similarity_contrast(areas.requires_grad_(), torch.zeros(2, 1, 4, 4))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(math.log(3))
    assert torch.isfinite(areas.grad).all()


def test_half_precision_is_computed_in_single_precision():
    first, second = (torch.rand(4, 1, 64, 64) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = area_similarity_contrast(first, second)
    assert under_autocast.dtype == torch.float32
    assert torch.equal(under_autocast, area_similarity_contrast(first, second))
    assert torch.isfinite(area_similarity_contrast(first.half(), second.half()))


@pytest.mark.parametrize("arguments, message", [
    ((torch.rand(2, 1, 4, 4), torch.rand(3, 1, 4, 4)), "same areas"),
    ((torch.rand(2, 1, 4, 4), torch.rand(2, 1, 4, 4), 0.0), "temperature"),
])
def test_wrong_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        area_similarity_contrast(*arguments)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_are_cut_along_the_axis_and_the_same_for_every_modality(axis):
    patches = torch.rand(2, 3, 5, 6, 7)
    slices, chosen = slices_as_areas(patches, axis, 4)
    again, _ = slices_as_areas(patches * 2, axis, 4, chosen)
    plane = [5, 6, 7]
    del plane[axis]
    assert slices.shape == (8, 3, *plane)
    assert torch.equal(again, slices * 2)
    assert torch.equal(slices[1], patches[0].select(1 + axis, int(chosen[1])))
    assert torch.equal(slices[4], patches[1].select(1 + axis, int(chosen[0])))
    assert len(slices_as_areas(patches, axis, 100)[1]) == patches.shape[2 + axis]


def test_areas_left_out_are_neither_anchors_nor_negatives():
    first, second = random_areas(5, 2, 6, 6, seed=1), random_areas(5, 2, 6, 6, seed=2)
    keep = torch.tensor([True, False, True, True, False])
    masked = area_similarity_contrast(first, second, keep=keep)
    alone = area_similarity_contrast(first[keep], second[keep])
    assert torch.allclose(masked, alone, rtol=0, atol=1e-12)
    gradient, = torch.autograd.grad(masked, first)
    assert gradient[~keep].abs().max() == 0 and gradient[keep].abs().min() > 0
    everything = area_similarity_contrast(first, second, keep=torch.ones(5, dtype=torch.bool))
    assert torch.allclose(everything, area_similarity_contrast(first, second), rtol=0, atol=1e-12)


def test_no_area_left_gives_zero_that_can_be_differentiated():
    first = random_areas(3, 1, 4, 4)
    loss = area_similarity_contrast(first, first.detach(), keep=torch.zeros(3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and first.grad.abs().max() == 0
