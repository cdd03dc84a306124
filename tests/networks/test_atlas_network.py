import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from nnunetv2_semi.networks.atlas_network import AtlasNetwork, Predicting
from nnunetv2_semi.networks.atlases import Atlases
from nnunetv2_semi.networks.warp import warp
from nnunetv2_semi.present_channels import fill_absent, present_channels

SIZE = (8, 12)


def make(regions=False, deep_supervision=False, **options):
    torch.manual_seed(0)
    networks = {name: PlainConvUNet(1, 3, [4, 8, 12], nn.Conv2d, 3, [1, 2, 2], 1, 3, 1, norm_op=nn.InstanceNorm2d,
                                    nonlin=nn.LeakyReLU, deep_supervision=deep_supervision) for name in ("CT", "MR")}
    network = AtlasNetwork(networks, {"CT": [0], "MR": [1]}, Atlases(3, regions), 2, **options)
    images = [fill_absent(torch.randn(1, 2, *SIZE), torch.eye(2).bool()[[m]])[0] for m in (0, 0, 1)]
    labels = [torch.rand(3, *SIZE) > 0.5 if regions else torch.randint(0, 3, (1, *SIZE)) for _ in images]
    network.atlases.take(images, labels, [0, 0, 1])
    return network


def of_modality(modality, count=2):
    return fill_absent(torch.randn(count, 2, *SIZE), torch.eye(2).bool()[[modality] * count])


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("predict", ["segmentation", "atlas", "both"])
@pytest.mark.parametrize("deep_supervision", [False, True])
def test_logits_have_the_shape_of_nnunets(regions, predict, deep_supervision):
    network = make(regions, deep_supervision, predict=predict)
    output = network(of_modality(1))
    outputs = output if deep_supervision else [output]
    assert [tuple(single.shape) for single in outputs] == [(2, 3, 8, 12), (2, 3, 4, 6)][:len(outputs)]
    assert all(torch.isfinite(single).all() for single in outputs)


def test_both_is_the_mean_of_segmentation_and_atlas():
    network, image = make(), of_modality(0)
    each = [network.predicted(image, how).softmax(1) for how in ("segmentation", "atlas", "both")]
    assert torch.allclose((each[0] + each[1]) / 2, each[2], atol=1e-3)


def test_an_image_with_several_modalities_is_predicted_from_each():
    network, image = make(), torch.randn(1, 2, *SIZE)
    alone = [network(network.only(image, index)).softmax(1) for index in range(2)]
    assert torch.allclose(network(image).softmax(1), (alone[0] + alone[1]) / 2, atol=1e-5)


@pytest.mark.parametrize("regions", [False, True])
def test_a_batch_of_different_modalities_is_predicted_as_its_images_are(regions):
    network = make(regions, deep_supervision=True)
    image = torch.cat([of_modality(1, 1), torch.randn(1, 2, *SIZE), of_modality(0, 1), of_modality(1, 1)])
    together = network.predictions(image)
    for how, scales in together.items():
        alone = [network.predicted(single[None], how) for single in image]
        for found, expected in zip(scales, map(torch.cat, zip(*alone, strict=True)), strict=True):
            assert torch.allclose(found, expected, atol=1e-3), how


def test_atlases_of_the_same_modality_alone_are_fused():
    network, image = make(refine=False), of_modality(1, 1)
    one_hot = network.atlases.one_hot([2])
    found = network.predicted(image, "atlas").softmax(1)
    displacement = network.displacement(network.encoders(image), network.encoders(network.atlases.image([2])), SIZE)
    assert torch.allclose(found, warp(one_hot, displacement), atol=1e-3)


def test_refining_registers_the_warped_atlas_once_more():
    once, twice, image = make(), make(refine=True), of_modality(1, 1)
    displacement = once.displacement(once.encoders(image), once.encoders(once.atlases.image([2])), SIZE)
    once.atlases.images[2] = warp(once.atlases.image([2]), displacement)[0]
    moved = warp(once.atlases.one_hot([2]), displacement)
    again = once.displacement(once.encoders(image), once.encoders(once.only(once.atlases.image([2]), 1)), SIZE)
    assert torch.allclose(twice.predicted(image, "atlas").softmax(1), warp(moved, again), atol=1e-2)


def test_the_order_of_the_atlases_does_not_matter():
    network, image = make(), of_modality(0)
    before = network.predicted(image, "atlas")
    for buffer in (network.atlases.images, network.atlases.labels, network.atlases.modality):
        buffer.copy_(buffer[[1, 0, 2]].clone())
    assert torch.allclose(network.predicted(image, "atlas"), before, atol=1e-4)


def test_only_one_modality_is_left():
    network = make()
    left = network.only(torch.randn(2, 2, *SIZE), torch.tensor([1, 0]))
    assert present_channels(left).tolist() == [[False, True], [True, False]]


def test_without_an_atlas_the_message_names_the_modality():
    network = make()
    network.atlases.modality.fill_(0)
    with pytest.raises(RuntimeError, match="MR"):
        network.predicted(of_modality(1), "atlas")


def test_parts_share_the_networks_weights():
    network = make()
    image = of_modality(0)
    part = Predicting(network, "atlas")
    assert torch.equal(part(image), network.predicted(image, "atlas"))
    assert part.decoder is network.decoder


def test_weights_and_atlases_load_into_a_new_network():
    network = make()
    other = make()
    other.atlases = Atlases(3, False)
    other.load_state_dict(network.state_dict())
    image = of_modality(0)
    assert torch.equal(other.predicted(image, "both"), network.predicted(image, "both"))


@pytest.mark.parametrize("regions", [False, True])
def test_unknown_labels_of_an_atlas_do_not_vote(regions):
    """Where no atlas knows the label, the segmentation head decides."""
    network, image = make(regions), of_modality(1, 1)
    network.atlases.labels[2] = 255
    atlas, head = (network.predicted(image, how) for how in ("atlas", "segmentation"))
    probability = [logits.sigmoid() if regions else logits.softmax(1) for logits in (atlas, head)]
    assert torch.allclose(*probability, atol=1e-3)
    both = make(regions)
    both.atlases.labels[0] = 255  # one of the two of its modality
    other = make(regions)
    other.atlases.modality[0] = 1
    image = of_modality(0, 1)
    assert torch.allclose(both.predicted(image, "atlas"), other.predicted(image, "atlas"), atol=1e-4)
