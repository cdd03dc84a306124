from itertools import product

import pytest
import torch
import torch.nn.functional as F

from nnunetv2_semi.networks.warp import compose, folded_share, jacobian_determinant, resize_displacement, warp

SIZES = [(6, 7), (4, 5, 6), (1, 7), (1, 5, 6)]


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def constant(size, *voxels, batch=1):
    return torch.tensor(voxels, dtype=torch.float64).view(1, -1, *[1] * len(size)).expand(batch, -1, *size)


def positions(size):
    """The coordinates of every voxel, (1, n, *size)."""
    return torch.stack(torch.meshgrid(*[torch.arange(s, dtype=torch.float64) for s in size], indexing="ij"))[None]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_no_displacement_changes_nothing(size, mode):
    image = drawn(2, 3, *size)
    assert torch.allclose(warp(image, torch.zeros(2, len(size), *size, dtype=torch.float64), mode), image, atol=1e-12)


@pytest.mark.parametrize("size, shift", [((6, 7), (1, -2)), ((5, 6, 7), (1, -2, 3))])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_whole_voxels_are_read_at_x_plus_the_displacement(size, shift, mode):
    image = drawn(2, 3, *size)
    warped = warp(image, constant(size, *shift, batch=2), mode)
    repeated = image
    for axis, (voxels, along) in enumerate(zip(size, shift, strict=True), 2):
        repeated = repeated.index_select(axis, (torch.arange(voxels) + along).clamp(0, voxels - 1))
    assert torch.allclose(warped, repeated, atol=1e-12)
    zeros = warp(image, constant(size, *shift, batch=2), mode, padding="zeros")
    rolled = torch.roll(image, tuple(-along for along in shift), tuple(range(2, image.ndim)))
    inside = warp(torch.ones_like(image), constant(size, *shift, batch=2), mode, padding="zeros")
    assert torch.allclose(zeros, rolled * inside, atol=1e-12) and 0 < inside.mean() < 1


@pytest.mark.parametrize("size", [(6, 7), (4, 5, 6)], ids=str)
def test_linear_images_and_linear_fields_are_exact(size):
    where = positions(size)
    matrix = 0.2 * drawn(len(size), len(size))
    middle = torch.tensor(size, dtype=torch.float64).sub(1).div(2).view(1, -1, *[1] * len(size))
    displacement = torch.einsum("ij,bj...->bi...", matrix, where - middle)
    target = where + displacement
    last = torch.tensor(size, dtype=torch.float64).view(1, -1, *[1] * len(size)) - 1
    assert torch.allclose(warp(where, displacement), torch.minimum(target.clamp_min(0), last), atol=1e-12)
    expected = torch.linalg.det(torch.eye(len(size), dtype=torch.float64) + matrix)
    determinant = jacobian_determinant(displacement)
    assert determinant.shape == (1, *(s - 1 for s in size))
    assert torch.allclose(determinant, expected.expand_as(determinant))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gradients_reach_image_and_displacement(size):
    image, displacement = drawn(1, 2, *size), 0.3 * drawn(1, len(size), *size) + 0.1
    leaves = [leaf.requires_grad_() for leaf in (image, displacement)]
    # between voxels and inside, where the interpolation has a derivative
    assert torch.autograd.gradcheck(lambda *both: warp(*both, padding="zeros"), leaves)


@pytest.mark.parametrize("old, new", [((5, 9), (9, 17)), ((9, 5, 7), (5, 9, 13)), ((1, 5, 5), (1, 9, 9)),
                                      ((1, 5), (3, 5)), ((3, 5), (1, 5))], ids=str)
def test_a_resized_field_moves_as_far_in_voxels_of_its_new_grid(old, new):
    ratios = [max(n - 1, 1) / max(o - 1, 1) for o, n in zip(old, new, strict=True)]
    voxels = [0.5 + axis for axis in range(len(old))]
    resized = resize_displacement(constant(old, *voxels, batch=2), new)
    expected = constant(new, *(v * r for v, r in zip(voxels, ratios, strict=True)), batch=2)
    assert resized.shape == expected.shape and torch.allclose(resized, expected)


@pytest.mark.parametrize("old, new", [((9, 9), (17, 17)), ((7, 7, 7), (13, 13, 13))], ids=str)
def test_warping_commutes_with_a_finer_grid(old, new):
    how = {"mode": "bilinear" if len(old) == 2 else "trilinear", "align_corners": True}
    image = positions(old).prod(1, keepdim=True).sqrt()
    displacement = (positions(old) / 3).sin() * 0.8
    coarse = F.interpolate(warp(image, displacement), new, **how)
    fine = warp(F.interpolate(image, new, **how), resize_displacement(displacement, new))
    away_from_zero = (..., *(slice(4, -4),) * len(new))
    assert (coarse - fine)[away_from_zero].abs().max() < 0.05 * (coarse - image.mean())[away_from_zero].abs().max()


@pytest.mark.parametrize("size", [(9, 10), (8, 9, 10)], ids=str)
def test_a_composed_field_warps_as_one_after_the_other(size):
    where = positions(size)
    first, second = 0.4 * (where / 2).sin(), 0.3 * (where / 3).cos()
    image = (where / 4).sin().sum(1, keepdim=True)
    both, composed = warp(warp(image, first), second), warp(image, compose(first, second))
    inside = (..., *(slice(1, -1),) * len(size))
    assert (both - composed)[inside].abs().max() < 0.02
    assert (warp(image, first + second) - both)[inside].abs().max() > (both - composed)[inside].abs().max()
    whole = constant(size, *[1] * len(size))
    assert torch.allclose(compose(whole, whole), 2 * whole)


@pytest.mark.parametrize("size", [(5, 6), (4, 5, 6)], ids=str)
def test_a_field_folds_where_voxels_change_places(size):
    displacement = torch.zeros(1, len(size), *size, dtype=torch.float64)
    assert torch.equal(jacobian_determinant(displacement), torch.ones(1, *(s - 1 for s in size), dtype=torch.float64))
    assert folded_share(displacement) == 0
    # along the last axis, voxel 2 goes to 4 and voxel 3 to 1: between them space is turned round, beside them stretched
    displacement[:, -1, ..., 2], displacement[:, -1, ..., 3] = 2, -2
    determinant = jacobian_determinant(displacement)
    assert torch.equal(determinant[0].flatten(0, -2)[0], torch.tensor([1, 3, -3, 3, 1], dtype=torch.float64))
    assert folded_share(displacement) == pytest.approx(1 / 5)


def test_the_determinant_is_that_of_the_differences_written_out():
    displacement = drawn(2, 3, 3, 4, 5)
    found = jacobian_determinant(displacement)
    for patch, z, y, x in product(range(2), range(2), range(3), range(4)):
        here = displacement[patch, :, z, y, x]
        columns = [displacement[patch, :, z + 1, y, x], displacement[patch, :, z, y + 1, x],
                   displacement[patch, :, z, y, x + 1]]
        matrix = torch.eye(3, dtype=torch.float64) + torch.stack([column - here for column in columns], 1)
        assert torch.isclose(found[patch, z, y, x], torch.linalg.det(matrix))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_single_slice_folds_as_a_plane_does(axis):
    flat = drawn(2, 2, 5, 6)
    volume = flat.unsqueeze(2 + axis)
    other = torch.randn_like(volume[:, :1])
    volume = torch.cat([volume[:, :axis], other, volume[:, axis:]], 1)
    assert torch.allclose(jacobian_determinant(volume).squeeze(1 + axis), jacobian_determinant(flat))
    image = drawn(2, 1, 5, 6)
    assert torch.allclose(warp(image.unsqueeze(2 + axis), volume).squeeze(2 + axis), warp(image, flat))


def test_half_precision_is_computed_in_single_precision():
    image, displacement = drawn(1, 2, 4, 5, 6).half(), drawn(1, 3, 4, 5, 6).half()
    expected = warp(image.float(), displacement.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = warp(image, displacement)
        resized = resize_displacement(displacement, (8, 8, 8))
    assert inside.dtype == resized.dtype == torch.float32
    assert torch.equal(inside, expected)
    assert warp(image, displacement.double()).dtype == torch.float64


def test_numbers_of_labels_stay_numbers_of_labels():
    labels = torch.randint(0, 5, (1, 1, 6, 7))
    warped = warp(labels, drawn(1, 2, 6, 7), "nearest")
    assert set(warped.unique().tolist()) <= set(labels.unique().tolist())


@pytest.mark.parametrize("call", [
    lambda: warp(torch.zeros(1, 1, 4, 5), torch.zeros(1, 3, 4, 5)),
    lambda: warp(torch.zeros(2, 1, 4, 5), torch.zeros(1, 2, 4, 5)),
    lambda: warp(torch.zeros(1, 1, 4, 5), torch.zeros(1, 2, 4, 6)),
    lambda: resize_displacement(torch.zeros(1, 2, 4, 5), (4, 5, 6)),
    lambda: resize_displacement(torch.zeros(1, 3, 4, 5), (4, 5)),
    lambda: jacobian_determinant(torch.zeros(1, 3, 4, 5)),
    lambda: jacobian_determinant(torch.zeros(1, 1, 4))])
def test_wrong_shapes_are_refused(call):
    with pytest.raises(ValueError, match="displacement"):
        call()
