import pytest
import torch

from nnunetv2_semi.methods.mixing import CutMix, boxes_to_paste, paste
from nnunetv2_semi.present_channels import FILL, present_channels


def patches(count=3, channels=2, spatial=(8, 6), seed=0):
    return torch.randn(count, channels, *spatial, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("spatial, side", [((8, 6), (4, 3)), ((4, 6, 8), (2, 3, 4))])
@pytest.mark.parametrize("count, channels", [(1, 1), (3, 4)])
def test_in_each_patch_a_box_comes_from_the_next_one(spatial, side, count, channels):
    image = patches(count, channels, spatial)
    mixing = CutMix.draw(image, 0.5)
    mixed = mixing.of(image)
    for k in range(count):
        inside = mixing.inside[k, 0]
        corners = inside.nonzero()
        assert (corners.amax(0) - corners.amin(0) + 1).tolist() == list(side)
        assert int(inside.sum()) == torch.tensor(side).prod()
        assert torch.equal(mixed[k][:, inside], image[(k + 1) % count][:, inside])
        assert torch.equal(mixed[k][:, ~inside], image[k][:, ~inside])


def test_boxes_of_patches_lie_at_different_places_and_all_over():
    torch.manual_seed(0)
    inside = CutMix.draw(patches(200), 0.5).inside
    assert inside.any(0).all() and len({tuple(box.flatten().tolist()) for box in inside}) > 10


@pytest.mark.parametrize("share, shown", [(0.0, 0), (1.0, 1)])
def test_a_share_of_nothing_and_of_everything(share, shown):
    image = patches()
    assert torch.equal(CutMix.draw(image, share).of(image), image.roll(-shown, 0))


def test_the_same_seed_draws_the_same_boxes():
    boxes = []
    for _ in range(2):
        torch.manual_seed(5)
        boxes.append(CutMix.draw(patches(), 0.5).inside)
    assert torch.equal(*boxes)


def test_labels_at_all_scales_move_with_the_image():
    torch.manual_seed(0)
    image = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, 8, 8)  # each voxel says whose it is
    mixing = CutMix.draw(image, 0.5)
    mixed = mixing.of(image)
    scales = mixing.of([image.long(), image[:, :, ::2, ::2].bool(), image[:, :, ::2, ::4]])
    assert [scale.dtype for scale in scales] == [torch.int64, torch.bool, torch.float32]
    assert torch.equal(scales[0], mixed.long())
    assert torch.equal(scales[1], mixed[:, :, 1::2, 1::2].bool())  # nearest voxel: of two, the second one
    assert torch.equal(scales[2], mixed[:, :, 1::2, 2::4])


def test_patches_that_show_different_channels_are_not_mixed():
    image = patches(4)
    image[1, 0] = FILL
    image[2, 0] = FILL
    mixing = CutMix.draw(image, 0.5)
    mixed = mixing.of(image)
    assert mixing.inside.flatten(1).any(1).tolist() == [False, True, False, True]  # 0 with 1, 1 with 2, 2 with 3, ...
    assert torch.equal(mixed[[0, 2]], image[[0, 2]]) and not torch.equal(mixed[1], image[1])
    assert torch.equal(present_channels(mixed), present_channels(image))


def test_boxes_to_paste_ask_whether_the_partner_shows_the_same_channels():
    image, partner = patches(), patches(seed=1)
    partner[2, 1] = FILL
    inside = boxes_to_paste(image, partner, 0.5)
    assert inside.shape == (3, 1, 8, 6) and inside.flatten(1).sum(1).tolist() == [12, 12, 0]


@pytest.mark.parametrize("channels", [1, 3])
def test_paste(channels):
    onto, pasted = patches(2, channels), patches(2, channels, seed=1)
    inside = torch.zeros(2, 1, 8, 6, dtype=torch.bool)
    inside[0, 0, 2:4, 1:5] = True
    result = paste(inside, pasted, onto)
    assert torch.equal(result[1], onto[1])
    for y in range(8):
        for x in range(6):
            source = pasted if 2 <= y < 4 and 1 <= x < 5 else onto
            assert torch.equal(result[0, :, y, x], source[0, :, y, x])
    coarse = paste(inside, [pasted, pasted[:, :, ::2]], [onto, onto[:, :, ::2]])
    assert torch.equal(coarse[0], result)
    assert torch.equal(coarse[1], torch.where(inside[:, :, 1::2], pasted[:, :, ::2], onto[:, :, ::2]))


def test_gradients_go_to_where_a_voxel_comes_from():
    torch.manual_seed(0)
    image = patches().requires_grad_()
    mixing = CutMix.draw(image, 0.5)
    mixing.of(image)[0].sum().backward()
    assert torch.equal(image.grad[0], (~mixing.inside[0]).float().expand(2, 8, 6))
    assert torch.equal(image.grad[1], mixing.inside[0].float().expand(2, 8, 6)) and not image.grad[2].any()
