from __future__ import annotations

import pytest
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunetv2_semi.data.raw_cases import (
    channel_numbers,
    check_labelled_images_have_labels,
    check_names_are_unlabelled,
    labelled_file_mistakes,
    labelled_images_without_label,
    list_labelled_cases,
    list_test_cases,
    list_unlabelled_cases,
    raw_dataset_folder,
)
from nnunetv2_semi.errors import UserError

TWO_CHANNELS = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0}, "file_ending": ".nii.gz"}


def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


def test_channels_come_in_order_and_other_files_are_ignored(tmp_path):
    names = ["b_0001.nii.gz", "b_0000.nii.gz", "a_x_0000.nii.gz", "a_x_0001.nii.gz"]
    touch(tmp_path / "imagesUn", *names, "._a_0000.nii.gz", "a.json")
    cases = list_unlabelled_cases(str(tmp_path), TWO_CHANNELS)
    assert list(cases) == ["a_x", "b"]
    assert [path.rsplit("/")[-1] for path in cases["b"]] == ["b_0000.nii.gz", "b_0001.nii.gz"]


@pytest.mark.parametrize("exists", [False, True])
def test_no_folder_or_an_empty_one_is_no_case(tmp_path, exists):
    if exists:
        (tmp_path / "imagesUn").mkdir()
    assert list_unlabelled_cases(str(tmp_path), TWO_CHANNELS) == {}


def test_a_case_may_lack_channels(tmp_path):
    for folder, list_cases in (("imagesUn", list_unlabelled_cases), ("imagesTr", list_labelled_cases)):
        touch(tmp_path / folder, "a_0000.nii.gz", "b_0001.nii.gz", "c_0000.nii.gz", "c_0001.nii.gz")
        cases = list_cases(str(tmp_path), TWO_CHANNELS)
        names = {case: [path.rsplit("/")[-1] for path in paths] for case, paths in cases.items()}
        assert names["a"] == ["a_0000.nii.gz"] and names["b"] == ["b_0001.nii.gz"] and len(names["c"]) == 2


def test_an_image_without_channel_number_is_named_with_the_rule(tmp_path):
    touch(tmp_path / "imagesUn", "scan7.nii.gz")
    with pytest.raises(UserError, match=r"scan7\.nii\.gz.*CASE_0000\.nii\.gz to CASE_0001\.nii\.gz"):
        list_unlabelled_cases(str(tmp_path), TWO_CHANNELS)


def test_a_channel_that_the_data_set_does_not_have_is_named(tmp_path):
    touch(tmp_path / "imagesUn", "a_0000.nii.gz", "a_0001.nii.gz", "a_0002.nii.gz")
    with pytest.raises(UserError, match=r"a_0002\.nii\.gz"):
        list_unlabelled_cases(str(tmp_path), TWO_CHANNELS)


def test_labelled_cases_are_those_that_nnunet_lists(tmp_path):
    touch(tmp_path / "imagesTr", "b_0001.nii.gz", "b_0000.nii.gz", ".a_0000.nii.gz", "a_x_0000.nii.gz", "a.json")
    (tmp_path / "imagesTr" / "folder_0000.nii.gz").mkdir()
    expected = get_filenames_of_train_images_and_targets(str(tmp_path), TWO_CHANNELS)
    found = list_labelled_cases(str(tmp_path), TWO_CHANNELS)
    assert found == {str(case): entry["images"] for case, entry in expected.items()}
    assert found == list_test_cases(str(tmp_path / "imagesTr"), TWO_CHANNELS)
    assert labelled_file_mistakes(str(tmp_path), TWO_CHANNELS) == []


def test_what_nnunet_takes_for_a_labelled_image_or_leaves_out_is_named(tmp_path):
    touch(tmp_path / "imagesTr", "a_0000.nii.gz", "._a_0000.nii.gz", "scan.nii.gz")
    (tmp_path / "imagesTr" / "b_0000.nii.gz").symlink_to(tmp_path / "archive" / "b.nii.gz")
    forks, broken, unnumbered = labelled_file_mistakes(str(tmp_path), TWO_CHANNELS)
    assert "no images, but nnU-Net reads them as cases: ._a_0000.nii.gz. macOS" in forks
    assert f"b_0000.nii.gz -> {tmp_path}/archive/b.nii.gz. Restore" in broken and "leaves out" in broken
    assert "no channel number in their name: scan.nii.gz. Name them CASE_0000.nii.gz" in unnumbered
    assert list(list_labelled_cases(str(tmp_path), TWO_CHANNELS)) == ["a", "b"]


def test_listed_images_that_are_not_there_are_named(tmp_path):
    touch(tmp_path, "x_label.nii.gz")
    entries = {"x": {"images": ["x_0000.nii.gz"], "label": "x_label.nii.gz"}}
    mistake, = labelled_file_mistakes(str(tmp_path), dict(TWO_CHANNELS, dataset=entries))
    assert f'1 image(s) under "dataset" in dataset.json are not there: {tmp_path}/x_0000.nii.gz. Correct' in mistake


def test_labelled_images_without_label_are_named_and_sent_to_imagesUn(tmp_path):
    touch(tmp_path / "imagesTr", *[f"{case}_{channel}.nii.gz" for case in "abc" for channel in ("0000", "0001")])
    touch(tmp_path / "labelsTr", "b.nii.gz")
    assert labelled_images_without_label(str(tmp_path), TWO_CHANNELS) == ["a", "c"]
    with pytest.raises(UserError, match=r"a, c.*imagesUn"):
        check_labelled_images_have_labels(str(tmp_path), TWO_CHANNELS)
    touch(tmp_path / "labelsTr", "a.nii.gz", "c.nii.gz")
    check_labelled_images_have_labels(str(tmp_path), TWO_CHANNELS)


def test_cases_listed_in_dataset_json_are_the_labelled_ones(tmp_path):
    touch(tmp_path / "elsewhere", "x.nii.gz", "y.nii.gz", "x_label.nii.gz")
    entries = {
        "x": {"images": ["elsewhere/x.nii.gz"], "label": "elsewhere/x_label.nii.gz"},
        "y": {"images": ["elsewhere/y.nii.gz"], "label": "elsewhere/y_label.nii.gz"},
    }
    dataset_json = dict(TWO_CHANNELS, dataset=entries)
    assert list_labelled_cases(str(tmp_path), dataset_json)["x"] == [str(tmp_path / "elsewhere/x.nii.gz")]
    assert labelled_images_without_label(str(tmp_path), dataset_json) == ["y"]
    assert dataset_json["dataset"]["x"]["images"] == ["elsewhere/x.nii.gz"]


def test_a_name_that_is_labelled_and_unlabelled_is_refused():
    check_names_are_unlabelled(["a"], ["b"], "imagesTr")
    with pytest.raises(UserError, match="b, d.*remove"):
        check_names_are_unlabelled(["a", "b", "d"], ["d", "b", "c"], "imagesTr")


def test_numbers_are_read_from_names_that_differ_in_nothing_else():
    assert channel_numbers(["/data/a_0007_0002.nii.gz", "/data/a_0007_0000.nii.gz"], ".nii.gz") == [2, 0]
    assert channel_numbers(["/data/scan.nii.gz"], ".nii.gz") is None
    assert channel_numbers(["/data/ct_0012.nii.gz", "/data/mr_0012.nii.gz"], ".nii.gz") is None
    assert channel_numbers([], ".nii.gz") is None


def test_a_data_set_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    with pytest.raises(UserError, match="There is no folder .*Dataset007_Mine"):
        raw_dataset_folder("Dataset007_Mine")
    with pytest.raises(UserError, match="Could not find a dataset with the ID 7"):
        raw_dataset_folder("7")
    (tmp_path / "Dataset007_Mine").mkdir()
    assert raw_dataset_folder("Dataset007_Mine") == str(tmp_path / "Dataset007_Mine")
    monkeypatch.delenv("nnUNet_raw")
    with pytest.raises(UserError, match="The environment variable nnUNet_raw is not set"):
        raw_dataset_folder("Dataset007_Mine")
