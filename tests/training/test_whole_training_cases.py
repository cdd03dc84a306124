from types import SimpleNamespace

import numpy as np
import pytest

from nnunetv2_semi import training_data


class Dataset:
    """One case of three slices: 9 labelled voxels in the second, the ignore label all over the third."""

    def __init__(self, folder, names):
        pass

    def load_case(self, name):
        segmentation = np.zeros((1, 3, 6, 6), dtype=np.int16)
        segmentation[0, 1, :3, :3] = 1
        segmentation[0, 2] = 2
        image = np.stack([np.full((3, 6, 6), 1.0), np.full((3, 6, 6), -0.0)])
        return image, segmentation, None, {"present_channels": [0]}


@pytest.mark.parametrize("ignore_label, labelled_voxels", [(2, 9), (None, 0)])
def test_of_a_3d_case_in_2d_the_slice_with_most_labels_counts(monkeypatch, ignore_label, labelled_voxels):
    monkeypatch.setattr(training_data, "infer_dataset_class", lambda folder: Dataset)
    trainer = SimpleNamespace(
        do_split=lambda: (["case"], []), preprocessed_dataset_folder="",
        label_manager=SimpleNamespace(foreground_labels=[1], has_regions=False, ignore_label=ignore_label),
        get_validation_transforms=lambda *_args, **_kwargs: lambda **sample: sample,
        configuration_manager=SimpleNamespace(patch_size=(6, 6)))
    (case,) = training_data.whole_training_cases(trainer, {"CT": [0], "MR": [1]})
    assert case.image.shape == (2, 6, 6) and case.modalities == [0]
    assert int((case.target == 1).sum()) == labelled_voxels
