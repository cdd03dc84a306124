from __future__ import annotations

import json

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunetv2_semi.errors import UserError
from nnunetv2_semi.planning.fingerprint import check_statistics, fingerprint_of_present_channels

CHANNELS = {"channel_names": {"0": "MR", "1": "CT"}, "labels": {"background": 0, "organ": 1}, "file_ending": ".nii.gz"}
INTENSITIES = "foreground_intensity_properties_per_channel"


def write(path, voxels, spacing=(1.0, 1.0, 1.0)):
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(path))
    return str(path)


def make_case(folder, case, foreground_by_channel, shape, spacing=(1.0, 1.0, 1.0)):
    """A case with one value in the foreground of each channel, a fourth of a box one voxel within the image."""
    label = np.zeros(shape, np.uint8)
    label[1:-1, 1 : shape[1] // 2, 1 : shape[2] // 2] = 1
    images = []
    for channel, value in foreground_by_channel.items():
        voxels = np.zeros(shape, np.float32)
        voxels[1:-1, 1:-1, 1:-1] = 5
        voxels[label == 1] = value
        images.append(write(folder / f"{case}_{channel:04d}.nii.gz", voxels, spacing))
    return {"images": images, "label": write(folder / f"{case}.nii.gz", label, spacing)}


def extract(dataset, dataset_json=CHANNELS, **options):
    options = {"samples_per_case": 50, "num_processes": 1, "show_progress_bar": False} | options
    return fingerprint_of_present_channels(dataset, dataset_json, SimpleITKIO, **options)


def test_statistics_of_a_channel_are_those_of_the_cases_that_have_it(tmp_path):
    dataset = {
        "a": make_case(tmp_path, "a", {0: 10.0}, (6, 8, 10), (3.0, 2.0, 1.0)),
        "b": make_case(tmp_path, "b", {1: -300.0}, (10, 12, 14)),
        "c": make_case(tmp_path, "c", {0: 30.0, 1: 500.0}, (6, 6, 8)),
        "d": make_case(tmp_path, "d", {1: 100.0}, (6, 6, 8)),
    }
    found = extract(dataset)
    # as many samples of each case: channel 0 has 10 and 30, channel 1 has -300, 500 and 100
    expected = {
        "0": {"mean": 20, "median": 20, "std": 10, "min": 10, "max": 30, "percentile_00_5": 10, "percentile_99_5": 30},
        "1": {"mean": 100, "median": 100, "std": np.sqrt((400**2 + 400**2) / 3), "min": -300, "max": 500,
              "percentile_00_5": -300, "percentile_99_5": 500},
    }  # fmt: skip
    for channel, statistics in expected.items():
        assert found[INTENSITIES][channel] == pytest.approx(statistics)
    assert found["shapes_after_crop"] == [[4, 6, 8], [8, 10, 12], [4, 4, 6], [4, 4, 6]]
    assert found["spacings"] == [[1.0, 2.0, 3.0], *[[1.0, 1.0, 1.0]] * 3]
    ratios = [4 * 6 * 8 / 480, 8 * 10 * 12 / 1680, 96 / 288, 96 / 288]
    assert found["median_relative_size_after_cropping"] == pytest.approx(np.median(ratios))
    json.dumps(found)


def test_where_nothing_is_missing_the_numbers_are_nnunets(tiny, worker_threads):
    tiny.dataset_json["channel_names"] = CHANNELS["channel_names"]
    tiny.save()
    extractor = DatasetFingerprintExtractor("Dataset001_Tiny", num_processes=1)
    extractor.show_progress_bar = False
    extractor.num_foreground_voxels_for_intensitystats = 2000
    with worker_threads():
        extractor.run()
    file = tiny.preprocessed_folder / "dataset_fingerprint.json"
    found = extract(extractor.dataset, tiny.dataset_json, samples_per_case=1000)
    assert json.loads(json.dumps(found)) == json.loads(file.read_text())


def test_a_result_does_not_depend_on_the_number_of_processes(tmp_path):
    dataset = {
        case: make_case(tmp_path, case, {index % 2: 100.0 * index}, (6 + index, 8, 10))
        for index, case in enumerate("abcd")
    }
    assert extract(dataset, num_processes=2) == extract(dataset)


def test_a_channel_that_no_labelled_case_has_is_refused_if_it_is_ct(tmp_path):
    dataset = {"a": make_case(tmp_path, "a", {0: 10.0}, (6, 8, 10))}
    with pytest.raises(UserError, match=r"1 \(CT\)"):
        extract(dataset)
    names = {"channel_names": {"0": "MR", "1": "T2"}}
    found = extract(dataset, {**CHANNELS, **names})[INTENSITIES]
    assert set(found["1"]) == set(found["0"]) and set(found["1"].values()) == {None}
    with pytest.raises(UserError, match=r"0 \(ct\)"):
        check_statistics([1], {"channel_names": {"0": "ct", "1": "CT"}})


def test_a_channel_without_foreground_counts_as_absent(tmp_path):
    dataset = {"a": make_case(tmp_path, "a", {0: 10.0, 1: 20.0}, (6, 8, 10))}
    write(tmp_path / "a.nii.gz", np.zeros((6, 8, 10), np.uint8))
    with pytest.raises(UserError, match=r"1 \(CT\)"):
        extract(dataset)


def test_wrong_channels_are_named(tmp_path):
    dataset = {"a": make_case(tmp_path, "a", {0: 10.0, 2: 1.0}, (6, 8, 10))}
    with pytest.raises(UserError, match="a_0002"):
        extract(dataset)
