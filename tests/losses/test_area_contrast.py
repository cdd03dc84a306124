"""Which areas of two predictions are contrasted."""

import pytest
import torch

from nnunetv2_semi.losses.area_contrast import AreaContrast
from nnunetv2_semi.losses.area_similarity import area_similarity_contrast, slices_as_areas


def contrast(regions=False, slice_axis=None, max_slices=16, temperature=1.0, empty_areas=True):
    return AreaContrast(regions, slice_axis, max_slices, temperature, empty_areas)


def predictions(*shape):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).softmax(1) for _ in range(2)]


@pytest.mark.parametrize("empty_areas, gradient_flows", [(False, False), (True, True)])
def test_areas_without_foreground_take_no_part_in_the_contrast(empty_areas, gradient_flows):
    faint = (0.01 * torch.rand(6, 2, 8, 8)).requires_grad_()
    contrast(empty_areas=empty_areas).of_areas(faint, 0.01 * torch.rand(6, 2, 8, 8)).backward()
    assert bool(faint.grad.abs().max() > 0) == gradient_flows


@pytest.mark.parametrize("regions", [False, True])
def test_areas_are_slices_along_the_axis_without_background(regions):
    first, second = predictions(2, 3, 4, 5, 6)
    kept = (first, second) if regions else (first[:, 1:], second[:, 1:])
    every_slice = [slices_as_areas(p, 1, 5, torch.arange(5))[0] for p in kept]
    assert torch.allclose(contrast(regions, 1, temperature=0.5)(first, second),
                          area_similarity_contrast(*every_slice, 0.5))


def test_both_predictions_show_the_same_drawn_slices():
    first, _ = predictions(2, 3, 8, 4, 4)
    torch.manual_seed(3)
    found = contrast(slice_axis=0, max_slices=2)(first, first)
    torch.manual_seed(3)
    drawn, _ = slices_as_areas(first[:, 1:], 0, 2)
    assert torch.allclose(found, area_similarity_contrast(drawn, drawn))


@pytest.mark.parametrize("shape, slice_axis", [((4, 3, 5, 6), 0), ((4, 3, 4, 5, 6), None)])
def test_areas_are_whole_patches_in_2d_or_where_no_axis_is_given(shape, slice_axis):
    first, second = predictions(*shape)
    assert torch.allclose(contrast(slice_axis=slice_axis)(first, second),
                          area_similarity_contrast(first[:, 1:], second[:, 1:]))
