"""Which cases become atlases, and that aligned ones lie on the first one."""

import pytest
import torch

from nnunetv2_semi.data.atlas_choice import aligned_atlases, chosen_atlases
from nnunetv2_semi.data.phantom_anatomy import make_phantom_case
from nnunetv2_semi.data.whole_case import WholeCase
from nnunetv2_semi.errors import UserError
from nnunetv2_semi.present_channels import fill_absent

MODALITIES = {"m0": [0], "m1": [1]}
NAMES = list(MODALITIES)


def numbered(number, modalities):
    return WholeCase(f"c{number}", torch.full((2, 4, 4, 4), float(number)), torch.zeros(1, 4, 4, 4), modalities)


def test_atlases_are_cases_of_each_modality_drawn_by_the_seed():
    cases = [numbered(number, [number % 2]) for number in range(8)]

    def taken(seed):
        return [(int(atlas.case.image.max()), atlas.modality) for atlas in chosen_atlases(cases, NAMES, 2, seed)]
    first = taken(0)
    assert [modality for _, modality in first] == [0, 0, 1, 1]
    assert all(case % 2 == modality for case, modality in first) and len(set(first)) == 4
    assert first == taken(0) and any(taken(seed) != first for seed in range(1, 5))


def test_a_paired_case_is_an_atlas_of_both_modalities_and_seen_everywhere():
    atlases = chosen_atlases([numbered(0, [0, 1])], NAMES, 5, 0)
    assert [(atlas.case.name, atlas.modality) for atlas in atlases] == [("c0", 0), ("c0", 1)]
    assert all(atlas.seen.shape == (1, 4, 4, 4) and atlas.seen.all() for atlas in atlases)


def test_no_more_cases_are_held_than_are_wanted():
    released = []

    class Counted(WholeCase):
        def __del__(self):
            released.append(self.name)

    def cases():
        for number in range(6):
            yield Counted(f"c{number}", torch.zeros(2, 1, 1, 1), torch.zeros(1, 1, 1, 1), [0, 1])
            assert len(released) >= number + 1 - 3  # two wanted, and the one that is looked at
    assert len(chosen_atlases(cases(), NAMES, 2, 0)) == 4


def test_a_modality_without_a_labelled_case_is_refused_by_name():
    with pytest.raises(UserError, match="modality m1"):
        chosen_atlases([numbered(0, [0])], NAMES, 5, 0)


def moved_anatomy(shape):
    """Two atlases, of which the second is the first one's anatomy in the other modality, 3 voxels aside."""
    case = make_phantom_case(0, shape, 2, 0)
    images = torch.stack([torch.from_numpy(image).float() for image in case.images])
    labels = torch.from_numpy(case.segmentation.astype("int16"))[None]
    present = torch.eye(2, dtype=torch.bool)
    cases = [WholeCase("first", fill_absent(images, present[0]), labels, [0]),
             WholeCase("second", fill_absent(images.roll(3, -1), present[1]), labels.roll(3, -1), [1])]
    return chosen_atlases(cases, NAMES, 1, 0)


def aligned(shape):
    return list(aligned_atlases(moved_anatomy(shape), MODALITIES, (3.0, 1.0, 1.0)))


def test_atlases_are_aligned_to_the_first_one():
    def overlap(atlases):
        one, other = ((atlas.case.target > 0) & atlas.seen for atlas in atlases)
        return float(2 * (one & other).sum() / (one.sum() + other.sum()))
    shape = (24, 32, 24)
    apart, together = overlap(moved_anatomy(shape)), overlap(aligned(shape))
    assert apart < 0.8 < 0.9 < together


def test_what_an_aligned_atlas_does_not_show_is_not_seen():
    """The second one, moved back by 3 voxels, has nothing for the first ones along the last axis."""
    first, second = (atlas.seen[0] for atlas in aligned((24, 32, 24)))
    unseen = (~second).float()
    assert first.all() and unseen[..., -3:].mean() > 0.9 and unseen[..., :-3].mean() < 0.05


def test_the_first_atlas_stays_as_it_is_and_all_keep_their_case_and_modality():
    before, after = moved_anatomy((24, 32, 24)), aligned((24, 32, 24))
    assert torch.equal(after[0].case.image, before[0].case.image)
    assert torch.equal(after[0].case.target, before[0].case.target)
    assert [(atlas.case.name, atlas.modality) for atlas in after] == [("first", 0), ("second", 1)]
    assert after[1].case.target.dtype == before[1].case.target.dtype


def test_an_atlas_that_cannot_be_aligned_is_named():
    with pytest.raises(UserError, match="second cannot be aligned to first .*align_atlases"):
        aligned((2, 32, 24))
