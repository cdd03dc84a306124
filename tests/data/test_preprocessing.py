from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
from pathlib import Path

import blosc2
import numpy as np
import pytest
from filelock import FileLock
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnunetv2_semi.data.filling_preprocessor import FillingPreprocessor
from nnunetv2_semi.data.one_at_a_time import LOCK
from nnunetv2_semi.data.preprocessing import prepare_unlabelled
from nnunetv2_semi.errors import UserError

CASES = ["un_a", "un_b", "un_c"]


@pytest.fixture
def preprocessed_cases(monkeypatch):
    """Names of the cases that were preprocessed in this process."""
    done = []
    run_case_save = DefaultPreprocessor.run_case_save

    def recorded(self, target, *args):
        done.append(os.path.basename(target))
        return run_case_save(self, target, *args)

    monkeypatch.setattr(DefaultPreprocessor, "run_case_save", recorded)
    return done


def prepare(tiny, **options):
    options = {"num_processes": 1, "report": lambda line: None, "show_progress_bar": False} | options
    return prepare_unlabelled(*tiny.managers(), tiny.dataset_json, **options)


def raw_file(tiny, case, channel=0):
    return tiny.raw_folder / "imagesUn" / f"{case}_{channel:04d}.nii.gz"


def test_cases_are_as_nnunet_preprocesses_a_case_without_label(tiny):
    cases = prepare(tiny)
    assert cases.identifiers == CASES
    assert cases.skipped == []
    assert cases.folder == str(tiny.unlabelled_folder)
    plans_manager, configuration = tiny.managers()
    files = [str(raw_file(tiny, "un_b", channel)) for channel in range(2)]
    expected, mask, _ = DefaultPreprocessor(False).run_case(
        files, None, plans_manager, configuration, tiny.dataset_json
    )
    dataset_class = infer_dataset_class(cases.folder)
    image, seg, _, properties = dataset_class(cases.folder, cases.identifiers).load_case("un_b")
    np.testing.assert_array_equal(image[:], expected)
    np.testing.assert_array_equal(seg[:], mask)
    assert properties["class_locations"] == {}
    assert not (tiny.preprocessed_folder / "Plans_3d_fullres").exists()


def test_nothing_is_done_twice(tiny, preprocessed_cases):
    prepare(tiny)
    assert preprocessed_cases == CASES
    touched = raw_file(tiny, "un_a")
    os.utime(touched, ns=(1, 1))  # the same content, as after a copy
    assert prepare(tiny).identifiers == CASES
    assert preprocessed_cases == CASES


def test_what_another_process_prepares_is_waited_for_and_not_done_again(tiny, preprocessed_cases):
    lock = FileLock(tiny.preprocessed_folder / LOCK, thread_local=False)
    lock.acquire()

    def report(line):
        if line.startswith("Waiting for another process"):
            lock.release()

    assert prepare(tiny, report=report).identifiers == CASES  # would wait for ever if it did not say so first
    assert preprocessed_cases == CASES


def test_only_a_case_whose_raw_file_changed_is_done_again(tiny, preprocessed_cases):
    prepare(tiny)
    preprocessed_cases.clear()
    before = blosc2.open(str(tiny.unlabelled_folder / "un_b.b2nd"))[:]
    tiny.add_unlabelled("un_b", seed=99)
    prepare(tiny)
    assert preprocessed_cases == ["un_b"]
    assert not np.array_equal(blosc2.open(str(tiny.unlabelled_folder / "un_b.b2nd"))[:], before)


def test_a_lost_file_is_made_again(tiny, preprocessed_cases):
    prepare(tiny)
    preprocessed_cases.clear()
    (tiny.unlabelled_folder / "un_c_seg.b2nd").unlink()
    prepare(tiny)
    assert preprocessed_cases == ["un_c"]


@pytest.mark.parametrize(
    ("key", "value", "again"),
    [("spacing", [1.5, 1.0, 1.0], CASES), ("use_mask_for_norm", [True, True], CASES), ("patch_size", [8, 8, 8], [])],
)
def test_a_change_of_plans_matters_if_images_depend_on_it(tiny, preprocessed_cases, key, value, again):
    prepare(tiny)
    preprocessed_cases.clear()
    tiny.plans["configurations"]["3d_fullres"][key] = value
    prepare(tiny)
    assert preprocessed_cases == again


def test_a_case_taken_out_of_imagesUn_is_not_used_any_more(tiny, monkeypatch):
    prepare(tiny)
    for channel in range(2):
        raw_file(tiny, "un_b", channel).unlink()
    assert prepare(tiny).identifiers == ["un_a", "un_c"]
    shutil.rmtree(tiny.raw)
    assert prepare(tiny).identifiers == ["un_a", "un_c"]


def prepare_filling(tiny, **options):
    return prepare(tiny, preprocessor_class=FillingPreprocessor, **options)


def stored(tiny, case):
    folder = str(tiny.unlabelled_folder)
    image, _, _, properties = infer_dataset_class(folder)(folder, [case]).load_case(case)
    return image[:], properties


def test_cases_that_lack_channels_are_reported_in_one_line(tiny):
    raw_file(tiny, "un_a", 0).unlink()
    raw_file(tiny, "un_b", 1).unlink()
    lines = []
    assert prepare_filling(tiny, report=lines.append).identifiers == CASES
    warnings = [line for line in lines if "WARNING" in line]
    assert len(warnings) == 1
    assert "2 of 3 unlabelled cases lack channels (T2 only: 1, T1 only: 1): un_a, un_b." in warnings[0]
    for case, channels in {"un_a": [1], "un_b": [0], "un_c": None}.items():
        image, properties = stored(tiny, case)
        assert image.shape[0] == 2 and properties.get("present_channels") == channels
        assert properties["class_locations"] == {}


def test_a_case_is_done_again_when_a_channel_comes_or_goes_or_becomes_another(tiny, preprocessed_cases):
    prepare_filling(tiny)
    channel_1 = raw_file(tiny, "un_b", 1)
    content = channel_1.read_bytes()

    def done():
        preprocessed_cases.clear()
        prepare_filling(tiny)
        return list(preprocessed_cases)

    assert done() == []
    channel_1.unlink()
    assert done() == ["un_b"] and stored(tiny, "un_b")[1]["present_channels"] == [0]
    assert done() == []
    raw_file(tiny, "un_b", 0).rename(channel_1)  # the same content
    assert done() == ["un_b"] and stored(tiny, "un_b")[1]["present_channels"] == [1]
    channel_1.rename(raw_file(tiny, "un_b", 0))
    channel_1.write_bytes(content)
    assert done() == ["un_b"] and "present_channels" not in stored(tiny, "un_b")[1]


def test_records_of_cases_that_lack_nothing_say_nothing_of_channels(tiny, preprocessed_cases):
    prepare(tiny)
    records = tiny.unlabelled_folder / "records"
    assert "present_channels" not in json.loads((records / "un_a.json").read_text())
    raw_file(tiny, "un_c", 0).unlink()
    preprocessed_cases.clear()
    prepare_filling(tiny)
    assert preprocessed_cases == ["un_c"]
    assert json.loads((records / "un_c.json").read_text())["present_channels"] == [1]


def test_a_preprocessor_that_cannot_fill_channels_is_refused(tiny, preprocessed_cases):
    raw_file(tiny, "un_c", 1).unlink()
    with pytest.raises(UserError, match="un_c.*DefaultPreprocessor cannot fill.*nnUNetPreprocessorSemi"):
        prepare(tiny)
    assert preprocessed_cases == []


def test_a_labelled_image_is_refused_as_another_channel_too(tiny):
    raw_file(tiny, "un_b", 1).unlink()
    shutil.copy(tiny.raw_folder / "imagesTr" / "lab_a_0001.nii.gz", raw_file(tiny, "un_b", 0))
    with pytest.raises(UserError, match=r"un_b_0000\.nii\.gz = imagesTr/lab_a_0001\.nii\.gz"):
        prepare_filling(tiny)


def test_files_with_other_channels_than_their_names_say_are_named(tiny, preprocessed_cases):
    import SimpleITK as sitk

    voxels = np.random.default_rng(0).normal(size=(2, 20, 28, 24)).astype(np.float32)
    sitk.WriteImage(sitk.GetImageFromArray(voxels, isVector=False), str(raw_file(tiny, "un_c", 1)))
    with pytest.raises(UserError, match=r"Case un_c.*un_c_0001\.nii\.gz.*2 files with 3 channels"):
        prepare_filling(tiny)
    assert preprocessed_cases == []


def truncate(path):
    path.write_bytes(path.read_bytes()[:200])


def test_all_unreadable_files_are_named_after_the_others_are_done(tiny, preprocessed_cases):
    truncate(raw_file(tiny, "un_a", 1))
    truncate(raw_file(tiny, "un_c", 0))
    with pytest.raises(UserError) as error:
        prepare(tiny)
    assert "un_a_0001.nii.gz" in str(error.value) and "un_c_0000.nii.gz" in str(error.value)
    assert "un_b" not in str(error.value) and "skip_unreadable" in str(error.value)
    assert preprocessed_cases == ["un_b"]


def test_a_damaged_labelled_image_is_never_left_out(tiny):
    truncate(tiny.raw_folder / "imagesTr" / "lab_a_0000.nii.gz")
    truncate(raw_file(tiny, "un_a", 1))
    lines = []
    with pytest.raises(UserError) as error:
        prepare(tiny, skip_unreadable=True, report=lines.append)
    assert str(error.value).startswith("1 image(s) or case(s) cannot be used") and "lab_a_0000" in str(error.value)
    assert not any("lab_a" in line for line in lines)


def test_unreadable_cases_are_left_out_with_a_warning_if_so_set(tiny):
    truncate(raw_file(tiny, "un_a", 1))
    lines = []
    cases = prepare(tiny, skip_unreadable=True, report=lines.append)
    assert cases.identifiers == ["un_b", "un_c"]
    assert cases.skipped == ["un_a"]
    assert any("WARNING" in line and "un_a_0001.nii.gz" in line for line in lines)


def test_where_every_case_would_be_left_out_training_does_not_start(tiny):
    for case in CASES:
        truncate(raw_file(tiny, case, 0))
    with pytest.raises(UserError, match=r"None of the unlabelled cases can be used: .*un_a_0000.*un_b_0000.*un_c_0000"):
        prepare(tiny, skip_unreadable=True, report=lambda line: None)


def test_channels_of_different_shape_count_as_unreadable(tiny):
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(np.random.default_rng(0).normal(size=(9, 9, 9)).astype(np.float32))
    sitk.WriteImage(image, str(raw_file(tiny, "un_c", 1)))
    with pytest.raises(UserError, match="un_c.*shape"):
        prepare(tiny)


@pytest.mark.parametrize("state", ["absent", "empty", "other files"])
def test_without_unlabelled_cases_the_message_says_where_and_how(tiny, state):
    shutil.rmtree(tiny.raw_folder / "imagesUn")
    if state != "absent":
        (tiny.raw_folder / "imagesUn").mkdir()
    if state == "other files":
        (tiny.raw_folder / "imagesUn" / "scan_0000.mha").touch()
    with pytest.raises(UserError, match=r"imagesUn.*CASE_0000\.nii\.gz"):
        prepare(tiny)


def test_a_case_that_is_labelled_too_is_refused(tiny, preprocessed_cases):
    tiny.add_unlabelled("lab_b", seed=50)
    with pytest.raises(UserError, match="lab_b"):
        prepare(tiny)
    assert preprocessed_cases == []


def test_a_case_of_the_splits_is_refused(tiny):
    splits = [{"train": ["lab_a"], "val": ["un_c"]}]
    (tiny.preprocessed_folder / "splits_final.json").write_text(json.dumps(splits))
    with pytest.raises(UserError, match=r"splits_final\.json names 1 case.*un_c.*If their labels were taken away"):
        prepare(tiny)


def test_a_labelled_image_under_another_name_is_refused(tiny, preprocessed_cases):
    shutil.copy(tiny.raw_folder / "imagesTr" / "lab_a_0001.nii.gz", raw_file(tiny, "un_b", 1))
    with pytest.raises(UserError, match=r"un_b_0001\.nii\.gz = imagesTr/lab_a_0001\.nii\.gz"):
        prepare(tiny)
    assert preprocessed_cases == []


def test_an_unlabelled_image_present_twice_is_reported(tiny):
    for channel in range(2):
        shutil.copy(raw_file(tiny, "un_a", channel), raw_file(tiny, "un_c", channel))
    lines = []
    assert prepare(tiny, report=lines.append).identifiers == CASES
    said = [line for line in lines if "same image" in line]
    assert len(said) == 1 and "un_c_0000.nii.gz = imagesUn/un_a_0000.nii.gz" in said[0]


def test_an_unlabelled_image_that_seems_to_be_a_changed_copy_is_reported(tiny):
    import SimpleITK as sitk

    for channel in range(2):
        for source, case in (("imagesTr/lab_a", "un_b"), ("imagesUn/un_a", "un_c")):
            voxels = sitk.GetArrayFromImage(sitk.ReadImage(str(tiny.raw_folder / f"{source}_000{channel}.nii.gz")))
            copy = np.ascontiguousarray(voxels[:, ::-1]).astype(np.float32) * 1.5 + 10
            sitk.WriteImage(sitk.GetImageFromArray(copy), str(raw_file(tiny, case, channel)))
    lines = []
    assert prepare(tiny, report=lines.append).identifiers == CASES
    warnings = [line for line in lines if "seem to show the same scan" in line]
    assert len(warnings) == 1 and warnings[0].startswith("WARNING: 2 pair(s) of an image in imagesUn and another seem")
    assert (f"un_b_0000.nii.gz = {Path('imagesTr', 'lab_a_0000.nii.gz')}, "
            f"un_c_0000.nii.gz = {Path('imagesUn', 'un_a_0000.nii.gz')}. If they do") in warnings[0]
    lines.clear()
    prepare(tiny, report=lines.append)
    assert not any("seem" in line for line in lines)  # said when a case is new; doctor says it always


def test_without_raw_data_finished_cases_are_used(tiny, monkeypatch):
    prepare(tiny)
    (tiny.unlabelled_folder / "un_b.b2nd").unlink()
    monkeypatch.delenv("nnUNet_raw")
    lines = []
    assert prepare(tiny, report=lines.append).identifiers == ["un_a", "un_c"]
    assert any("raw data set is not here" in line for line in lines)
    tiny.plans["configurations"]["3d_fullres"]["spacing"] = [2.0, 2.0, 2.0]
    with pytest.raises(UserError, match="no preprocessed unlabelled case for these plans"):
        prepare(tiny)


def test_without_raw_data_a_case_that_is_labelled_too_is_refused(tiny, monkeypatch):
    prepare(tiny)
    monkeypatch.delenv("nnUNet_raw")
    labelled = tiny.preprocessed_folder / "Plans_3d_fullres"
    labelled.mkdir()
    for name in ("un_b.b2nd", "un_b_seg.b2nd", "un_b.pkl"):
        (labelled / name).touch()
    with pytest.raises(UserError, match="un_b"):
        prepare(tiny)


def test_a_preprocessor_that_nnunet_does_not_find_is_named(tiny):
    tiny.plans["configurations"]["3d_fullres"]["preprocessor_name"] = "NoSuchPreprocessor"
    with pytest.raises(UserError, match="NoSuchPreprocessor.*doctor"):
        prepare(tiny)


def test_a_failure_of_preprocessing_is_not_skipped_as_unreadable(tiny, monkeypatch):
    def no_space(self, *args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DefaultPreprocessor, "run_case_save", no_space)
    with pytest.raises(RuntimeError, match="un_a.*No space left"):
        prepare(tiny, skip_unreadable=True)


KILLED_SCRIPT = """
import json, os, time
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2_semi.data.preprocessing import prepare_unlabelled

class SlowPreprocessor(DefaultPreprocessor):
    def run_case_save(self, target, *args):
        super().run_case_save(target, *args)
        if not target.endswith(("un_a", "un_b")):
            time.sleep(1000)  # all its files are written, none is in place

if __name__ == "__main__":
    folder = os.path.join(os.environ["nnUNet_preprocessed"], "Dataset001_Tiny")
    plans_manager = PlansManager(os.path.join(folder, "Plans.json"))
    with open(os.path.join(folder, "dataset.json")) as file:
        dataset_json = json.load(file)
    prepare_unlabelled(plans_manager, plans_manager.get_configuration("3d_fullres"), dataset_json, num_processes=2,
                       preprocessor_class=SlowPreprocessor)
"""


def test_after_a_kill_finished_cases_are_whole_and_only_the_others_are_done(tiny, processes, preprocessed_cases):
    tiny.add_unlabelled("un_d", seed=14)
    process = processes.start(KILLED_SCRIPT)
    records = tiny.unlabelled_folder / "records"
    unfinished = tiny.unlabelled_folder / "unfinished"

    def in_the_middle():
        return {"un_a.json", "un_b.json"} <= set(os.listdir(records)) and len(list(unfinished.glob("*/*.pkl"))) == 2

    assert processes.wait_until(lambda: records.is_dir() and in_the_middle(), 120), process.poll()
    workers = processes.children(process.pid)
    processes.seen.update(workers)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(workers) >= 2
    assert processes.wait_until(lambda: not any(map(processes.is_running, workers)), 20)

    finished = sorted(path.name for path in tiny.unlabelled_folder.iterdir() if path.is_file())
    assert finished == sorted(f"{case}{end}" for case in ("un_a", "un_b") for end in (".b2nd", "_seg.b2nd", ".pkl"))
    for case in ("un_a", "un_b"):
        assert np.isfinite(blosc2.open(str(tiny.unlabelled_folder / f"{case}.b2nd"))[:]).all()
        pickle.loads((tiny.unlabelled_folder / f"{case}.pkl").read_bytes())

    assert prepare(tiny).identifiers == [*CASES, "un_d"]
    assert preprocessed_cases == ["un_c", "un_d"]


def test_a_worker_killed_by_the_system_is_explained(tiny, processes):
    source = KILLED_SCRIPT.replace("time.sleep(1000)", "os.kill(os.getpid(), 9)")
    _, errors = processes.start(source).communicate(timeout=120)
    assert "UserError" in errors and "fewer processes" in errors


def as_tiff(tiny):
    """All images as 3D TIFF files, whose voxel size is in a JSON file beside them."""
    import SimpleITK as sitk
    import tifffile

    for path in tiny.raw_folder.glob("*/*.nii.gz"):
        tifffile.imwrite(str(path).replace(".nii.gz", ".tif"), sitk.GetArrayFromImage(sitk.ReadImage(str(path))))
        path.unlink()
    tiny.dataset_json["file_ending"], tiny.plans["image_reader_writer"] = ".tif", "Tiff3DIO"
    tiny.save()


def test_a_case_is_done_again_when_the_file_with_its_voxel_size_comes(tiny, preprocessed_cases):
    as_tiff(tiny)
    prepare(tiny)
    preprocessed_cases.clear()
    (tiny.raw_folder / "imagesUn" / "un_b.json").write_text('{"spacing": [2, 1, 1]}')
    prepare(tiny)
    assert preprocessed_cases == ["un_b"]
    image, properties = stored(tiny, "un_b")
    assert image.shape[1] > 30 and properties["spacing"] == [2, 1, 1]
    prepare(tiny)
    assert preprocessed_cases == ["un_b"]


def test_a_preprocessed_folder_that_cannot_be_written_is_enough_when_all_is_in_place(tiny, monkeypatch):
    prepare(tiny)
    os.utime(raw_file(tiny, "un_a"), ns=(1, 1))  # the same content

    def refuse(path, *_):
        raise OSError(30, "Read-only file system", path)

    for name in ("cached_reading.write_json_whole", "case_records.write_json_whole", "case_records.os.remove"):
        monkeypatch.setattr(f"nnunetv2_semi.data.{name}", refuse)
    assert prepare(tiny).identifiers == CASES
    for channel in range(2):
        raw_file(tiny, "un_c", channel).unlink()
    assert prepare(tiny).identifiers == ["un_a", "un_b"]


def spoil(tiny, case, change, spacing=(1.0, 1.0, 1.0)):
    """Change the voxels of the first channel, or the voxel size of both."""
    import SimpleITK as sitk

    for channel in range(2):
        path = raw_file(tiny, case, channel)
        voxels = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        image = sitk.GetImageFromArray(change(voxels) if channel == 0 else voxels)
        image.SetSpacing(spacing)
        sitk.WriteImage(image, str(path))


def with_extreme_slices(voxels):
    voxels[3:5] = -3.4e38
    return voxels


def with_one_extreme_voxel(voxels):
    voxels[5, 5, 5] = 1e12
    return voxels


@pytest.mark.parametrize("change, message", [(with_extreme_slices, "channel 0 has voxels that are NaN or infinite after"
                                              " normalisation"),
                                             (with_one_extreme_voxel, "100.0 % of the voxels of channel 0 have the same"
                                              " value after normalisation")])
def test_what_is_no_image_once_it_is_normalised_is_named(tiny, preprocessed_cases, change, message):
    spoil(tiny, "un_a", change)
    spoil(tiny, "un_c", change)
    with pytest.raises(UserError) as error:
        prepare(tiny)
    text = str(error.value)
    assert text.startswith("2 image(s) or case(s) cannot be used") and "skip_unreadable" in text
    assert text.count(message) == 2 and "un_a_0000.nii.gz" in text and "un_c_0000.nii.gz" in text and "un_b" not in text
    lines = []
    cases = prepare(tiny, skip_unreadable=True, report=lines.append)
    assert cases.identifiers == ["un_b"] and cases.skipped == ["un_a", "un_c"]
    assert sum("WARNING: left out, because it cannot be used" in line for line in lines) == 2
    assert not (tiny.unlabelled_folder / "un_a.b2nd").exists()


def test_an_image_of_one_value_alone_is_no_image(tiny):
    for channel in range(2):
        raw_file(tiny, "un_b", channel).unlink()
        shutil.copy(raw_file(tiny, "un_a", channel), raw_file(tiny, "un_b", channel))
    import SimpleITK as sitk

    for channel in range(2):
        sitk.WriteImage(sitk.GetImageFromArray(np.full((8, 8, 8), 7, np.float32)), str(raw_file(tiny, "un_b", channel)))
    with pytest.raises(UserError, match="un_b_0000.*all voxels have the same value"):
        prepare(tiny)


@pytest.mark.parametrize("size, spacing, plan, message", [
    (2, 1.0, 5.0, "its size is 2 x 28 x 24 voxels of 1 x 1 x 1 mm, so that resampled to 5 x 1 x 1 mm it would have no "
     "voxel"),
    (20, 1000.0, 1.0, "it would have 20000 x 28000 x 24000 voxels, which need 228 TB of memory")])
def test_a_case_that_cannot_be_resampled_is_named_with_size_and_spacing(tiny, preprocessed_cases, size, spacing, plan,
                                                                      message):
    import SimpleITK as sitk

    for channel in range(2):
        image = sitk.GetImageFromArray(np.random.default_rng(channel).normal(size=(size, 28, 24)).astype(np.float32))
        image.SetSpacing((spacing,) * 3)
        sitk.WriteImage(image, str(raw_file(tiny, "un_b", channel)))
    tiny.plans["configurations"]["3d_fullres"]["spacing"][0] = plan
    with pytest.raises(UserError) as error:
        prepare(tiny)
    text = str(error.value)
    assert message in text and "un_b_0000.nii.gz" in text and "Correct the voxel size in the header" in text
    assert preprocessed_cases == ["un_a", "un_c"]
    assert prepare(tiny, skip_unreadable=True).skipped == ["un_b"]


def test_a_case_that_has_no_voxel_after_cropping_is_named(tiny):
    def two_slices(voxels):
        voxels[2:] = 0
        voxels[:2] = 100
        return voxels

    spoil(tiny, "un_b", two_slices)
    shutil.copy(raw_file(tiny, "un_b", 0), raw_file(tiny, "un_b", 1))
    tiny.plans["configurations"]["3d_fullres"]["spacing"][0] = 5.0
    with pytest.raises(UserError, match="un_b_0000.*cropped to what is not zero, its size is 2 x 28 x 24.*no voxel"):
        prepare(tiny)
    assert prepare(tiny, skip_unreadable=True).skipped == ["un_b"]
