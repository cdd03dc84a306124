from __future__ import annotations

import copy
import json
import queue
import shutil
import threading

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.data_iterators import preprocess_fromfiles_save_to_queue
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_semi.data.filling_preprocessor import FillingPreprocessor
from nnunetv2_semi.errors import UserError
from nnunetv2_semi.present_channels import present_channels

MARK = np.float32(-0.0).tobytes()
STATISTICS = {"max": 900.0, "median": 95.0, "min": -900.0}
CT = STATISTICS | {"mean": 90.0, "std": 15.0, "percentile_00_5": 60.0, "percentile_99_5": 120.0}
OTHER = STATISTICS | {"mean": -7.0, "std": 3.0, "percentile_00_5": -8.0, "percentile_99_5": -6.0}


@pytest.fixture
def mixed(tiny):
    """Channel 0 z-scored within the mask, channel 1 CT; half the in-plane resolution of the raw images is wanted."""
    tiny.dataset_json["channel_names"] = {"0": "MR", "1": "CT"}
    configuration = tiny.plans["configurations"]["3d_fullres"]
    configuration |= {
        "normalization_schemes": ["ZScoreNormalization", "CTNormalization"],
        "use_mask_for_norm": [True, False],
        "spacing": [1.0, 2.0, 2.0],
    }
    tiny.plans["foreground_intensity_properties_per_channel"] = {"0": OTHER, "1": CT}
    tiny.plans["transpose_forward"] = [1, 0, 2]
    tiny.plans["transpose_backward"] = [1, 0, 2]
    return tiny


def raw_file(tiny, case, channel, folder="imagesTr"):
    return str(tiny.raw_folder / folder / f"{case}_{channel:04d}.nii.gz")


def label_file(tiny, case):
    return str(tiny.raw_folder / "labelsTr" / f"{case}.nii.gz")


def one_channel_data_set(tiny, channel):
    """Plans and dataset.json of a data set that has this channel alone."""
    plans = copy.deepcopy(tiny.plans)
    configuration = plans["configurations"]["3d_fullres"]
    for key in ("normalization_schemes", "use_mask_for_norm"):
        configuration[key] = [configuration[key][channel]]
    name = "foreground_intensity_properties_per_channel"
    plans[name] = {"0": plans[name][str(channel)]}
    manager = PlansManager(plans)
    return manager, manager.get_configuration("3d_fullres"), {**tiny.dataset_json, "channel_names": {"0": "only"}}


def is_mark(voxels):
    return voxels.dtype == np.float32 and set(np.ravel(voxels).view(np.uint32)) == {np.frombuffer(MARK, np.uint32)[0]}


@pytest.mark.parametrize("channel", [0, 1])
@pytest.mark.parametrize("labelled", [True, False])
def test_a_channel_comes_out_as_if_the_data_set_had_no_other(mixed, channel, labelled):
    file = raw_file(mixed, "lab_a", channel)
    label = label_file(mixed, "lab_a") if labelled else None
    expected, expected_seg, expected_properties = DefaultPreprocessor(False).run_case(
        [file], label, *one_channel_data_set(mixed, channel)
    )
    image, seg, properties = FillingPreprocessor(False).run_case([file], label, *mixed.managers(), mixed.dataset_json)
    assert image.shape == (2, *expected.shape[1:]) and image.dtype == expected.dtype
    assert image[channel].tobytes() == expected[0].tobytes()
    assert is_mark(image[1 - channel])
    assert seg.tobytes() == expected_seg.tobytes() and seg.dtype == expected_seg.dtype
    assert properties.pop("present_channels") == [channel]
    assert properties["shape_after_cropping_and_before_resampling"][0] == 24  # transposed, cropped by 4
    assert properties.keys() == expected_properties.keys()
    for name in set(properties) - {"class_locations"}:
        assert properties[name] == expected_properties[name]


def test_only_channels_that_are_there_decide_what_is_cropped(tiny):
    voxels = np.zeros((20, 28, 24), np.float32)
    voxels[3:9, 5:20, 7:11] = 50 + np.random.default_rng(0).random((6, 15, 4))
    sitk.WriteImage(sitk.GetImageFromArray(voxels), raw_file(tiny, "lab_a", 1))
    both = [raw_file(tiny, "lab_a", channel) for channel in range(2)]
    image, _, properties = FillingPreprocessor(False).run_case(both, None, *tiny.managers(), tiny.dataset_json)
    assert image.shape == (2, 16, 24, 20) and "present_channels" not in properties
    image, _, properties = FillingPreprocessor(False).run_case(both[1:], None, *tiny.managers(), tiny.dataset_json)
    assert image.shape == (2, 6, 15, 4)
    assert properties["bbox_used_for_cropping"] == [[3, 9], [5, 20], [7, 11]]


def test_two_of_three_channels_keep_their_own_schemes_in_any_order_of_files(mixed):
    mixed.dataset_json["channel_names"] = {"0": "MR", "1": "absent", "2": "CT"}
    configuration = mixed.plans["configurations"]["3d_fullres"]
    configuration["normalization_schemes"].insert(1, "RescaleTo01Normalization")
    configuration["use_mask_for_norm"].insert(1, False)
    statistics = dict.fromkeys(STATISTICS)
    mixed.plans["foreground_intensity_properties_per_channel"] = {"0": OTHER, "1": statistics, "2": CT}
    shutil.move(raw_file(mixed, "lab_a", 1), raw_file(mixed, "lab_a", 2))
    present = [raw_file(mixed, "lab_a", channel) for channel in (2, 0)]
    image, _, properties = FillingPreprocessor(False).run_case(present, None, *mixed.managers(), mixed.dataset_json)
    assert properties["present_channels"] == [0, 2]
    for channel in (0, 2):
        expected, _, _ = DefaultPreprocessor(False).run_case(
            [raw_file(mixed, "lab_a", channel)], None, *one_channel_data_set(mixed, channel)
        )
        assert image[channel].tobytes() == expected[0].tobytes()
    assert is_mark(image[1])


def test_plans_and_configuration_are_left_as_they_were(mixed):
    plans_manager, configuration = mixed.managers()
    before = json.dumps([plans_manager.plans, configuration.configuration])
    FillingPreprocessor(False).run_case(
        [raw_file(mixed, "lab_a", 1)], None, plans_manager, configuration, mixed.dataset_json
    )
    assert json.dumps([plans_manager.plans, configuration.configuration]) == before


@pytest.mark.parametrize("configuration", ["3d_fullres", "2d"])
def test_the_mark_survives_being_stored(tiny, tmp_path, configuration):
    target = str(tmp_path / "case")
    FillingPreprocessor(False).run_case_save(
        target, [raw_file(tiny, "lab_b", 1)], None, *tiny.managers(configuration), tiny.dataset_json
    )
    stored, _, _, properties = nnUNetDatasetBlosc2(str(tmp_path), ["case"]).load_case("case")
    whole, patch = stored[:], stored[:, 2:9, 3:10, 1:8]
    assert properties["present_channels"] == [1]
    assert is_mark(whole[0]) and is_mark(patch[0])
    assert present_channels(torch.from_numpy(whole)[None]).tolist() == [[False, True]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_mark_survives_other_precisions(tiny, dtype):
    image, _, _ = FillingPreprocessor(False).run_case(
        [raw_file(tiny, "lab_b", 0)], None, *tiny.managers(), tiny.dataset_json
    )
    # as nnU-Net's predictor does before it converts
    image = torch.from_numpy(np.vstack((image, np.ones_like(image[:1]))))
    image = image.to(dtype=torch.float32, memory_format=torch.contiguous_format)
    assert present_channels(image.to(dtype)[None]).tolist() == [[True, False, True]]


@pytest.mark.parametrize("channels", [[0], [0, 1]])
def test_minus_zeros_of_an_image_do_not_look_like_the_mark(tiny, channels):
    tiny.plans["configurations"]["3d_fullres"]["use_mask_for_norm"] = [True, True]
    for channel in channels:
        image = sitk.GetArrayFromImage(sitk.ReadImage(raw_file(tiny, "lab_a", channel)))
        image[5:12, 5:12, 5:12] = 0
        image[image == 0] = -0.0
        image[5:12, 5:12, 5] = -0.0  # an open hole: outside the mask
        image[:, 5:12, 5:12] = -0.0
        sitk.WriteImage(sitk.GetImageFromArray(image), raw_file(tiny, "lab_a", channel))
    files = [raw_file(tiny, "lab_a", channel) for channel in channels]
    image, seg, _ = FillingPreprocessor(False).run_case(files, None, *tiny.managers(), tiny.dataset_json)
    hole = image[:, :, 3:10, 3:10]
    assert (seg[:, :, 3:10, 3:10] == -1).all() and (hole == 0).all()
    assert present_channels(torch.from_numpy(hole)[None]).tolist() == [[channel in channels for channel in range(2)]]


def test_colour_images_in_one_file_lack_nothing(tiny):
    voxels = np.stack([sitk.GetArrayFromImage(sitk.ReadImage(raw_file(tiny, "lab_a", c))) for c in range(2)])
    together = raw_file(tiny, "colour", 0)
    sitk.WriteImage(sitk.GetImageFromArray(voxels, isVector=False), together)
    arguments = ([together], None, *tiny.managers(), tiny.dataset_json)
    expected, _, _ = DefaultPreprocessor(False).run_case(*arguments)
    image, _, properties = FillingPreprocessor(False).run_case(*arguments)
    assert image.tobytes() == expected.tobytes() and "present_channels" not in properties


class AsNamedInThePlans(ConfigurationManager):
    """nnU-Net looks classes up in its own folders, where the source tree's are not."""

    preprocessor_class = FillingPreprocessor


def test_prediction_takes_the_files_that_lie_in_a_folder(mixed, tmp_path, capsys):
    folder = tmp_path / "to_predict"
    for case, channels in {"both": [0, 1], "ct": [1], "mr": [0]}.items():
        for channel in channels:
            folder.mkdir(exist_ok=True)
            shutil.copy(raw_file(mixed, "un_a", channel, "imagesUn"), folder / f"{case}_{channel:04d}.nii.gz")
    plans_manager, configuration = mixed.managers()
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.manual_initialization(None, plans_manager, configuration, None, mixed.dataset_json, "", None)
    lists, outputs, _ = predictor._manage_input_and_output_lists(str(folder), str(tmp_path / "out"))
    found: queue.Queue = queue.Queue()
    preprocess_fromfiles_save_to_queue(
        lists, None, outputs, plans_manager, mixed.dataset_json, AsNamedInThePlans(configuration.configuration),
        found, threading.Event(), threading.Event(),
    )  # fmt: skip
    lines = [line for line in capsys.readouterr().out.splitlines() if "lack channels" in line]
    assert len(lines) == 2 and "predicted cases lack channels (MR only: 1): mr_0000.nii.gz." in lines[1]
    items = [found.get() for _ in range(3)]
    present = {item["ofile"].rsplit("/")[-1]: present_channels(item["data"][None]).tolist() for item in items}
    assert present == {"both": [[True, True]], "ct": [[False, True]], "mr": [[True, False]]}
    assert [item["data_properties"].get("present_channels") for item in items] == [None, [1], [0]]
    assert all(item["data"].dtype == torch.float32 for item in items)


def test_an_array_with_fewer_channels_says_which_they_are(mixed):
    image = np.random.default_rng(0).random((1, 10, 11, 12)).astype(np.float32)
    arguments = (*mixed.managers(), mixed.dataset_json)
    with pytest.raises(UserError, match="1 channel.*2 were expected.*present_channels"):
        FillingPreprocessor(False).run_case_npy(image, None, {"spacing": [1, 1, 1]}, *arguments)
    properties = {"spacing": [1, 1, 1], "present_channels": [1]}
    filled, _, _ = FillingPreprocessor(False).run_case_npy(image, None, properties, *arguments)
    assert is_mark(filled[0]) and not is_mark(filled[1])


@pytest.mark.parametrize(
    ("names", "message"), [(["a_0000", "a_0002"], r"a_0002\.nii\.gz.*no channel 2"), (["scan"], r"scan\.nii\.gz")]
)
def test_files_that_do_not_fit_are_named(tiny, names, message):
    files = [str(tiny.raw_folder / "imagesTr" / f"{name}.nii.gz") for name in names]
    for file in files:
        shutil.copy(raw_file(tiny, "lab_a", 0), file)
    with pytest.raises(UserError, match=message):
        FillingPreprocessor(False).run_case(files, None, *tiny.managers(), tiny.dataset_json)
    with pytest.raises(UserError, match="no image file"):
        FillingPreprocessor(False).run_case([], None, *tiny.managers(), tiny.dataset_json)


def test_dataset_json_may_be_a_path(tiny):
    path = str(tiny.raw_folder / "dataset.json")
    _, _, properties = FillingPreprocessor(False).run_case([raw_file(tiny, "lab_a", 1)], None, *tiny.managers(), path)
    assert properties["present_channels"] == [1]


@pytest.mark.parametrize("as_label", [False, True])
def test_a_damaged_file_is_refused_by_name_and_not_filled_up_with_zeros(tiny, as_label):
    image, label = raw_file(tiny, "lab_a", 0), label_file(tiny, "lab_a")
    damaged = label if as_label else image
    with open(damaged, "r+b") as file:
        file.truncate(60)
    with pytest.raises(UserError) as error:
        FillingPreprocessor(False).run_case([image], label if as_label else None, *tiny.managers(), tiny.dataset_json)
    assert str(error.value).startswith(f"{damaged} is damaged: ") and "--continue_prediction" in str(error.value)


def test_an_image_with_voxels_that_are_no_numbers_is_refused(tiny):
    image = raw_file(tiny, "lab_a", 0).replace(".nii.gz", ".nrrd")  # of NIfTI, ITK reads zeros in their place
    voxels = np.ones((8, 9, 10), np.float32)
    voxels[3, 4, 5] = np.inf
    sitk.WriteImage(sitk.GetImageFromArray(voxels), image)
    with pytest.raises(UserError, match=r"lab_a_0000\.nrrd: there are voxels that are not finite numbers"):
        FillingPreprocessor(False).run_case([image], None, *tiny.managers(), tiny.dataset_json)
