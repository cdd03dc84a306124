import pytest
import torch

from nnunetv2_semi.data.boxes import Boxes

CPU = torch.device("cpu")


@pytest.mark.parametrize("patch, size", [((9, 6), (6, 4)), ((12, 3, 5), (8, 2, 3)), ((1, 8), (1, 5))])
def test_a_box_is_solid_of_the_asked_size_and_where_it_says(patch, size):
    boxes = Boxes.draw(5, patch, 0.667)
    inside = boxes.inside(CPU)
    assert inside.shape == (5, 1, *patch)
    for first, single in zip(boxes.first.tolist(), inside[:, 0], strict=True):
        expected = torch.zeros(patch, dtype=torch.bool)
        expected[tuple(slice(start, start + side) for start, side in zip(first, size, strict=True))] = True
        assert torch.equal(single, expected)


def test_boxes_reach_every_place_and_are_replayable():
    first = Boxes.draw(500, (6, 4), 0.5).first
    assert first.amin(0).tolist() == [0, 0] and first.amax(0).tolist() == [3, 2]
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(Boxes.draw(4, (6, 5, 4), 0.5))
    assert torch.equal(drawn[0].first, drawn[1].first)
    assert torch.equal(drawn[0].inside(CPU), drawn[0].inside(CPU))


def test_no_box_and_a_box_of_everything():
    assert not Boxes.draw(2, (4, 5), 0.0).inside(CPU).any()
    assert Boxes.draw(2, (4, 5), 1.0).inside(CPU).all()


@pytest.mark.parametrize("patch", [(40, 60), (20, 24, 30)])
def test_areas_are_within_their_range_and_reach_every_place(patch):
    boxes = Boxes.draw_areas(400, patch, 0.05, 0.3)
    shares = boxes.inside(CPU).flatten(1).float().mean(1)
    assert 0.04 < shares.min() < 0.08 and 0.25 < shares.max() < 0.34
    assert (boxes.first >= 0).all() and (boxes.first + boxes.size <= torch.tensor(patch)).all()
    assert (boxes.first + boxes.size).amax(0).tolist() == list(patch)
    assert boxes.first.amin(0).tolist() == [0] * len(patch)
    relative = boxes.size / torch.tensor(patch)
    aspect = relative[:, -1] / relative[:, -2]
    assert aspect.min() < 0.5 and aspect.max() > 2 and 0.25 < aspect.min() and aspect.max() < 4


def test_an_area_of_everything_and_boxes_of_their_own_sizes():
    assert Boxes.draw_areas(3, (4, 5), 1.0, 1.0, aspect=1.0).inside(CPU).all()
    assert len(Boxes.draw_areas(50, (30, 30), 0.02, 0.4).size.unique(dim=0)) > 20
