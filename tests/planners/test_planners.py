from __future__ import annotations

import json
import multiprocessing
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch.utils.flop_counter import FlopCounterMode

from nnunetv2_semi.data.phantom import make_phantom_dataset
from nnunetv2_semi.errors import UserError
from nnunetv2_semi.methods.arrangement import Arrangement
from nnunetv2_semi.methods.bcp import BCP
from nnunetv2_semi.methods.cps import CPS
from nnunetv2_semi.methods.mass import MASS
from nnunetv2_semi.methods.mix import Mix
from nnunetv2_semi.methods.rcps import RCPS
from nnunetv2_semi.methods.synfoc import SynFoC, SynFoCSettings
from nnunetv2_semi.networks.foundation_memory import sam_vit_b_memory
from planners.nnUNetFingerprintExtractorSemi import nnUNetFingerprintExtractorSemi
from planners.nnUNetPlannerSemi import nnUNetPlannerSemi
from planners.nnUNetPlannerSemiCPU import nnUNetPlannerSemiCPU

DATASET = 2
TWO_MODALITIES = {"modalities": {"T1": [0], "T2": [1]}}
JOINED = {"plan_joined_passes": True}


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr("planners.nnUNetPlannerSemi.default_processes", lambda: 1)


def cost(plan):
    """nnU-Net's memory estimate of one 3D network with this plan; 560 million stand for 8 GB."""
    arch = plan["architecture"]
    patch, batch = plan["patch_size"], plan["batch_size"]
    estimate = nnUNetPlannerSemi.static_estimate_VRAM_usage(
        patch, 2, 2, arch["network_class_name"], arch["arch_kwargs"], arch["_kw_requires_import"]
    )
    return estimate * batch / 2  # the reference is for a batch of two


@pytest.mark.parametrize(("semi", "graphs"), [(JOINED, 2), (TWO_MODALITIES | JOINED, 4)])
def test_joined_passes_fit_the_memory_of_one_stock_network(raw_dataset, semi, graphs):
    raw_dataset(semi=semi)
    plans = nnUNetPlannerSemi(DATASET, gpu_memory_target_in_gb=8).plan_experiment()
    plan = plans["configurations"]["3d_fullres"]
    assert plan["semi"] == {"planned_graphs": graphs}
    assert plans["configurations"]["2d"]["semi"] == {"planned_graphs": graphs}
    assert graphs * cost(plan) <= 560_000_000 * 1.01
    # and memory is not left unused: the next patch size up would not fit
    assert graphs * cost(plan) > 560_000_000 * 0.5


@pytest.mark.parametrize("semi", [None, TWO_MODALITIES, {"plan_joined_passes": False}])
@pytest.mark.parametrize(
    ("shape", "spacing", "memory"),
    [
        ((160, 180, 170), (1.0, 1.0, 1.0), 8),
        ((40, 256, 240), (5.0, 1.6, 1.6), 0.2),
    ],
)
def test_patch_and_batch_are_nnunets_own(raw_dataset, monkeypatch, shape, spacing, memory, semi):
    raw_dataset(shape, spacing, semi)
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    plans = {}
    for planner_class in (ExperimentPlanner, nnUNetPlannerSemi):
        planner = planner_class(DATASET, memory, plans_name="plans")
        planner.lowres_creation_threshold = 0.0  # the search for 3d_lowres takes long
        plans[planner_class] = planner.plan_experiment()["configurations"]
    for configuration, expected in plans[ExperimentPlanner].items():
        plan = plans[nnUNetPlannerSemi][configuration]
        assert plan.pop("semi") == {"planned_graphs": 1}
        assert plan == {**expected, "preprocessor_name": "nnUNetPreprocessorSemi"}
        if configuration == "3d_fullres" or memory < 8:  # the memory is what limits the patch
            assert np.prod(plan["patch_size"]) < 0.8 * np.prod(plan["median_image_size_in_voxels"])
    assert set(plans[ExperimentPlanner]) == {"2d", "3d_fullres"}


@pytest.mark.parametrize("memory, size", [(8, 512), (8, 256), (24, 1024)])
def test_2d_batches_leave_memory_for_a_foundation_model(raw_dataset, memory, size):
    """And are the largest that do; everything else of the plan stays."""
    shape = 2000, 256, 256  # memory limits the batch, not the number of slices
    raw_dataset(shape=shape, semi={"plan_with_foundation": size})
    beside = nnUNetPlannerSemi(DATASET, memory).plan_experiment()["configurations"]
    raw_dataset(shape=shape)
    alone = nnUNetPlannerSemi(DATASET, memory).plan_experiment()["configurations"]
    batch, whole = beside["2d"].pop("batch_size"), alone["2d"].pop("batch_size")
    assert beside["2d"]["semi"].pop("SynFoC") == {"image_size": size}
    assert beside == alone and 2 <= batch < whole

    def needed(patches):
        return memory * patches / whole + sam_vit_b_memory(size, patches, False).total / 2 ** 30
    assert needed(batch) <= 1.02 * memory and needed(batch + 1) > 0.98 * memory


def test_joined_passes_of_both_models_fit_where_that_is_planned(raw_dataset):
    """SynFoC holds two passes of each model at once, and the plan says that there is room for them."""
    raw_dataset(shape=(2000, 256, 256), semi={"plan_with_foundation": 256, **JOINED})
    plan = nnUNetPlannerSemi(DATASET, 8).plan_experiment()["configurations"]["2d"]
    raw_dataset(shape=(2000, 256, 256), semi=JOINED)
    alone = nnUNetPlannerSemi(DATASET, 8).plan_experiment()["configurations"]["2d"]
    assert plan["semi"]["planned_graphs"] == 4 == SynFoC.graphs(SynFoCSettings()) and alone["semi"] == \
        {"planned_graphs": 2}
    taken = 8 * plan["batch_size"] / alone["batch_size"]
    assert taken + sam_vit_b_memory(256, 2 * plan["batch_size"], False).total / 2 ** 30 <= 1.02 * 8


@pytest.mark.parametrize("size", [256, 1024])
def test_the_cpu_preset_has_one_batch_size_beside_a_foundation_model_too(raw_dataset, size):
    raw_dataset(shape=(40, 128, 128), semi={"plan_with_foundation": size})
    plan = nnUNetPlannerSemiCPU(DATASET).plan_experiment()["configurations"]["2d"]
    assert plan["batch_size"] == 8 and plan["semi"]["SynFoC"] == {"image_size": size}


def test_no_memory_for_a_foundation_model_is_an_error(raw_dataset):
    raw_dataset(shape=(40, 256, 256), semi={"plan_with_foundation": 1024})
    with pytest.raises(UserError, match="memory target is 4"):
        nnUNetPlannerSemi(DATASET, 4).plan_experiment()


def test_memory_is_estimated_as_nnunet_does(raw_dataset, monkeypatch):
    raw_dataset(semi=JOINED)
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    stock = ExperimentPlanner(DATASET, gpu_memory_target_in_gb=4, plans_name="stock").plan_experiment()
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    semi = nnUNetPlannerSemi(DATASET, gpu_memory_target_in_gb=8).plan_experiment()
    for configuration in ("2d", "3d_fullres"):
        expected, plan = stock["configurations"][configuration], semi["configurations"][configuration]
        for key in ("patch_size", "batch_size", "architecture"):
            assert plan[key] == expected[key]


def test_a_larger_memory_target_gives_larger_patches(raw_dataset):
    raw_dataset()
    small = nnUNetPlannerSemi(DATASET, 8).plan_experiment()["configurations"]["3d_fullres"]
    large = nnUNetPlannerSemi(DATASET, 24).plan_experiment()["configurations"]["3d_fullres"]
    assert np.prod(large["patch_size"]) > 1.5 * np.prod(small["patch_size"])


def test_plans_name_the_plug_ins_preprocessor_and_keep_another_one(raw_dataset):
    raw_dataset()
    plans = nnUNetPlannerSemi(DATASET).plan_experiment()
    assert plans["plans_name"] == "nnUNetSemiPlans"
    assert plans["experiment_planner_used"] == "nnUNetPlannerSemi"
    assert plans["configurations"]["3d_fullres"]["preprocessor_name"] == "nnUNetPreprocessorSemi"
    other = nnUNetPlannerSemi(DATASET, preprocessor_name="TheirPreprocessor", plans_name="other").plan_experiment()
    assert other["configurations"]["2d"]["preprocessor_name"] == "TheirPreprocessor"


def test_mistakes_are_found_before_planning(raw_dataset):
    folder = raw_dataset(semi={"modality": {}})
    with pytest.raises(UserError, match='"modality".*dataset.json|dataset.json.*"modality"'):
        nnUNetPlannerSemi(DATASET)
    (folder / "labelsTr" / "lab_1.nii.gz").unlink()
    for planner_or_extractor in (nnUNetPlannerSemi, nnUNetPlannerSemiCPU, nnUNetFingerprintExtractorSemi):
        with pytest.raises(UserError, match="lab_1.*imagesUn"):
            planner_or_extractor(DATASET)


@pytest.mark.parametrize("class_to_make", [nnUNetPlannerSemi, nnUNetPlannerSemiCPU, nnUNetFingerprintExtractorSemi])
def test_names_files_and_dataset_json_are_checked_before_planning(raw_dataset, write_case, class_to_make):
    folder = raw_dataset()
    class_to_make(DATASET)
    (folder / "imagesTr" / "._lab_0_0000.nii.gz").touch()
    with pytest.raises(UserError, match=r"reads them as cases: \._lab_0_0000\.nii\.gz"):
        class_to_make(DATASET)
    (folder / "imagesTr" / "._lab_0_0000.nii.gz").unlink()
    write_case(folder, "imagesUn", "un_seg", (24, 28, 20), 7)
    with pytest.raises(UserError, match="in imagesUn end with _seg: un_seg"):
        class_to_make(DATASET)
    content = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**content, "labels": {"0": "background", "1": "organ"}}))
    with pytest.raises(UserError, match=r'dataset\.json is not as.*it should be {"background": 0, "organ": 1}'):
        class_to_make(DATASET)


def test_unlabelled_shapes_and_spacings_enter_the_plan_only_if_asked_for(raw_dataset, tmp_path, write_case):
    folder = raw_dataset(shape=(22, 28, 20), semi={"plan_with_unlabelled": False})
    for index in range(3):
        write_case(folder, "imagesUn", f"un_{index}", (42, 40, 44), index, spacing=(1.5, 1.5, 1.5))
    fingerprint_file = tmp_path / "preprocessed" / folder.name / "dataset_fingerprint.json"
    fingerprint = fingerprint_file.read_text()
    without = nnUNetPlannerSemi(DATASET).plan_experiment()
    dataset_json = json.loads((folder / "dataset.json").read_text())
    dataset_json["semi"]["plan_with_unlabelled"] = True
    (folder / "dataset.json").write_text(json.dumps(dataset_json))
    planner = nnUNetPlannerSemi(DATASET)
    assert planner.dataset_fingerprint["shapes_after_crop"][2:] == [[40, 40, 44]] * 3
    together = planner.plan_experiment()
    assert without["configurations"]["3d_fullres"]["spacing"] == [1.0, 1.0, 1.0]
    assert together["configurations"]["3d_fullres"]["spacing"] == [1.5, 1.5, 1.5]
    assert together["original_median_shape_after_transp"] == [40, 40, 44]
    key = "foreground_intensity_properties_per_channel"
    assert together[key] == without[key]
    assert fingerprint_file.read_text() == fingerprint


def test_planning_with_unlabelled_names_all_unreadable_cases(raw_dataset, write_case):
    folder = raw_dataset(semi={"plan_with_unlabelled": True})
    with pytest.raises(UserError, match="imagesUn.*CASE_0000"):
        nnUNetPlannerSemi(DATASET)
    for index in range(2):
        write_case(folder, "imagesUn", f"un_{index}", (12, 12, 12), index)
        (folder / "imagesUn" / f"un_{index}_0000.nii.gz").write_bytes(b"damaged")
    with pytest.raises(UserError, match="un_0.*un_1"):
        nnUNetPlannerSemi(DATASET)


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [
        ((160, 180, 170), (1.0, 1.0, 1.0)),
        ((20, 400, 380), (5.0, 0.8, 0.8)),
        ((70, 90, 75), (2.0, 2.0, 2.0)),
        ((24, 28, 20), (1.0, 1.0, 1.0)),
    ],
)
def test_the_cpu_preset_is_small_whatever_the_images(raw_dataset, shape, spacing):
    raw_dataset(shape, spacing, semi=TWO_MODALITIES)
    plans = nnUNetPlannerSemiCPU(DATASET, gpu_memory_target_in_gb=80).plan_experiment()
    assert plans["plans_name"] == "nnUNetSemiCPUPlans"
    assert set(plans["configurations"]) == {"2d", "3d_fullres", "3d_atlas"}
    volume, slices = plans["configurations"]["3d_fullres"], plans["configurations"]["2d"]
    assert np.prod(volume["patch_size"]) <= 40**3 and volume["batch_size"] == 2
    limit_2d = 128**2 if np.prod(shape) / min(shape) > 4 * 96**2 else 96**2
    assert np.prod(slices["patch_size"]) <= limit_2d and slices["batch_size"] == 8
    for plan in (volume, slices):
        arch = plan["architecture"]["arch_kwargs"]
        assert arch["features_per_stage"][0] == 8 and max(arch["features_per_stage"]) <= 64
        assert set(arch["n_conv_per_stage"]) | set(arch["n_conv_per_stage_decoder"]) <= {1, 2}
        divisor = np.prod(arch["strides"], axis=0)
        assert all(size % by == 0 for size, by in zip(plan["patch_size"], divisor, strict=True))
        # a patch is as large as the image, or near the limit
        limit = 40**3 if len(divisor) == 3 else limit_2d
        assert np.prod(plan["patch_size"]) >= min(0.4 * limit, 0.9 * np.prod(plan["median_image_size_in_voxels"]))
        assert plan["semi"] == {
            "planned_graphs": 6,
            "num_epochs": 50,
            "num_iterations_per_epoch": 50,
            "num_val_iterations_per_epoch": 8,
            "initial_lr": 0.1,
            "momentum": 0.9,
        }


def test_a_training_step_with_the_cpu_preset_needs_few_operations(raw_dataset):
    raw_dataset()
    plan = nnUNetPlannerSemiCPU(DATASET).plan_experiment()["configurations"]["3d_fullres"]
    arch = plan["architecture"]
    network = get_network_from_plans(
        arch["network_class_name"], arch["arch_kwargs"], arch["_kw_requires_import"], 2, 2, deep_supervision=True
    )
    image = torch.rand(plan["batch_size"], 2, *plan["patch_size"])
    with FlopCounterMode(display=False) as counter:
        sum(output.square().mean() for output in network(image)).backward()
    assert counter.get_total_flops() < 1e10  # about a tenth of a second of one processor core


@pytest.mark.parametrize("semi", [{"plan_joined_passes": False}, JOINED, TWO_MODALITIES])
def test_the_cpu_preset_joins_the_passes_of_every_method_whatever_the_data_set_says(raw_dataset, semi):
    raw_dataset(semi=semi)
    configurations = nnUNetPlannerSemiCPU(DATASET).plan_experiment()["configurations"]
    for plan in configurations.values():
        for method in (BCP, CPS, MASS, RCPS, Mix, SynFoC):
            settings = method.Settings(planned_graphs=plan["semi"]["planned_graphs"])
            assert Arrangement.of(settings, method.graphs(settings)).one_pass


def cpu_plan(raw_dataset, shape, spacing, configuration="2d"):
    """A configuration as it stands in the plans file."""
    folder = raw_dataset(shape, spacing)
    planner = nnUNetPlannerSemiCPU(DATASET)
    planner.plan_experiment()
    file = folder.parents[1] / "preprocessed" / folder.name / f"{planner.plans_identifier}.json"
    return json.loads(file.read_text())["configurations"][configuration]


@pytest.mark.parametrize(
    ("shape", "spacing", "coarser"),
    [
        ((1, 256, 256), (999.0, 1.0, 1.0), 2.0),
        ((1, 224, 288), (999.0, 1.0, 1.0), 2.0),
        ((1, 1000, 1400), (999.0, 1.0, 1.0), 9.5),
        ((1, 300, 205), (999.0, 0.5, 0.7), 2.1),
        ((1, 90, 1200), (999.0, 1.0, 1.0), 2.6),
        ((30, 512, 512), (5.0, 0.8, 0.8), 4.0),
    ],
)
def test_a_2d_patch_of_the_cpu_preset_holds_a_large_image_at_a_coarser_spacing(raw_dataset, shape, spacing, coarser):
    plan = cpu_plan(raw_dataset, shape, spacing)
    assert np.prod(plan["patch_size"]) <= 128**2 and plan["batch_size"] == 8
    factors = np.array(plan["spacing"]) / spacing[1:]
    assert factors[0] == pytest.approx(factors[1])
    assert coarser - 0.1 < factors[0] < 1.25 * coarser  # padding may need some more
    resampled = compute_new_shape(shape[1:], spacing[1:], plan["spacing"])
    assert list(resampled) == plan["median_image_size_in_voxels"]
    assert (np.array(plan["patch_size"]) >= resampled).all()
    divisor = np.prod(plan["architecture"]["arch_kwargs"]["strides"], axis=0)
    assert (np.array(plan["patch_size"]) - resampled < divisor).all()  # filled but for the padding


@pytest.mark.parametrize("shape", [(1, 192, 192), (30, 192, 192), (1, 150, 240), (1, 96, 96), (1, 60, 64)])
def test_2d_images_of_up_to_four_patches_keep_their_spacing(raw_dataset, shape):
    plan = cpu_plan(raw_dataset, shape, (999.0, 0.8, 0.8))
    assert plan["spacing"] == [0.8, 0.8]
    assert plan["median_image_size_in_voxels"] == list(shape[1:])
    assert np.prod(plan["patch_size"]) <= 96**2
    if shape[1:] == (192, 192):
        assert plan["patch_size"] == [96, 96]


def test_3d_configurations_of_the_cpu_preset_do_not_depend_on_the_2d_one(raw_dataset, monkeypatch):
    shape, spacing = (40, 512, 480), (5.0, 0.8, 0.8)
    plan = cpu_plan(raw_dataset, shape, spacing, "3d_fullres")
    assert plan["spacing"] == list(spacing) and np.prod(plan["patch_size"]) <= 40**3
    monkeypatch.setattr("planners.nnUNetPlannerSemiCPU._MAX_IMAGE_VOXELS_2D", np.inf)
    assert cpu_plan(raw_dataset, shape, spacing, "3d_fullres") == plan


def test_predictions_of_a_large_2d_image_have_its_size(tmp_path, monkeypatch):
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    raw = make_phantom_dataset(
        tmp_path / "raw", DATASET, labelled=2, unlabelled=0, test=0, shape=(256, 256), file_ending=".png"
    )
    with monkeypatch.context() as patch:  # threads: a process takes seconds to import torch
        patch.setattr(multiprocessing, "get_context", lambda method=None: SimpleNamespace(Pool=ThreadPool))
        extractor = nnUNetFingerprintExtractorSemi(DATASET, num_processes=1)
        extractor.num_foreground_voxels_for_intensitystats = 4000
        extractor.run()
    nnUNetPlannerSemiCPU(DATASET).plan_experiment()
    plans_manager = PlansManager(str(tmp_path / "preprocessed" / raw.name / "nnUNetSemiCPUPlans.json"))
    configuration = plans_manager.get_configuration("2d")
    assert list(configuration.patch_size) == [128, 128]
    dataset_json = json.loads((raw / "dataset.json").read_text())
    images = [str(raw / "imagesTr" / f"case_0000_{channel:04d}.png") for channel in range(2)]
    label_file = str(raw / "labelsTr" / "case_0000.png")
    data, label, properties = DefaultPreprocessor(verbose=False).run_case(
        images, label_file, plans_manager, configuration, dataset_json
    )
    assert data.shape == (2, 1, 128, 128)
    classes = len(dataset_json["labels"])
    logits = torch.nn.functional.one_hot(torch.from_numpy(label[0]).long().clamp(min=0), classes).movedim(-1, 0) * 10.0
    predicted = convert_predicted_logits_to_segmentation_with_correct_shape(
        logits, plans_manager, configuration, plans_manager.get_label_manager(dataset_json), properties
    )
    truth = plans_manager.image_reader_writer_class().read_seg(label_file)[0][0]
    assert predicted.shape == truth.shape == (1, 256, 256)
    assert np.mean(predicted == truth) > 0.97
