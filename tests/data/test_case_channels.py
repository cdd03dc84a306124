from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunetv2_semi.data.case_channels import (
    channel_names,
    channels_by_name,
    channels_of_case,
    channels_of_cases,
    lacking_channels,
    lacking_warning,
)
from nnunetv2_semi.errors import UserError

ENDING = ".nii.gz"
THREE = {"channel_names": {"0": "T1", "1": "T2", "2": "CT"}, "file_ending": ENDING}


def files(case, *channels):
    return [f"/data/{case}_{channel:04d}{ENDING}" for channel in channels]


@pytest.mark.parametrize("channels", [[0], [1], [2], [0, 2], [2, 0], [0, 1, 2]])
def test_names_tell_which_channels_are_there(channels):
    assert channels_of_case(files("a", *channels), len(channels), THREE) == channels


def test_one_file_may_hold_all_channels_whatever_its_name():
    assert channels_of_case(files("a", 0), 3, THREE) == [0, 1, 2]
    assert channels_of_case(["/data/patient_0412.nii.gz"], 3, THREE) == [0, 1, 2]
    one_channel = {"channel_names": {"0": "CT"}, "file_ending": ENDING}
    assert channels_of_case(["/data/patient_0412.nii.gz"], 1, one_channel) == [0]


def test_files_listed_in_dataset_json_may_have_any_name_where_none_is_missing():
    free = ["/elsewhere/z.nii.gz", "/elsewhere/y.nii.gz", "/elsewhere/x.nii.gz"]
    assert channels_of_case(free, 3, THREE) == [0, 1, 2]
    listed = {**THREE, "dataset": {}}
    # nnU-Net goes by their order
    assert channels_of_case(files("patient", 12, 11, 10), 3, listed) == [0, 1, 2]
    assert channels_of_case(files("patient", 2), 1, listed) == [2]


@pytest.mark.parametrize(
    ("paths", "read", "message"),
    [
        ([], 0, "no image file.*CASE_0000"),
        (["/elsewhere/z.nii.gz"], 1, r"elsewhere/z\.nii\.gz.*not told by the names.*CASE_0000"),
        (files("a", 0, 1), 3, r"a_0000.*a_0001.*2 files with 3 channels.*CASE_0000.*all 3"),
        (files("a", 1), 2, r"a_0001.*1 file with 2 channels"),
        (files("a", 0, 3), 2, r"a_0003.*no channel 3.*channel_names.*0 to 2.*[Rr]emove"),
        (files("a", 0, 1, 2, 3), 4, "no channel 3"),
        (files("a", 1, 1), 2, "a_0001.*twice"),
    ],
)
def test_what_does_not_fit_is_named_with_the_remedy(paths, read, message):
    with pytest.raises(UserError, match=message):
        channels_of_case(paths, read, THREE)


def test_the_mistakes_of_all_cases_come_in_one_message():
    cases = {"a": files("a", 0, 3), "b": files("b", 2, 0), "c": files("c", 5)}
    with pytest.raises(UserError, match="Case a: .*a_0003.*Case c: .*c_0005"):
        channels_of_cases(cases, {"a": 2, "b": 2, "c": 1}, THREE)
    assert channels_of_cases({"b": cases["b"]}, {"b": 2}, THREE) == {"b": [0, 2]}


def write_images(folder, shape, *names):
    for name in names:
        sitk.WriteImage(sitk.GetImageFromArray(np.ones(shape, np.float32), isVector=False), str(folder / name))
    return [str(folder / name) for name in names]


def test_one_image_tells_whether_a_file_holds_all_channels(tmp_path):
    one = write_images(tmp_path, (4, 5, 6), "a_0000.nii.gz", "a_0001.nii.gz", "a_0002.nii.gz", "b_0001.nii.gz")
    cases = {"a": one[:3], "b": one[3:]}
    assert channels_by_name(cases, THREE, SimpleITKIO) == {"a": [0, 1, 2], "b": [1]}
    several = write_images(tmp_path, (3, 4, 5, 6), "c_0000.nii.gz", "d_0000.nii.gz")
    cases = {"c": several[:1], "d": several[1:]}
    assert channels_by_name(cases, THREE, SimpleITKIO) == {"c": [0, 1, 2], "d": [0, 1, 2]}


def test_nothing_is_read_where_every_channel_has_a_file(tmp_path):
    cases = {"a": files("a", 0, 1, 2)}
    assert channels_by_name(cases, THREE, SimpleITKIO) == {"a": [0, 1, 2]}
    with pytest.raises(UserError, match="a_0001.*cannot be read"):
        channels_by_name({"a": files("a", 1)}, THREE, SimpleITKIO)


def test_the_warning_counts_what_there_is():
    channels = {"a": [0, 1, 2], "b": [2], "c": [0, 1], "d": [2]}
    assert lacking_channels(channels, THREE) == {"b": [2], "c": [0, 1], "d": [2]}
    line = lacking_warning(channels, THREE, "unlabelled")
    assert line.startswith("WARNING: 3 of 4 unlabelled cases lack channels (CT only: 2, T1+T2 only: 1): b, c, d.")
    assert "forgotten" in line
    assert lacking_warning({"a": [0, 1, 2]}, THREE, "unlabelled") is None


def test_channels_of_one_name_are_told_apart():
    assert channel_names({"channel_names": {"1": "MR", "0": "MR"}}) == {0: "MR (0)", 1: "MR (1)"}
    assert list(channel_names({"modality": {"1": "b", "0": "a"}}).values()) == ["a", "b"]
