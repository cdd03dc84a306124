"""What the perturbed patches of the methods have in common."""

import pytest

from nnunetv2_semi.methods.cps import CPS
from nnunetv2_semi.methods.fixmatch import FixMatch
from nnunetv2_semi.methods.mean_teacher import MeanTeacher
from nnunetv2_semi.methods.mix import Mix
from nnunetv2_semi.methods.rcps import RCPS


@pytest.mark.parametrize("method_class", [Mix, FixMatch, CPS, MeanTeacher, RCPS])
@pytest.mark.parametrize("masked", [(), (0,)])
def test_outside_of_nnunets_mask_the_networks_see_zeros_as_at_test_time(small, method_class, masked):
    network = small.network(2, 3, 2)
    method = method_class(network, method_class.Settings(view_noise_probability=1.0), small.context(
        masked_channels=masked))
    method.progress = 0.5
    batch = small.batch(dims=2)
    for image in (batch.labelled, batch.unlabelled):
        image[..., 2:4] = 0
    outside = []
    network.register_forward_pre_hook(lambda _, images: outside.append(images[0][..., 2:4]))
    for _ in method.loss(batch):
        pass
    assert len(outside) >= 2
    changed = [channel for channel in (0, 1) if any((patches[:, channel] != 0).any() for patches in outside)]
    assert changed == [channel for channel in (0, 1) if channel not in masked]
