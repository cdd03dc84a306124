import pytest
import torch

from nnunetv2_semi.networks.correspondence import CorrespondenceHead


def moved(features, shift):
    """Features at x + shift, whose own border is repeated."""
    for axis, by in enumerate(shift, 2):
        size = features.shape[axis]
        features = features.index_select(axis, (torch.arange(size) + by).clamp(0, size - 1))
    return features


def inside(field, margin=3):
    """The field (B, n, *spatial) without its border, where there is nothing to correlate with, averaged: (n,)."""
    for axis in range(2, field.ndim):
        field = field.narrow(axis, margin, field.shape[axis] - 2 * margin)
    return field.flatten(2).mean((0, 2))


@pytest.mark.parametrize("shift", [(1, 0, -1), (0, -2, 1), (2, 1), (0, -1)])
def test_untrained_head_finds_the_direction_of_a_shift_along_every_axis(shift):
    """Not all of it: the softmax leaves something to the other 124 shifts, which average to none."""
    dims = len(shift)
    source = torch.randn(2, 16, *[12] * dims)
    found = inside(CorrespondenceHead([16], dims)([moved(source, shift)], [source], [12] * dims).detach())
    for by, along in zip(shift, found.tolist(), strict=True):
        assert by / 4 <= along <= by or by <= along <= by / 4 or (by == 0 and abs(along) < 0.1)


def test_coarse_stage_finds_what_is_beyond_the_reach_of_the_fine_one():
    """4 voxels of the fine stage are 2 of the coarse one, the radius; the result is in voxels of the size asked for."""
    coarse, fine = torch.randn(1, 32, 12, 12), torch.randn(1, 32, 24, 24)
    head = CorrespondenceHead([32, 32], 2)
    found = inside(head([moved(coarse, (2, 0)), moved(fine, (4, 0))], [coarse, fine], (48, 48)).detach(), 12)
    assert found[0].item() == pytest.approx(8, abs=1.5) and abs(found[1].item()) < 0.5
    alone = CorrespondenceHead([32], 2)
    assert inside(alone([moved(fine, (4, 0))], [fine], (48, 48)).detach(), 12)[0].item() < 2


def test_what_all_voxels_share_does_not_count():
    source = torch.randn(1, 16, 12, 12)
    target, head = moved(source, (1, 0)), CorrespondenceHead([16], 2)
    for estimator in head.estimators:
        torch.nn.init.zeros_(estimator[-1].weight)
    torch.testing.assert_close(head([target + 5], [source + 5], (12, 12)), head([target], [source], (12, 12)),
                               atol=1e-4, rtol=0)


def test_gradient_reaches_features_of_both():
    target, source = (torch.randn(1, 8, 8, 8, requires_grad=True) for _ in range(2))
    CorrespondenceHead([8], 2)([target], [source], (8, 8)).square().sum().backward()
    assert target.grad.abs().sum() > 0 and source.grad.abs().sum() > 0
