import torch

from nnunetv2_semi.networks.atlases import Atlases


def test_labels_come_back_as_one_hot_with_unknown_voxels_empty():
    atlases = Atlases(3, regions=False)
    target = torch.tensor([[[0, 1], [2, 4]]], dtype=torch.int16)
    atlases.take([torch.randn(2, 2, 2)], [target], [1], ignore_label=4)
    one_hot = atlases.one_hot([0])[0]
    assert torch.equal(one_hot.argmax(0).flatten()[:3], torch.tensor([0, 1, 2]))
    assert one_hot.sum(0).tolist() == [[1, 1], [1, 0]]


def test_regions_stay_regions_and_unknown_voxels_are_in_none():
    atlases = Atlases(2, regions=True)
    target = torch.tensor([[[1, 1]], [[0, 1]], [[0, 1]]]).bool()  # two regions, and where the label is unknown
    atlases.take([torch.randn(1, 1, 2)], [target], [0], ignore_label=9)
    assert atlases.one_hot([0])[0].tolist() == [[[1, 0]], [[0, 0]]]


def test_images_keep_their_mark_of_absent_channels():
    atlases = Atlases(2, regions=False)
    image = torch.stack([torch.randn(3, 3), torch.full((3, 3), -0.0)])
    atlases.take([image], [torch.zeros(1, 3, 3)], [0])
    assert atlases.image([0])[0, 1].signbit().all()
    assert torch.allclose(atlases.image([0])[0, 0], image[0], atol=1e-2)


def test_atlases_travel_in_the_weights_into_a_network_that_has_none():
    atlases, empty = Atlases(2, regions=False), Atlases(2, regions=False)
    images = [torch.randn(1, 4, 4).half().float() for _ in range(3)]
    atlases.take(images, [torch.randint(0, 2, (1, 4, 4)) for _ in range(3)], [0, 1, 0])
    empty.load_state_dict(atlases.state_dict(), strict=True)
    assert len(empty) == 3 and empty.of_modality(0) == [0, 2]
    assert torch.equal(empty.image([2, 1]), torch.stack([images[2], images[1]]))
    assert torch.equal(empty.one_hot([1]), atlases.one_hot([1]))


def test_known_labels_and_intensities_beyond_half_precision():
    atlases = Atlases(3, regions=False)
    target = torch.tensor([[[0, 1], [2, 4]]], dtype=torch.int16)
    image = torch.tensor([[[-1024.0, 70000.5], [2049.0, 3.0]]])
    atlases.take([image], [target], [0], ignore_label=4)
    assert atlases.known([0])[0, 0].tolist() == [[1, 1], [1, 0]]
    assert torch.equal(atlases.image([0])[0], image)
