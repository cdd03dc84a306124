"""Which modalities patches have, on their way from the files to the trainer."""

import numpy as np
import pytest
import torch

from nnunetv2_semi.data.case_channels import PRESENT_CHANNELS, CaseChannels
from nnunetv2_semi.data.loader import SeededBatches
from nnunetv2_semi.data.patch_channels import ModalityDrop, mark_present
from nnunetv2_semi.data.views import IntensityViews, with_noise
from nnunetv2_semi.present_channels import fill_absent, present_channels

PROPERTIES = {"both": {}, "second": {PRESENT_CHANNELS: [1]}}


class Cases:
    """A data set whose cases have these properties."""

    def __init__(self):
        self.read = []

    def load_case(self, case):
        self.read.append(case)
        return np.zeros((2, 4, 4, 4)), None, None, PROPERTIES[case]


class Loader:
    """Gives one batch of both cases, after an augmentation that adds noise to all channels."""

    transforms = None

    def __init__(self):
        self._data = Cases()

    def generate_train_batch(self):
        return {"data": torch.from_numpy(np.random.normal(size=(2, 2, 4, 4, 4)).astype(np.float32)),
                "keys": ["both", "second"]}


def test_a_batch_tells_what_its_cases_have_whatever_augmentation_did_to_the_fill():
    loader = Loader()
    batches = SeededBatches({"labelled": loader}, seed=0)
    for index in range(3):
        batch = batches[index]["labelled"]
        assert batch["present"].tolist() == [[True, True], [False, True]]
        assert torch.equal(present_channels(batch["data"]), batch["present"])
    assert loader._data.read == ["both", "second"]


def test_complete_cases_are_left_as_they_are():
    image = torch.randn(1, 2, 4, 4)
    batch = {"data": image, "keys": ["both"]}
    mark_present(batch, CaseChannels(Cases()), None)
    assert batch["data"] is image and batch["present"].all()


def test_a_dropped_modality_is_one_of_several_and_all_its_channels_go():
    drop = ModalityDrop(1.0, [[0], [1, 2]])
    np.random.seed(0)
    rows = torch.tensor([[True, True, True], [True, True, False], [False, True, True], [True, False, False]])
    seen = {tuple(map(tuple, drop(rows).tolist())) for _ in range(50)}
    both, partly, lone, other = ({result[i] for result in seen} for i in range(4))
    assert both == {(True, False, False), (False, True, True)}
    assert partly == {(True, False, False), (False, True, False)}
    assert lone == {(False, True, True)} and other == {(True, False, False)}


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_modalities_are_dropped_as_often_as_asked(probability):
    np.random.seed(1)
    drop, rows = ModalityDrop(probability, [[0], [1]]), torch.ones(2000, 2, dtype=torch.bool)
    assert float((~drop(rows)).any(1).float().mean()) == pytest.approx(probability, abs=0.05)


def test_dropping_is_repeatable_and_takes_the_intensities_away():
    drop = ModalityDrop(0.5, [[0], [1]])
    first, second = (SeededBatches({"labelled": Loader()}, seed=5, drop=drop) for _ in range(2))
    marks = []
    for index in range(8):
        batch, same = first[index]["labelled"], second[index]["labelled"]
        assert torch.equal(batch["present"], same["present"]) and torch.equal(batch["data"], same["data"])
        assert torch.equal(present_channels(batch["data"]), batch["present"])
        marks.append(batch["present"][0].all().item())
    assert 0 < sum(marks) < 8


def test_views_leave_absent_channels_alone():
    present = torch.tensor([[True, False], [True, True]])
    image = fill_absent(torch.randn(2, 2, 5, 5), present)
    views = IntensityViews.draw(3, image, noise=0.5, noise_probability=1.0, gamma=1.0).apply(image)
    for view in [with_noise(image, 0.3), *views]:
        assert torch.equal(present_channels(view), present)
        assert not torch.equal(view[0, 0], image[0, 0])


def test_zeros_whose_sign_augmentation_turned_are_no_mark():
    class Blank(Loader):
        def generate_train_batch(self):
            batch = super().generate_train_batch()
            return {**batch, "data": torch.full_like(batch["data"], -0.0)}

    batch = SeededBatches({"labelled": Blank()}, seed=5)[0]["labelled"]
    assert torch.equal(present_channels(batch["data"]), batch["present"])


def test_what_a_cascade_appends_to_the_image_is_always_there():
    """The segmentation of the stage before, a channel for each label."""
    assert CaseChannels(Cases()).present(["both", "second"], 5).tolist() == [[True] * 5, [False] + [True] * 4]
