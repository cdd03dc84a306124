import itertools

import pytest
import torch

from nnunetv2_semi.data.flips import Flips
from nnunetv2_semi.present_channels import FILL, present_channels


@pytest.mark.parametrize("spatial, axes", [((4, 6), (0, 1)), ((4, 6), (1,)), ((3, 4, 5), (0, 2)),
                                           ((3, 4, 5), (0, 1, 2)), ((4, 6), ())])
@pytest.mark.parametrize("channels", [1, 4])
def test_each_patch_is_mirrored_along_its_own_axes(spatial, axes, channels):
    choices = list(itertools.product([False, True], repeat=len(axes)))
    image = torch.randn(len(choices), channels, *spatial)
    labels = torch.randint(0, 3, (len(choices), 1, *spatial))
    flips = Flips(torch.tensor(choices).view(len(choices), len(axes)), axes)
    mirrored, moved = flips.of(image), flips.of(labels)
    assert moved.dtype == labels.dtype
    for k, chosen in enumerate(choices):
        dims = [axis + 1 for axis, yes in zip(axes, chosen, strict=True) if yes]
        assert torch.equal(mirrored[k], image[k].flip(dims)) and torch.equal(moved[k], labels[k].flip(dims))
    assert torch.equal(flips.of(mirrored), image)


def test_each_axis_is_drawn_for_each_patch_with_probability_one_half():
    torch.manual_seed(0)
    mirrored = Flips.draw(2000, (0, 2)).mirrored
    assert mirrored.shape == (2000, 2)
    counts = [int((mirrored == torch.tensor(choice)).all(1).sum()) for choice in
              itertools.product([False, True], repeat=2)]
    assert all(400 < count < 600 for count in counts)


def test_where_nothing_may_be_mirrored_nothing_is():
    image = torch.randn(2, 1, 4, 4)
    assert torch.equal(Flips.draw(2, ()).of(image), image)


def test_the_mark_of_absent_channels_stays():
    image = torch.randn(2, 2, 4, 4)
    image[0, 1] = FILL
    mirrored = Flips(torch.tensor([[True], [False]]), (1,)).of(image)
    assert torch.equal(present_channels(mirrored), present_channels(image))
