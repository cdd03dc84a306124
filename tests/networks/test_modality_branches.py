import pytest
import torch
from torch import nn

from nnunetv2_semi.networks.modality_branches import ModalityBranches, mean_probability_logits
from nnunetv2_semi.present_channels import fill_absent


class Branch(nn.Conv2d):
    def __init__(self, channels, deep):
        super().__init__(channels, 3, 1)
        self.deep = deep

    def forward(self, image):
        out = super().forward(image)
        return [out, out[..., ::2, ::2]] if self.deep else out


def make(regions, deep=False):
    channels = {"CT": [1], "M.R/2": [0, 2]}
    return ModalityBranches({name: Branch(len(own), deep) for name, own in channels.items()}, channels, regions)


@pytest.mark.parametrize("regions", [False, True])
def test_probabilities_are_the_mean_of_the_branches(regions):
    network, image = make(regions), torch.randn(2, 3, 6, 6) * 5
    activate = torch.sigmoid if regions else lambda x: x.softmax(1)
    expected = (activate(network.branch("CT")(image[:, [1]])) + activate(network.branch("M.R/2")(image[:, [0, 2]]))) / 2
    assert torch.allclose(activate(network(image)), expected, atol=1e-6)


@pytest.mark.parametrize("regions", [False, True])
def test_a_single_vote_is_that_branchs_own_logits(regions):
    network = make(regions)
    image = fill_absent(torch.randn(2, 3, 6, 6) * 5, torch.tensor([[True, False, True], [False, True, False]]))
    expected = [network.branch("M.R/2")(image[:1, [0, 2]]), network.branch("CT")(image[1:, [1]])]
    assert torch.allclose(network(image), torch.cat(expected), atol=1e-5)


@pytest.mark.parametrize("regions", [False, True])
def test_where_no_modality_is_present_all_vote(regions):
    network = make(regions)
    nothing = torch.full((1, 3, 6, 6), -0.0)
    assert torch.allclose(network(nothing), network(nothing.abs()), atol=1e-6)


@pytest.mark.parametrize("regions", [False, True])
def test_confident_branches_stay_finite(regions):
    extreme = [torch.tensor([[[200.0]], [[-200.0]]])[None], torch.tensor([[[150.0]], [[-300.0]]])[None]]
    assert torch.isfinite(mean_probability_logits(extreme, regions)).all()


def test_deep_supervision_gives_a_list_of_scales():
    outputs = make(False, deep=True)(torch.randn(1, 3, 6, 6))
    assert [tuple(o.shape) for o in outputs] == [(1, 3, 6, 6), (1, 3, 3, 3)]


def test_a_single_modality_looks_at_its_own_channels():
    network, image = make(False), torch.randn(1, 3, 4, 4)
    alone = network.parts()["CT"]
    changed = image.clone()
    changed[:, [0, 2]] += 1
    assert torch.equal(alone(image), alone(changed))
    assert torch.equal(alone(image), network.branch("CT")(image[:, [1]]))
    assert next(alone.parameters()) is next(network.branch("CT").parameters())
