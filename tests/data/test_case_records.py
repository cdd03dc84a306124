import json
import os

import pytest
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_semi.data.case_records import CaseRecords, plans_digest
from nnunetv2_semi.data.file_contents import FileContent

CONTENTS = [FileContent(digest, False, (1, 4, 5, 6), (1.0, 0.5, 0.5)) for digest in ("aa", "bb")]
PLANS = {
    "image_reader_writer": "SimpleITKIO", "transpose_forward": [0, 1, 2], "plans_name": "Plans",
    "foreground_intensity_properties_per_channel": {"0": {"mean": 100.0}},
    "configurations": {"3d_fullres": {
        "spacing": [1.0, 1.0, 1.0], "normalization_schemes": ["ZScoreNormalization"], "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape", "resampling_fn_data_kwargs": {"order": 3},
        "resampling_fn_seg": "resample_data_or_seg_to_shape", "resampling_fn_seg_kwargs": {"order": 1},
        "preprocessor_name": "DefaultPreprocessor", "patch_size": [16, 16, 16], "batch_size": 2, "architecture": {},
        "semi": {"seed": 0}}}}


@pytest.fixture
def folder(tmp_path):
    """Of preprocessed cases, with the files of one."""
    (tmp_path / "cases").mkdir()
    for name, size in (("a.b2nd", 7), ("a.pkl", 3)):
        (tmp_path / "cases" / name).write_bytes(bytes(size))
    return tmp_path / "cases"


@pytest.fixture
def records(folder):
    """Of that folder, in which the case "a" is done."""
    records = CaseRecords(str(folder), "digest of the plans")
    write(records, folder)
    return records


def write(records, folder, case="a", **further):
    raw = [str(folder.parent / f"{case}_{channel:04d}.nii.gz") for channel in range(2)]
    for file in raw:
        with open(file, "w"):
            pass
    records.write(case, raw, CONTENTS, {"a.b2nd": 7, "a.pkl": 3}, **further)


def test_a_case_is_done_once_its_record_is_written(folder):
    records = CaseRecords(str(folder), "digest of the plans")
    assert records.cases() == [] and not records.is_done("a", CONTENTS)
    write(records, folder)
    assert records.is_done("a", CONTENTS) and records.is_done("a") and records.cases() == ["a"]
    assert CaseRecords(str(folder), "digest of the plans").is_done("a", CONTENTS), "in a later run too"


def test_records_lie_beside_the_cases_not_among_them(records, folder):
    """nnU-Net takes the kind of a data set from the endings in its folder."""
    assert not [name for name in os.listdir(folder) if name.endswith(".json")]


def test_other_plans_make_it_undone(records, folder):
    assert not CaseRecords(str(folder), "another digest").is_done("a", CONTENTS)


@pytest.mark.parametrize("contents", [
    CONTENTS[::-1], CONTENTS[:1], [CONTENTS[0], FileContent("bb", False, (1, 4, 5, 6), (1.0, 0.5, 0.6))],
    [CONTENTS[0], FileContent("cc", False, (1, 4, 5, 6), (1.0, 0.5, 0.5))]],
    ids=["swapped", "one less", "other spacing", "other voxels"])
def test_other_raw_images_make_it_undone_but_not_where_there_are_none_to_compare_with(records, contents):
    assert not records.is_done("a", contents)
    assert records.is_done("a", None)


def test_which_channels_a_case_has_is_part_of_the_record(records, folder):
    assert not records.is_done("a", CONTENTS, [1])
    write(records, folder, present=[1])
    assert records.is_done("a", CONTENTS, [1]) and records.is_done("a", CONTENTS, (1,))
    assert not records.is_done("a", CONTENTS) and not records.is_done("a", CONTENTS, [0])


@pytest.mark.parametrize("size", [None, 6, 8])
def test_a_file_that_is_lost_or_cut_off_makes_it_undone(records, folder, size):
    (folder / "a.b2nd").unlink()
    if size is not None:
        (folder / "a.b2nd").write_bytes(bytes(size))
    assert not records.is_done("a", CONTENTS)


@pytest.mark.parametrize("text", ["", '{"version": 1', "[]", '{"version": 0}', "{}"])
def test_a_damaged_record_or_one_of_another_version_makes_it_undone(records, folder, text):
    (folder / "records" / "a.json").write_text(text)
    assert not records.is_done("a", CONTENTS)


def test_a_forgotten_case_is_undone_and_can_be_forgotten_twice(records, folder):
    records.forget("a")
    records.forget("a")
    assert not records.is_done("a", CONTENTS) and records.cases() == [] and (folder / "a.b2nd").exists()


def test_cases_are_in_alphabetical_order_without_what_a_kill_left(records, folder):
    for case in ("c", "b"):
        write(records, folder, case)
    (folder / "records" / ".d.json").write_text("{}")
    (folder / "records" / ".e.json.0123").write_text("{}")
    assert records.cases() == ["a", "b", "c"]


def digest_with(**changes):
    """Of the plans with some keys of the configuration, or of the whole, changed."""
    plans = json.loads(json.dumps(PLANS))
    for key, value in changes.items():
        (plans if key in plans else plans["configurations"]["3d_fullres"])[key] = value
    manager = PlansManager(plans)
    return plans_digest(manager, manager.get_configuration("3d_fullres"))


@pytest.mark.parametrize("key, value", [
    ("spacing", [1.0, 1.0, 2.0]), ("normalization_schemes", ["CTNormalization"]), ("use_mask_for_norm", [True]),
    ("resampling_fn_data", "other"), ("resampling_fn_data_kwargs", {"order": 1}), ("resampling_fn_seg", "other"),
    ("resampling_fn_seg_kwargs", {"order": 0}), ("preprocessor_name", "nnUNetPreprocessorSemi"),
    ("transpose_forward", [2, 0, 1]), ("image_reader_writer", "NibabelIO"),
    ("foreground_intensity_properties_per_channel", {"0": {"mean": 100.5}})])
def test_the_digest_changes_with_all_that_a_preprocessed_image_depends_on(key, value):
    assert digest_with(**{key: value}) != digest_with()


@pytest.mark.parametrize("key, value", [("patch_size", [8, 8, 8]), ("batch_size", 9), ("semi", {"seed": 3}),
                                        ("plans_name", "Copied")])
def test_the_digest_stays_with_what_no_preprocessed_image_depends_on(key, value):
    assert digest_with(**{key: value}) == digest_with()


def test_the_digest_is_that_of_the_content_not_of_the_order_in_the_file():
    reversed_kwargs = {"is_seg": False, "order": 3}
    assert digest_with(resampling_fn_data_kwargs=reversed_kwargs) == \
        digest_with(resampling_fn_data_kwargs=dict(reversed(reversed_kwargs.items())))
