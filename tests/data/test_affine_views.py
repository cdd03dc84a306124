import numpy as np
import pytest
import torch
from scipy.ndimage import affine_transform

from nnunetv2_semi.data.affine_views import AffineViews
from nnunetv2_semi.present_channels import FILL, present_channels

KINDS = [((9, 12), (1.0, 1.0), False), ((8, 8), (0.5, 2.0), False), ((5, 8, 11), (1.0, 1.0, 1.0), False),
         ((6, 7, 8), (3.0, 1.0, 1.5), False), ((4, 9, 9), (5.0, 1.0, 1.0), True)]


def drawn(patches, spacing, in_plane, rotation=1.0, scale=(0.7, 1.4), seed=0):
    torch.manual_seed(seed)
    return AffineViews.draw(patches, spacing, rotation, in_plane, scale)


@pytest.mark.parametrize("shape, spacing, in_plane", KINDS)
@pytest.mark.parametrize("order, mode", [(1, "bilinear"), (0, "nearest")])
def test_views_are_those_of_scipy(shape, spacing, in_plane, order, mode):
    image = torch.randn(3, 2, *shape)
    views = drawn(image, spacing, in_plane)
    seen, inside = views.of(image, mode), views.inside()
    centre = (np.array(shape) - 1) / 2
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) - centre
    for k in range(3):
        matrix = views.matrices[k].double().numpy()
        source = places @ matrix.T + centre
        clear = (np.abs(source % 1 - 0.5) > 1e-3).all(-1)  # of two voxels equally near either may be taken
        for before, after in zip(image[k], seen[k], strict=True):
            expected = affine_transform(before.numpy(), matrix, centre - matrix @ centre, order=order, mode="nearest")
            assert np.allclose(after.numpy()[clear], expected[clear], atol=1e-4)
        within = ((source >= -0.5) & (source <= np.array(shape) - 0.5)).all(-1)
        assert (inside[k, 0].numpy() == within)[clear].all() and 0.2 < within.mean() < 1


@pytest.mark.parametrize("shape, spacing, in_plane", KINDS)
def test_without_angle_and_size_nothing_moves(shape, spacing, in_plane):
    image, labels = torch.randn(2, 2, *shape), torch.randint(0, 4, (2, 3, *shape))
    views = drawn(image, spacing, in_plane, rotation=0.0, scale=(1.0, 1.0))
    assert torch.allclose(views.of(image), image, atol=1e-4)
    moved = views.of(labels, "nearest")
    assert torch.equal(moved, labels) and moved.dtype == labels.dtype
    mask = labels > 1
    assert torch.equal(views.of(mask, "nearest"), mask) and views.inside().all()


@pytest.mark.parametrize("shape, spacing, in_plane", KINDS)
def test_shapes_in_mm_are_kept_and_sizes_and_angles_are_in_their_range(shape, spacing, in_plane):
    views, mm = drawn(torch.zeros(400, 1, *shape), spacing, in_plane), torch.tensor(spacing)
    turned = views.matrices * mm[:, None] / mm
    first = 1 if in_plane else 0
    if in_plane:
        assert torch.equal(turned[:, 0], torch.eye(3)[0].expand(400, 3))
        assert torch.equal(turned[:, :, 0], torch.eye(3)[0].expand(400, 3))
    turned = turned[:, first:, first:]
    sizes = torch.linalg.det(turned) ** (-1 / turned.shape[1])
    product = turned @ turned.transpose(1, 2) * sizes.view(-1, 1, 1) ** 2
    assert torch.allclose(product, torch.eye(turned.shape[1]).expand_as(product), atol=1e-4)
    assert sizes.min() >= 0.7 - 1e-4 and sizes.min() < 0.72 and sizes.max() <= 1.4 + 1e-4 and sizes.max() > 1.37
    assert 0.4 < (sizes < (0.7 * 1.4) ** 0.5).float().mean() < 0.6  # as often smaller as larger
    if turned.shape[1] == 2:
        angles = torch.atan2(turned[:, 1, 0], turned[:, 0, 0])
        assert angles.abs().max() <= 1.0 + 1e-4 and angles.min() < -0.95 and angles.max() > 0.95


@pytest.mark.parametrize("axes", [(0, 1), (0, 2), (1, 2)])
def test_a_quarter_turn_is_rot90(axes):
    image = torch.randn(1, 2, 6, 6, 6)
    matrix = torch.eye(3)
    matrix[axes[0], axes[0]] = matrix[axes[1], axes[1]] = 0.0
    matrix[axes[0], axes[1]], matrix[axes[1], axes[0]] = -1.0, 1.0
    expected = torch.rot90(image, -1, (axes[0] + 2, axes[1] + 2))
    assert torch.allclose(AffineViews(matrix[None], (6, 6, 6)).of(image), expected, atol=1e-4)


def test_positions_are_exact_in_mixed_precision():
    image = torch.randn(2, 1, 64, 64)
    views = drawn(image, (1.0, 1.0), False)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, inside = AffineViews(views.matrices, views.shape).of(image), views.inside()
    assert torch.equal(mixed, views.of(image)) and inside.dtype == torch.bool


def test_the_mark_of_absent_channels_stays():
    image = torch.randn(2, 2, 8, 8)
    image[0, 1] = FILL
    seen = drawn(image, (1.0, 1.0), False).of(image)
    assert torch.equal(present_channels(seen), present_channels(image)) and seen[0, 1].signbit().all()
