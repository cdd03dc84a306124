from itertools import product

import pytest
import torch
import torch.nn.functional as F

from nnunetv2_semi.losses.local_ncc import local_ncc_loss, local_ncc_map


def naive_map(image, reference, window, epsilon=1e-5):
    """Window by window; the image is 0 outside."""
    half, sizes = window // 2, image.shape[2:]
    padded = [F.pad(each, (half,) * 2 * len(sizes)) for each in (image, reference)]
    found = torch.zeros_like(image)
    for voxel in product(*(range(size) for size in sizes)):
        around = (..., *(slice(begin, begin + window) for begin in voxel))
        first, second = (each[around].flatten(2) for each in padded)
        first, second = first - first.mean(2, keepdim=True), second - second.mean(2, keepdim=True)
        squares = first.square().sum(2) * second.square().sum(2)
        found[(..., *voxel)] = (first * second).sum(2).square() / (squares + epsilon)
    return found


def pair(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    image = torch.rand(*shape, generator=generator, dtype=dtype)
    return image, image + torch.rand(*shape, generator=generator, dtype=dtype)


@pytest.mark.parametrize("shape", [(2, 2, 5, 6, 4), (1, 2, 11, 7), (1, 1, 1, 6, 5), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("window", [1, 3, 5, 7, 9])
def test_equals_the_definition_in_values_and_gradients(shape, window):
    leaves = [leaf.requires_grad_() for leaf in pair(*shape)]
    ours, naive = local_ncc_map(*leaves, window), naive_map(*leaves, window)
    assert torch.allclose(ours, naive, rtol=0, atol=1e-11)
    weights = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for a, b in zip(torch.autograd.grad((ours * weights).sum(), leaves),
                    torch.autograd.grad((naive * weights).sum(), leaves), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-9)


def test_gradients_of_gradients_are_right():
    leaves = [leaf.requires_grad_() for leaf in pair(1, 1, 3, 4)]
    assert torch.autograd.gradgradcheck(lambda *both: local_ncc_map(*both, 3), leaves)


@pytest.mark.parametrize("shape", [(2, 1, 12, 13), (1, 2, 8, 9, 10)], ids=str)
def test_brightness_and_contrast_of_either_image_do_not_matter(shape):
    image, reference = pair(*shape)
    expected = local_ncc_map(image, reference, 5)
    assert torch.allclose(local_ncc_map(-7 * image, 3 * reference, 5), expected, atol=1e-5)
    inside = (..., *(slice(2, -2),) * (len(shape) - 2))  # beyond the border intensities are 0
    assert torch.allclose(local_ncc_map(2 * image + 4, reference - 3, 5)[inside], expected[inside], atol=1e-5)
    assert torch.allclose(local_ncc_map(reference, image, 5), expected)


def test_from_0_for_unrelated_images_to_1_for_the_same():
    image, other = torch.randn(2, 1, 1, 20, 20, 20, generator=torch.Generator().manual_seed(0)).unbind(0)
    assert local_ncc_map(image, image).min() > 0.9999 and local_ncc_loss(image, image) < 1e-4
    unrelated = local_ncc_map(image, other)
    assert 0 <= unrelated.min() and unrelated.max() <= 1 and unrelated.mean() < 0.02
    assert float(local_ncc_loss(image, other)) == pytest.approx(1 - float(unrelated.mean()))


def rounding_bound(image, reference, window=9):
    """How far float32 may be from the exact NCC^2 of two float32 images by rounding alone, per voxel.

    With u = 2^-24, a sum of terms that each pass through at most k additions is off by k u sum |term| to first order.
    A window's sum takes floor(log2 w) + (ones among the binary digits of w) - 1 additions along each axis, and one for
    the zeros around the image; its terms, products of two differences from the mean, are rounded 3 times. So k of them.
    Let a and b be the images less their means, A and B the sums of a^2 and b^2 over the n voxels of a window. Then
    sum |a b| is at most sqrt(A B) and |sum a| at most sqrt(n A), so that the variance V = A - (sum a)^2 / n is off by
    e A, with e = (3 k + 4) u: k for A, 2 k for the square of the sum, 4 for the other operations. W is so by e B, the
    covariance by e sqrt(A B). With x = e A / V and y = e B / W, NCC^2 <= 1 is off by less than
    (4 m + m^2) / (1 - 2 m) <= 6 m, for m = (x + y) / 2 <= 1/8.
    """
    dims = image.ndim - 2
    additions = dims * (window.bit_length() - 1 + window.bit_count() - 1) + 1 + 3
    e = (3 * additions + 4) * 2.0 ** -24
    total = 0.0
    for each in (image, reference):
        mean = each.mean(tuple(range(2, each.ndim)), keepdim=True).double()
        padded = F.pad(each, (window // 2,) * 2 * dims).double() - mean
        pool = F.avg_pool3d if dims == 3 else F.avg_pool2d
        squares = pool(padded.square(), window, stride=1)
        total = total + e * squares / (squares - pool(padded, window, stride=1).square()).clamp_min(1e-300)
    return 3 * total


def volumes(seed):
    """Two related float32 volumes: mean 0 to 10^4, standard deviation 10^-3 to 10, and in some a step of intensity."""
    generator = torch.Generator().manual_seed(seed)
    first, noise, (level, spread) = (torch.randn(1, 1, 14, 15, 16, generator=generator),
                                     torch.randn(1, 1, 14, 15, 16, generator=generator),
                                     torch.rand(2, generator=generator).tolist())
    mean, deviation = (0.0 if seed % 5 == 0 else 10 ** (4 * level)), 10 ** (4 * spread - 3)
    images = [mean + deviation * first, mean + deviation * (first + noise) / 2]
    if seed % 2:
        for image in images:
            image[..., 7:] += 30 * deviation
    return images


@pytest.mark.parametrize("seed", range(20))
def test_single_precision_is_wrong_by_rounding_alone(seed):
    images = volumes(seed)
    error = (local_ncc_map(*images) - local_ncc_map(*(image.double() for image in images))).abs()
    bound = rounding_bound(*images)
    assert bound.median() < 1e-4 and bound.max() < 0.1
    assert (error <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("level", [0.0, -0.3, 1000.0])
def test_constant_images_have_finite_gradients(dtype, level):
    image = torch.full((1, 1, 12, 12, 12), level, dtype=dtype, requires_grad=True)
    for reference in (pair(1, 1, 12, 12, 12, dtype=dtype)[0], torch.full_like(image, 2.0), torch.zeros_like(image)):
        found = local_ncc_map(image, reference)
        assert found.isfinite().all() and found.min() >= 0 and found.max() <= 1 + 1e-4
        gradient, = torch.autograd.grad(1 - found.mean(), image)
        assert gradient.isfinite().all()


def test_a_constant_background_beside_a_structure_stays_in_range():
    image = torch.full((1, 1, 24, 24, 24), -0.7)
    image[..., 12:, 12:, 12:] = torch.randn(12, 12, 12, generator=torch.Generator().manual_seed(0))
    image.requires_grad_()
    found = local_ncc_map(image, image.detach().roll(2, 2))
    gradient, = torch.autograd.grad(found.mean(), image)
    assert 0 <= found.min() and found.max() <= 1 + 1e-4 and gradient.isfinite().all()


@pytest.mark.parametrize("level", [10.0, 100.0, 1000.0])
def test_a_constant_block_far_from_the_mean_has_no_correlation_made_of_rounding(level):
    images = torch.randn(2, 1, 1, 16, 24, 24)
    images[0][..., 2:14, 2:14, 2:14] = level
    images[1][..., 3:15, 4:20, 4:20] = level
    found = local_ncc_map(*images)
    assert found.min() >= 0 and found.max() < 1.01
    assert (found - local_ncc_map(*images.double())).abs().mean() < 0.02


def test_half_precision_is_computed_in_single_precision():
    image, reference = (each.half() for each in pair(1, 1, 10, 11))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = local_ncc_map(image, reference)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, local_ncc_map(image.float(), reference.float()))


@pytest.mark.parametrize("other, window, message", [((1, 1, 4, 6), 9, "same shape"), ((1, 1, 4, 5), 8, "odd"),
                                                    ((1, 1, 4, 5), 0, "odd")])
def test_wrong_input_is_refused(other, window, message):
    with pytest.raises(ValueError, match=message):
        local_ncc_map(torch.zeros(1, 1, 4, 5), torch.zeros(other), window)
