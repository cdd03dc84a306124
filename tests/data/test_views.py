import pytest
import torch

from nnunetv2_semi.data.views import IntensityViews


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * 3 + 1


@pytest.mark.parametrize("shape", [(3, 2, 6, 7), (2, 1, 4, 5, 6)])
def test_same_parameters_give_the_same_views(shape):
    image = images(*shape)
    drawn = IntensityViews.draw(2, image)
    assert drawn.apply(image).shape == (2, *shape)
    assert torch.equal(drawn.apply(image), drawn.apply(image))


def test_parameters_are_replayable_from_a_seed():
    torch.manual_seed(5)
    first = IntensityViews.draw(2, images(2, 1, 4, 4))
    torch.manual_seed(5)
    second = IntensityViews.draw(2, images(2, 1, 4, 4))
    assert torch.equal(first.scale, second.scale) and first.noise_seed == second.noise_seed


@pytest.mark.parametrize("shift_by", ["std", "mean"])
def test_a_view_is_scale_times_image_plus_shift_and_noise(shift_by):
    image = images(2, 3, 8, 8, 8)
    drawn = IntensityViews(torch.full((1, 2, 3), 1.5), torch.full((1, 2, 3), -0.5), torch.tensor([[0.0, 0.1]]), 7)
    view = drawn.apply(image, shift_by)[0]
    unit = getattr(image.flatten(2), shift_by)(2)
    plain = 1.5 * image - 0.5 * unit[..., None, None, None]
    assert torch.allclose(view[0], plain[0], atol=1e-5)
    noise = view[1] - plain[1]
    assert noise.std() == pytest.approx(0.1, rel=0.1) and abs(noise.mean()) < 0.01


def test_parameters_stay_in_their_ranges_and_differ_between_views_patches_and_channels():
    drawn = IntensityViews.draw(50, images(10, 2, 4, 4))
    assert 0.5 <= drawn.scale.min() < 0.55 and 1.45 < drawn.scale.max() <= 1.5
    assert -0.5 <= drawn.shift.min() < -0.45 and 0.45 < drawn.shift.max() <= 0.5
    assert drawn.sigma.max() <= 0.1 and (drawn.sigma > 0).float().mean() == pytest.approx(0.5, abs=0.1)
    assert len(drawn.scale.unique()) > 990


def test_the_views_of_a_patch_do_not_depend_on_what_else_is_in_the_batch():
    image = images(3, 1, 5, 5)
    drawn = IntensityViews(torch.full((2, 3, 1), 0.7), torch.full((2, 3, 1), 0.2), torch.zeros(2, 3), 0)
    changed = image.clone()
    changed[0] *= 10
    assert torch.equal(drawn.apply(image)[:, 1:], drawn.apply(changed)[:, 1:])


def test_a_gamma_curve_keeps_the_ends_and_bends_between_them():
    image = images(2, 2, 6, 6, 6)
    gamma = torch.tensor([[[2.0, 0.5], [1.0, 1.0]]])
    drawn = IntensityViews(torch.ones(1, 2, 2), torch.zeros(1, 2, 2), torch.zeros(1, 2), 0, gamma)
    view = drawn.apply(image)[0]
    for patch, channel in ((0, 0), (0, 1), (1, 0)):
        x, exponent = image[patch, channel], float(gamma[0, patch, channel])
        expected = x.min() + (x.max() - x.min()) * ((x - x.min()) / (x.max() - x.min())) ** exponent
        assert torch.allclose(view[patch, channel], expected, atol=1e-5)
    constant = torch.full((1, 1, 4, 4), 3.0)
    drawn = IntensityViews.draw(1, constant, 0, 0, 0, gamma=1.0)
    assert torch.allclose(drawn.apply(constant), constant)


def test_exponents_are_symmetric_in_their_logarithm():
    gamma = IntensityViews.draw(50, images(10, 2, 4, 4), gamma=1.0).gamma
    assert 0.5 <= gamma.min() < 0.52 and 1.92 < gamma.max() <= 2
    assert abs(gamma.log().mean()) < 0.05
    assert IntensityViews.draw(1, images(1, 1, 4, 4)).gamma is None


def test_instance_normalisation_undoes_scale_and_shift_but_not_gamma():
    """Why there is a gamma curve: a network's first layers would not notice the paper's views of one channel."""
    convolution = torch.nn.Conv3d(1, 4, 3)  # without padding: borders alone tell a shift
    image, norm = images(1, 1, 9, 9, 9), torch.nn.InstanceNorm3d(4)
    seen = norm(convolution(image))

    def change(scale: float, shift: float, gamma: float) -> float:
        one = torch.ones(1, 1, 1)
        view = IntensityViews(scale * one, shift * one, torch.zeros(1, 1), 0, gamma * one).apply(image)[0]
        return float((norm(convolution(view)) - seen).abs().mean().detach())

    assert change(1.5, 0.5, 1.0) < 1e-3
    assert change(1.0, 0.0, 2.0) > 0.05


def test_zeros_of_masked_channels_stay_and_all_else_is_as_without_a_mask():
    image = images(2, 3, 6, 6)
    image[:, :, 2:4] = 0
    drawn = IntensityViews.draw(2, image, gamma=1.5, noise_probability=1.0)
    free, masked = drawn.apply(image), drawn.apply(image, masked=(0, 2))
    assert (free[:, :, :, 2:4] != 0).all()
    assert (masked[:, :, [0, 2], 2:4] == 0).all() and torch.equal(masked[:, :, 1], free[:, :, 1])
    outside = torch.tensor([0, 1, 4, 5])
    assert torch.equal(masked[..., outside, :], free[..., outside, :])
