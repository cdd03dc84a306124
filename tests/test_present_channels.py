import math

import pytest
import torch
import torch.nn.functional as F

from nnunetv2_semi.present_channels import fill_absent, present_channels, present_modalities

PRESENT = torch.tensor([[True, False, True], [False, False, True]])


@pytest.mark.parametrize("shape", [(5, 6), (4, 5, 6)])
def test_what_was_filled_is_told_from_what_was_not(shape):
    image = fill_absent(torch.randn(2, 3, *shape), PRESENT)
    assert torch.equal(present_channels(image), PRESENT)
    assert (image[1, 0] == 0).all() and math.copysign(1, image[1, 0].flatten()[0]) == -1


def test_a_present_channel_may_be_zero_all_over_and_hold_any_intensity():
    image = torch.zeros(2, 3, 4, 4)
    image[1] = torch.tensor([-1.0, -0.0]).repeat(8).reshape(4, 4)
    assert present_channels(image).all()


@pytest.mark.parametrize("change", [
    lambda image: F.pad(image, (2, 2, 3, 0)), lambda image: image.flip(2), lambda image: image[..., 1:3, 2:],
    lambda image: image.half(), lambda image: image.bfloat16(), lambda image: torch.from_numpy(image.numpy().copy())])
def test_the_mark_survives_what_predictors_do_to_images(change):
    image = fill_absent(torch.randn(2, 3, 6, 6), PRESENT)
    assert torch.equal(present_channels(change(image)), PRESENT)


def test_a_modality_is_present_if_any_of_its_channels_is():
    assert present_modalities(PRESENT, [[0], [1], [1, 2]]).tolist() == [[True, False, True], [False, False, True]]


def test_compiled_code_sees_the_mark_too():
    image = fill_absent(torch.randn(2, 3, 6, 6), PRESENT)
    assert torch.equal(torch.compile(present_channels, backend="aot_eager")(image), PRESENT)
