import pytest
import torch

from nnunetv2_semi.networks.channel_tokens import ChannelTokens


@pytest.mark.parametrize("sizes", [(16, 16), (3, 9), (8, 8, 8), (1, 5, 2), (12, 20, 17)], ids=str)
def test_every_channel_of_a_map_of_any_size_has_a_token(sizes):
    tokens = ChannelTokens(len(sizes))(torch.randn(2, 7, *sizes))
    assert tokens.shape == (2, 7, 128) and tokens.isfinite().all()
    assert ChannelTokens(len(sizes), cells=2, hidden=5, features=9)(torch.randn(1, 3, *sizes)).shape == (1, 3, 9)


@pytest.mark.parametrize("sizes", [(8, 8), (8, 4, 8)], ids=str)
def test_a_token_depends_on_its_own_channel_alone_wherever_that_stands(sizes):
    head, feature_map = ChannelTokens(len(sizes)), torch.randn(1, 5, *sizes)
    tokens = head(feature_map)
    order = torch.tensor([4, 2, 0, 1, 3])
    assert torch.allclose(head(feature_map[:, order]), tokens[:, order], atol=1e-6)
    changed = feature_map.clone()
    changed[:, 2] += torch.randn(sizes)
    different = (head(changed) - tokens).abs().amax(2)[0] > 1e-4
    assert different.tolist() == [False, False, True, False, False]


def test_tokens_hold_averages_over_a_grid():
    head, feature_map = ChannelTokens(3, cells=2), torch.randn(1, 3, 4, 6, 8)
    averages = feature_map.unflatten(4, (2, 4)).unflatten(3, (2, 3)).unflatten(2, (2, 2)).mean((3, 5, 7))
    assert torch.allclose(head(feature_map), head(averages), atol=1e-6)
    assert not torch.allclose(head(feature_map), head(averages.flip(2)), atol=1e-3)


def test_gradients_reach_features_and_weights():
    head, feature_map = ChannelTokens(2), torch.randn(1, 3, 9, 10, requires_grad=True)
    head(feature_map).square().sum().backward()
    assert (feature_map.grad != 0).all()
    assert all(weights.grad is not None and weights.grad.abs().max() > 0 for weights in head.parameters())


def test_other_numbers_of_axes_are_refused():
    with pytest.raises(ValueError, match="spatial axes"):
        ChannelTokens(1)
