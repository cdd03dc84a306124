import json
import os
import shutil

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnunetv2_semi.data import cached_reading, labelled_comparison
from nnunetv2_semi.data.label_files import Labels, label_mistake
from nnunetv2_semi.data.labelled_checks import check_labelled_cases, check_labels_before_preprocessing
from nnunetv2_semi.data.labelled_comparison import compare_with_raw, read_labelled
from nnunetv2_semi.data.thumbnails import thumbnail
from nnunetv2_semi.errors import UserError

COMMAND = "nnUNetv2_preprocess -d 1 -plans_name Plans -c 3d_fullres"


@pytest.fixture
def preprocessed(tiny):
    """The data set with its labelled cases preprocessed, as nnU-Net's command does."""
    tiny.labelled_folder = tiny.preprocessed_folder / "Plans_3d_fullres"
    preprocess(tiny)
    return tiny


def preprocess(tiny):
    shutil.rmtree(tiny.labelled_folder, ignore_errors=True)
    tiny.labelled_folder.mkdir()
    (tiny.preprocessed_folder / "gt_segmentations").mkdir(exist_ok=True)
    for label in sorted((tiny.raw_folder / "labelsTr").iterdir()):
        case = label.name.removesuffix(".nii.gz")
        DefaultPreprocessor(False).run_case_save(
            str(tiny.labelled_folder / case), images(tiny, case), str(label), *tiny.managers(), tiny.dataset_json)
        shutil.copy2(label, tiny.preprocessed_folder / "gt_segmentations")


def images(tiny, case):
    return [str(tiny.raw_folder / "imagesTr" / f"{case}_{channel:04d}.nii.gz") for channel in range(2)]


def label(tiny, case):
    return str(tiny.raw_folder / "labelsTr" / f"{case}.nii.gz")


def check(tiny, **options):
    options = {"num_processes": 1, "report": lambda line: None, "show_progress_bar": False} | options
    check_labelled_cases(*tiny.managers(), tiny.dataset_json, **options)


def message(tiny):
    with pytest.raises(UserError) as error:
        check(tiny)
    return str(error.value)


def rewrite(path, change, spacing=(1.0, 1.0, 1.0), age=0):
    """Change the voxels of a file; ``age``: how long before now (seconds) it says it was written."""
    voxels = sitk.GetArrayFromImage(sitk.ReadImage(path))
    image = sitk.GetImageFromArray(change(voxels))
    image.SetSpacing(spacing)
    sitk.WriteImage(image, path)
    if age:
        now = os.stat(path).st_mtime
        os.utime(path, (now - age, now - age))


@pytest.fixture
def preprocessed_anew(monkeypatch):
    """Names of the images of the cases that were preprocessed in memory, to compare."""
    done, run_case = [], DefaultPreprocessor.run_case

    def recorded(self, files, *rest):
        done.append(os.path.basename(files[0]))
        return run_case(self, files, *rest)

    monkeypatch.setattr(DefaultPreprocessor, "run_case", recorded)
    return done


def test_what_nnunet_preprocessed_is_right_and_is_read_once(preprocessed, preprocessed_anew, monkeypatch):
    check(preprocessed)
    assert preprocessed_anew == []
    monkeypatch.setattr(labelled_comparison, "_examine", lambda *_: pytest.fail("compared again"))
    monkeypatch.setattr(cached_reading, "_content_or_reason", lambda *_: pytest.fail("read again"))
    check(preprocessed)


@pytest.mark.parametrize("how", ["a mask", "clipping"])
def test_a_case_that_normalisation_changed_is_not_resampled_to_be_compared(tiny, monkeypatch, how):
    """As skull-stripped MR and CT: less noise than contrast, most of which normalisation takes away."""
    settings = tiny.plans["configurations"]["3d_fullres"]
    if how == "a mask":
        settings["use_mask_for_norm"] = [True, True]
    else:
        settings["normalization_schemes"] = ["CTNormalization"] * 2
        for intensities in tiny.plans["foreground_intensity_properties_per_channel"].values():
            intensities.update(percentile_00_5=110.0, percentile_99_5=130.0, mean=120.0, std=5.0)
    tiny.save()
    z, y, x = np.ogrid[-1:1:20j, -1:1:28j, -1:1:24j]
    for path in tiny.raw_folder.glob("images*/*"):
        rewrite(str(path), lambda voxels: np.where(z**2 + y**2 + x**2 < 0.6, voxels, 0))
    tiny.labelled_folder = tiny.preprocessed_folder / "Plans_3d_fullres"
    preprocess(tiny)
    for case in ("lab_a", "lab_b"):
        thumbnails = [thumbnail(sitk.GetArrayFromImage(sitk.ReadImage(file))) for file in images(tiny, case)]
        stored, *_, properties = infer_dataset_class(str(tiny.labelled_folder))(
            str(tiny.labelled_folder), [case]).load_case(case)
        assert not labelled_comparison._alike(labelled_comparison._thumbnails(stored, properties), thumbnails)
    monkeypatch.setattr(labelled_comparison, "_difference_anew", lambda *_: pytest.fail("resampled"))
    check(tiny)


def test_a_comparison_that_was_killed_goes_on(preprocessed, monkeypatch):
    for path in preprocessed.raw_folder.glob("*/*"):
        os.utime(path)
    examine = labelled_comparison._examine

    def killed(job, task):
        if task[0] == "lab_b":
            raise KeyboardInterrupt
        return examine(job, task)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(labelled_comparison, "_examine", killed)
        check(preprocessed)
    compared = []
    monkeypatch.setattr(labelled_comparison, "_examine", lambda job, task: compared.append(task[0]) or (None, None))
    check(preprocessed)
    assert compared == ["lab_b"]


def test_a_case_moved_to_the_unlabelled_ones_is_named_with_the_remedy(preprocessed):
    """It would be a validation case and unlabelled training data at once."""
    for path in images(preprocessed, "lab_a"):
        shutil.move(path, preprocessed.raw_folder / "imagesUn")
    os.remove(label(preprocessed, "lab_a"))
    text = message(preprocessed)
    assert "1 labelled case(s)" in text and COMMAND in text and "splits_final" not in text
    assert "lab_a (preprocessed, but not a labelled case of the raw data set any more)" in text
    splits = preprocessed.preprocessed_folder / "splits_final.json"
    splits.write_text(json.dumps([{"train": ["lab_b"], "val": ["lab_a"]}]))
    assert f"{splits} names lab_a: remove these cases there, or remove the file" in message(preprocessed)
    splits.write_text(json.dumps([{"train": ["lab_b"], "val": ["lab_aa"]}]))
    assert "splits_final" not in message(preprocessed)
    preprocess(preprocessed)
    check(preprocessed)


def test_a_case_that_was_labelled_later_is_named(preprocessed):
    preprocessed.add_labelled("lab_c", 7)
    assert "lab_c (labelled in the raw data set, but not preprocessed)" in message(preprocessed)
    assert sorted(path.name for path in preprocessed.labelled_folder.glob("lab_c*")) == []
    splits = preprocessed.preprocessed_folder / "splits_final.json"
    splits.write_text(json.dumps([{"train": ["lab_b"], "val": ["lab_a"]}]))
    assert f"{splits} does not name lab_c: add these cases there, or remove the file" in message(preprocessed)
    splits.write_text(json.dumps([{"train": ["lab_b", "lab_c"], "val": ["lab_a"]}]))
    assert "splits_final" not in message(preprocessed)


def test_a_label_that_was_removed_hides_no_other_difference(preprocessed):
    rewrite(label(preprocessed, "lab_b"), lambda voxels: np.roll(voxels, 2, 0))
    manager, configuration = preprocessed.managers()
    read, labels = read_labelled(manager, preprocessed.dataset_json, num_processes=1, show_progress_bar=False)
    without = Labels({"lab_b": labels.files["lab_b"]}, labels.contents, {})
    found = compare_with_raw(manager, configuration, preprocessed.dataset_json, images=read, labels=without,
                             num_processes=1, show_progress_bar=False)
    assert list(found.changed) == ["lab_b"]


def test_a_list_in_dataset_json_decides_which_cases_are_labelled(preprocessed):
    preprocessed.dataset_json["dataset"] = {
        "lab_a": {"images": images(preprocessed, "lab_a"), "label": label(preprocessed, "lab_a")}}
    text = message(preprocessed)
    assert "lab_b (preprocessed, but not" in text and "lab_a" not in text


def test_a_listed_label_is_compared_with_nnunets_copy_of_its_case(preprocessed):
    """Its file may have another name, and an older date than the preprocessed case."""
    folder = preprocessed.raw_folder / "elsewhere"
    folder.mkdir()
    listed = {}
    for case in ("lab_a", "lab_b"):
        file = folder / f"truth_of_{case}.nii.gz"
        shutil.copy2(label(preprocessed, case), file)
        listed[case] = {"images": images(preprocessed, case), "label": str(file)}
    preprocessed.dataset_json["dataset"] = listed
    rewrite(listed["lab_b"]["label"], lambda voxels: np.roll(voxels, 2, 0), age=10_000)
    text = message(preprocessed)
    assert "lab_b (its label changed since it was preprocessed)" in text and "lab_a" not in text


@pytest.mark.parametrize("first_seen_before", [True, False])
def test_changed_images_and_labels_are_named(preprocessed, first_seen_before):
    if first_seen_before:
        check(preprocessed)
    rewrite(images(preprocessed, "lab_a")[1], lambda voxels: voxels[::-1])
    rewrite(label(preprocessed, "lab_b"), lambda voxels: np.roll(voxels, 2, 0))
    text = message(preprocessed)
    assert "2 labelled case(s)" in text and COMMAND in text
    assert "lab_a (its image, or the plans, changed since it was preprocessed)" in text
    assert "lab_b (its label changed since it was preprocessed)" in text
    preprocess(preprocessed)
    check(preprocessed)


def test_a_change_shows_though_the_file_says_it_is_old(preprocessed):
    check(preprocessed)
    rewrite(images(preprocessed, "lab_a")[1], lambda voxels: voxels[::-1], age=10_000)
    assert "lab_a (its image, or the plans, changed" in message(preprocessed)


@pytest.mark.parametrize("change, spacing, difference", [
    (lambda voxels: voxels[:-1], (1.0, 1.0, 1.0), "its size was [20, 28, 24] voxels when it was preprocessed, and is "
     "[19, 28, 24] now"),
    (lambda voxels: voxels, (1.0, 1.0, 2.5), "its voxel size was [1.0, 1.0, 1.0] mm when it was preprocessed, and is "
     "[2.5, 1.0, 1.0] mm now")])
def test_another_size_shows_at_first_sight_though_the_files_say_they_are_old(preprocessed, preprocessed_anew, change,
                                                                            spacing, difference):
    for path in (*images(preprocessed, "lab_a"), label(preprocessed, "lab_a")):
        rewrite(path, change, spacing, age=10_000)
    assert f"lab_a ({difference})" in message(preprocessed) and preprocessed_anew == []


@pytest.mark.parametrize("which, difference", [("image", "its image, or the plans, changed"),
                                               ("label", "its label changed")])
def test_another_patient_shows_at_first_sight_though_size_and_age_are_the_same(preprocessed, which, difference):
    for path in images(preprocessed, "lab_a") if which == "image" else [label(preprocessed, "lab_a")]:
        rewrite(path, lambda voxels: np.roll(voxels, 5, axis=1), age=10_000)
    assert f"lab_a ({difference} since it was preprocessed)" in message(preprocessed)


def test_a_channel_that_came_or_went_is_named(preprocessed):
    os.remove(images(preprocessed, "lab_a")[1])
    assert "lab_a (it had 2 channel(s) when it was preprocessed, and has 1 now)" in message(preprocessed)


def test_copied_files_are_preprocessed_in_memory_once_and_are_the_same(preprocessed, preprocessed_anew):
    for path in preprocessed.raw_folder.glob("*/*"):
        os.utime(path)
    check(preprocessed)
    assert preprocessed_anew == ["lab_a_0000.nii.gz", "lab_b_0000.nii.gz"]
    preprocessed_anew.clear()
    for path in preprocessed.raw_folder.glob("*/*"):
        os.utime(path)
    check(preprocessed)
    assert preprocessed_anew == []


def test_a_case_that_cannot_be_preprocessed_any_more_is_named_with_the_reason(preprocessed, monkeypatch):
    def broken(*_):
        raise ValueError("no memory for it")

    os.utime(label(preprocessed, "lab_b"))
    monkeypatch.setattr(DefaultPreprocessor, "run_case", broken)
    assert "lab_b (cannot be preprocessed any more: ValueError: no memory for it)" in message(preprocessed)


def test_a_folder_that_cannot_be_written_is_enough(preprocessed, monkeypatch):
    check(preprocessed)
    os.utime(images(preprocessed, "lab_a")[0])

    def refuse(path, *_):
        raise OSError(30, "Read-only file system", path)

    monkeypatch.setattr(cached_reading, "write_json_whole", refuse)
    check(preprocessed)
    for name in os.listdir(preprocessed.preprocessed_folder):
        if name.startswith("semi_"):
            os.remove(preprocessed.preprocessed_folder / name)
    lines = []
    check(preprocessed, report=lines.append)
    assert all("cannot be written" in line for line in lines) and len(lines) == 3


def test_files_of_nnunet_stay_as_they_are(preprocessed):
    def state():
        files = [path for path in preprocessed.preprocessed_folder.rglob("*")
                 if not path.name.startswith(("semi_", ".semi_"))]
        return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}

    before = state()
    rewrite(images(preprocessed, "lab_a")[1], lambda voxels: voxels[::-1])
    message(preprocessed)
    assert {path: stamp for path, stamp in state().items() if path.is_file()} == \
        {path: stamp for path, stamp in before.items() if path.is_file()}


def test_a_case_of_which_files_are_missing_is_named(preprocessed):
    (preprocessed.labelled_folder / "lab_a.pkl").unlink()
    (preprocessed.labelled_folder / "lab_b_seg.b2nd").unlink()
    text = message(preprocessed)
    assert "lab_a (files of its preprocessed case are missing)" in text
    assert "lab_b (files of its preprocessed case are missing)" in text


def test_no_preprocessed_case_at_all_is_told_with_the_command(preprocessed):
    shutil.rmtree(preprocessed.labelled_folder)
    assert f"There is no preprocessed labelled case in {preprocessed.labelled_folder}. Run: {COMMAND}" in \
        message(preprocessed)


def test_without_raw_data_there_is_nothing_to_compare_with(preprocessed, monkeypatch):
    shutil.rmtree(preprocessed.raw_folder)
    check(preprocessed)
    monkeypatch.delenv("nnUNet_raw")
    check(preprocessed)


def test_an_image_without_label_is_named(preprocessed):
    os.remove(label(preprocessed, "lab_a"))
    assert "1 case(s)" in message(preprocessed) and "have no label file" in message(preprocessed)


def test_a_labelled_image_that_is_none_once_normalised_is_named(preprocessed):
    def extreme(voxels):
        voxels[3:5] = -3.4e38
        return voxels

    rewrite(images(preprocessed, "lab_b")[0], extreme)
    preprocess(preprocessed)
    for _ in range(2):  # the second time it is known
        text = message(preprocessed)
        assert "1 labelled case(s)" in text and "are no images: lab_b (channel 0 has voxels that are NaN" in text


def test_an_image_that_cannot_be_read_is_refused(preprocessed):
    with open(images(preprocessed, "lab_a")[0], "wb") as file:
        file.write(b"nothing")
    text = message(preprocessed)
    assert text.startswith("1 image(s) cannot be read. Replace them") and "lab_a_0000.nii.gz (" in text


@pytest.mark.parametrize("change", [{"spacing": [2.0, 2.0, 2.0]}, {"normalization_schemes": ["NoNormalization"] * 2}])
def test_other_plans_than_those_of_preprocessing_are_noticed(preprocessed, preprocessed_anew, change):
    """Unlabelled cases are preprocessed again by themselves: both kinds must have the same spacing and intensities."""
    check(preprocessed)
    preprocessed.plans["configurations"]["3d_fullres"]["patch_size"] = [8, 8, 8]
    check(preprocessed)
    assert preprocessed_anew == []
    preprocessed.plans["configurations"]["3d_fullres"].update(change)
    text = message(preprocessed)
    assert "2 labelled case(s)" in text and "or the plans, changed" in text and COMMAND in text
    preprocess(preprocessed)
    check(preprocessed)


def test_another_spacing_than_that_of_preprocessing_is_noticed_at_once(preprocessed):
    preprocessed.plans["configurations"]["3d_fullres"]["spacing"] = [2.0, 1.0, 1.0]
    assert "lab_a (its image, or the plans, changed" in message(preprocessed)


LABEL_MISTAKES = [
    (lambda voxels: voxels * np.float32(0.9999), "its values 0.9999 are no whole numbers"),
    (lambda voxels: voxels - np.float32(0.5), "its values -0.5, 0.5 are no whole numbers"),
    (lambda voxels: voxels * 7, "its values 7 are not among the labels of dataset.json (0, 1)"),
]


@pytest.mark.parametrize("change, mistake", LABEL_MISTAKES)
def test_labels_that_are_none_of_the_data_set_are_named_with_file_and_value(preprocessed, change, mistake):
    for case in ("lab_a", "lab_b"):
        rewrite(label(preprocessed, case), lambda voxels: change(voxels.astype(np.float32)))
    text = message(preprocessed)
    assert text.startswith("2 label file(s)") and text.count(mistake) == 2
    assert label(preprocessed, "lab_a") in text and label(preprocessed, "lab_b") in text
    with pytest.raises(UserError, match="2 label file"):
        check_labels_before_preprocessing(preprocessed.managers()[0], preprocessed.dataset_json, num_processes=1,
                                          show_progress_bar=False)


def test_a_label_that_cannot_be_read_is_named(preprocessed):
    with open(label(preprocessed, "lab_a"), "wb") as file:
        file.write(b"nothing")
    assert f"{label(preprocessed, 'lab_a')} (BadGzipFile" in message(preprocessed)


def test_labels_of_regions_and_to_be_ignored_are_known(preprocessed):
    preprocessed.dataset_json["labels"] = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    preprocessed.dataset_json["regions_class_order"] = [1, 2]
    rewrite(label(preprocessed, "lab_a"), lambda voxels: voxels * 3)
    text = message(preprocessed)
    assert "label file(s)" not in text and "lab_a (its label changed" in text
    rewrite(label(preprocessed, "lab_a"), lambda voxels: voxels * 2)
    assert "its values 6 are not among the labels of dataset.json (0, 1, 2, 3)" in message(preprocessed)


def test_a_coloured_label_among_grey_ones_is_named(tiny):
    from skimage import io

    tiny.dataset_json["file_ending"], tiny.plans["image_reader_writer"] = ".png", "NaturalImage2DIO"
    for path in tiny.raw_folder.glob("*/*"):
        path.unlink()
    for case, shape in (("a", (8, 8)), ("b", (8, 8, 3))):
        for channel in range(2):
            io.imsave(str(tiny.raw_folder / "imagesTr" / f"{case}_{channel:04d}.png"), np.eye(8, dtype=np.uint8))
        io.imsave(str(tiny.raw_folder / "labelsTr" / f"{case}.png"), np.ones(shape, np.uint8), check_contrast=False)
    with pytest.raises(UserError) as error:
        check_labels_before_preprocessing(tiny.managers()[0], tiny.dataset_json, num_processes=1,
                                          show_progress_bar=False)
    assert "1 label file(s)" in str(error.value)
    assert "b.png (it has 3 channels, as a colour image has" in str(error.value)


def test_voxels_that_are_no_number_are_no_label():
    assert "its values nan are no whole numbers" in label_mistake(1, (float("nan"), 1.0), {"labels": {"organ": 1}})
    assert label_mistake(1, (0.0, 1.0), {"labels": {"organ": 1}}) is None


def test_a_comparison_that_agrees_says_so(preprocessed):
    plans, configuration = preprocessed.managers()
    images, labels = read_labelled(plans, preprocessed.dataset_json, num_processes=1, show_progress_bar=False)
    found = compare_with_raw(plans, configuration, preprocessed.dataset_json, images=images, labels=labels,
                             num_processes=1, show_progress_bar=False)
    assert found.agrees and found.findings() == [] and found.unusable == {}
    folder = str(preprocessed.labelled_folder)
    assert len(infer_dataset_class(folder).get_identifiers(folder)) == 2


@pytest.mark.parametrize("which", ["label", "second channel"])
def test_a_label_or_channel_on_another_grid_is_named(preprocessed, which):
    file = label(preprocessed, "lab_b") if which == "label" else images(preprocessed, "lab_b")[1]
    image = sitk.ReadImage(file)
    image.SetOrigin((9.0, 0.0, 0.0))
    sitk.WriteImage(image, file)
    text = message(preprocessed)
    assert text.startswith("1 labelled case(s) have channels or labels that lie elsewhere")
    assert "lab_b (origin" in text and os.path.basename(file) in text
