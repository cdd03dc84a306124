import pytest
import torch
from torch import nn

from nnunetv2_semi.networks.monte_carlo import dropout_active, summed_probabilities


def network():
    return nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.Dropout2d(0.5), nn.Conv2d(16, 2, 1))


@pytest.mark.parametrize("training", [False, True])
def test_dropout_drops_within_the_block_only(training):
    dropping, image = network().train(training), torch.randn(1, 1, 8, 8)
    dropping[2].eval()
    with dropout_active(dropping):
        assert not torch.equal(dropping(image), dropping(image))
        assert dropping[1].training == training
    assert torch.equal(dropping(image), dropping(image))


def test_an_error_in_the_block_switches_dropout_off_again():
    dropping = network().eval()
    with pytest.raises(ZeroDivisionError), dropout_active(dropping):
        raise ZeroDivisionError
    assert not any(m.training for m in dropping.modules())


@pytest.mark.parametrize("regions", [False, True])
def test_probabilities_of_all_passes_are_summed_without_a_graph(regions):
    still = nn.Conv2d(1, 3, 1)
    images = [torch.randn(2, 1, 4, 4) for _ in range(3)]
    total = summed_probabilities(still, iter(images), regions)
    each = [still(image).sigmoid() if regions else still(image).softmax(1) for image in images]
    assert torch.allclose(total, sum(each)) and not total.requires_grad
