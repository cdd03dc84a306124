from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch.utils.flop_counter import FlopCounterMode

from nnunetv2_semi.errors import UserError
from planners.nnUNetFingerprintExtractorSemi import nnUNetFingerprintExtractorSemi
from planners.nnUNetPlannerSemi import nnUNetPlannerSemi
from planners.nnUNetPlannerSemiCPU import nnUNetPlannerSemiCPU

DATASET = 2
TWO_MODALITIES = {"modalities": {"T1": [0], "T2": [1]}}


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr("planners.nnUNetPlannerSemi.default_num_processes", 1)


def cost(plan):
    """nnU-Net's memory estimate of one 3D network with this plan; 560 million stand for 8 GB."""
    arch = plan["architecture"]
    patch, batch = plan["patch_size"], plan["batch_size"]
    estimate = nnUNetPlannerSemi.static_estimate_VRAM_usage(
        patch, 2, 2, arch["network_class_name"], arch["arch_kwargs"], arch["_kw_requires_import"]
    )
    return estimate * batch / 2  # the reference is for a batch of two


@pytest.mark.parametrize(("semi", "graphs"), [(None, 2), (TWO_MODALITIES, 4)])
def test_all_planned_graphs_fit_the_memory_of_one_stock_network(raw_dataset, semi, graphs):
    raw_dataset(semi=semi)
    plans = nnUNetPlannerSemi(DATASET, gpu_memory_target_in_gb=8).plan_experiment()
    plan = plans["configurations"]["3d_fullres"]
    assert plan["semi"] == {"planned_graphs": graphs}
    assert plans["configurations"]["2d"]["semi"] == {"planned_graphs": graphs}
    assert graphs * cost(plan) <= 560_000_000 * 1.01
    # and memory is not left unused: the next patch size up would not fit
    assert graphs * cost(plan) > 560_000_000 * 0.5


def test_memory_is_estimated_as_nnunet_does(raw_dataset, monkeypatch):
    raw_dataset()
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
    assert np.prod(slices["patch_size"]) <= 96**2 and slices["batch_size"] == 8
    for plan in (volume, slices):
        arch = plan["architecture"]["arch_kwargs"]
        assert arch["features_per_stage"][0] == 8 and max(arch["features_per_stage"]) <= 64
        assert set(arch["n_conv_per_stage"]) | set(arch["n_conv_per_stage_decoder"]) <= {1, 2}
        divisor = np.prod(arch["strides"], axis=0)
        assert all(size % by == 0 for size, by in zip(plan["patch_size"], divisor, strict=True))
        # a patch is as large as the image, or near the limit
        limit = 40**3 if len(divisor) == 3 else 96**2
        assert np.prod(plan["patch_size"]) >= min(0.4 * limit, 0.9 * np.prod(plan["median_image_size_in_voxels"]))
        assert plan["semi"] == {
            "planned_graphs": 4,
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
