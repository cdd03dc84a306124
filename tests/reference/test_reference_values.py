"""Losses that bear a paper's name equal the authors' released code, value and gradient.

The files beside this one hold inputs, loss values and gradients that the released code gives in double precision.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from nnunetv2_semi.losses.area_similarity import area_similarity_contrast
from nnunetv2_semi.losses.channel_contrast import channel_contrast
from nnunetv2_semi.losses.consensus_divergence import consensus_loss, divergence_loss
from nnunetv2_semi.losses.displacement_smoothness import displacement_smoothness
from nnunetv2_semi.losses.local_ncc import local_ncc_loss, local_ncc_map
from nnunetv2_semi.losses.predictions import class_codes
from nnunetv2_semi.losses.rectified_pseudo_supervision import (
    PseudoTarget,
    cosine_consistency,
    rectified_pseudo_supervision,
)
from nnunetv2_semi.losses.voxel_contrast import Voxels, unit_rows, voxel_contrast


def reference_values(name):
    return np.load(Path(__file__).parent / f"{name}.npz")


def assert_equal_to(reference, loss, gradients):
    """``gradients``: name in the reference file -> the tensor it is of."""
    assert abs(float(loss.detach()) - float(reference["loss"])) < 1e-9
    for name, ours in zip(gradients, torch.autograd.grad(loss, list(gradients.values())), strict=True):
        assert np.abs(ours.numpy() - reference[name]).max() < 1e-9, name


@pytest.mark.parametrize("name", ["asc_binary_2d", "asc_multiclass_2d"])
def test_area_similarity_contrast(name):
    reference = reference_values(name)
    first, second = (torch.tensor(reference[key], requires_grad=True) for key in ("z_i", "z_j"))
    assert_equal_to(reference, area_similarity_contrast(first, second), {"grad_z_i": first, "grad_z_j": second})


@pytest.mark.parametrize("direction", ["bidirectional", "unidirectional"])
def test_voxel_contrast(direction):
    reference = reference_values(f"voxel_contrast_{direction}")
    first, second, negative = (torch.tensor(reference[key], requires_grad=True)
                               for key in ("view_1", "view_2", "negative"))
    classes, _ = class_codes(torch.tensor(reference["view_logits"]).softmax(1), regions=False)
    negatives = Voxels.of(negative, *class_codes(torch.tensor(reference["negative_logits"]).softmax(1), regions=False))
    loss = voxel_contrast(unit_rows(first), unit_rows(second), classes.flatten(), negatives,
                          int(reference["num_negatives"]), float(reference["temperature"]),
                          bidirectional=direction == "bidirectional")
    assert_equal_to(reference, loss, {"grad_view_1": first, "grad_view_2": second, "grad_negative": negative})


def test_rectified_pseudo_supervision():
    reference = reference_values("rectified_pseudo_supervision")
    student = torch.tensor(reference["student_logits"], requires_grad=True)
    target = PseudoTarget.from_logits(torch.tensor(reference["target_logits"]), float(reference["temperature"]))
    assert_equal_to(reference, rectified_pseudo_supervision(student, target), {"grad_student": student})
    cosine = cosine_consistency(student.detach(), torch.tensor(reference["other_view_logits"]))
    assert abs(float(cosine) - float(reference["cosine_loss"])) < 1e-9


def direct_local_ncc(image, other, window, epsilon=1e-5):
    """From sums over windows of the images, their squares and their product, with no mean taken off first."""
    ones = torch.ones(1, 1, *[window] * (image.ndim - 2), dtype=image.dtype)

    def summed(values):
        return torch.nn.functional.conv3d(values, ones, padding=window // 2)
    first, second, voxels = summed(image), summed(other), float(ones.numel())
    of_first, of_second = first / voxels, second / voxels
    cross = summed(image * other) - of_second * first - of_first * second + of_first * of_second * voxels
    variances = [summed(values * values) - 2 * mean * total + mean * mean * voxels
                 for values, mean, total in ((image, of_first, first), (other, of_second, second))]
    return cross * cross / (variances[0] * variances[1] + epsilon)


def test_local_ncc():
    reference = reference_values("registration")
    image, other, expected = (torch.tensor(reference[key]) for key in ("image", "reference", "local_ncc_map"))
    window = int(reference["window"])
    found = local_ncc_map(image, other, window)
    assert found.dtype == expected.dtype == torch.float32
    # The reference is the direct form in single precision, 9.3e-6 from the same form in double precision.
    assert (direct_local_ncc(image, other, window) - expected).abs().max() < 1e-6
    exact = direct_local_ncc(image.double(), other.double(), window)
    assert (found - exact).abs().max() < 1e-6
    assert (local_ncc_map(image.double(), other.double(), window) - exact).abs().max() < 1e-9
    assert (found - expected).abs().max() < 1e-5
    assert abs(float(local_ncc_loss(image, other, window)) - (1 - float(expected.double().mean()))) < 1e-6


def test_displacement_smoothness():
    reference = reference_values("registration")
    assert abs(float(displacement_smoothness(torch.tensor(reference["flow"]))) - float(reference["smoothness"])) < 1e-9


def test_channel_contrast():
    reference = reference_values("registration")
    first, second = (torch.tensor(reference[key]) for key in ("channels_a", "channels_b"))
    released = float(channel_contrast(first, second, normalise="released"))
    assert abs(released - float(reference["channel_contrast_released"])) < 1e-9


def test_consensus_divergence():
    reference = reference_values("consensus_divergence")
    foundation, conventional = (torch.tensor(reference[f"prob_{name}"], requires_grad=True)
                                for name in ("foundation", "conventional"))
    consensus, divergence = (loss(foundation, conventional, regions=False)
                             for loss in (consensus_loss, divergence_loss))
    assert abs(float(consensus.detach()) - float(reference["consensus_loss"])) < 1e-9
    assert abs(float(divergence.detach()) - float(reference["divergence_loss"])) < 1e-9
    for name, ours in zip(("foundation", "conventional"),
                          torch.autograd.grad(consensus + divergence, [foundation, conventional]), strict=True):
        assert np.abs(ours.numpy() - reference[f"grad_{name}"]).max() < 1e-9, name
