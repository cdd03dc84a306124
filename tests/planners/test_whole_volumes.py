"""The configuration 3d_atlas of the planners."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_semi.data.phantom import make_phantom_dataset
from nnunetv2_semi.planning.whole_volumes import coarser_spacing
from planners.nnUNetPlannerSemi import nnUNetPlannerSemi
from planners.nnUNetPlannerSemiCPU import nnUNetPlannerSemiCPU

DATASET = 2
JOINED = {"plan_joined_passes": True}
# The two cases' shapes (voxels) and spacings (mm), and the memory target (GB); none fits at the spacing of 3d_fullres.
LARGE = {
    "isotropic": ([(150, 140, 60), (90, 160, 70)], [(1.0, 1.0, 1.0)] * 2, 4),
    "stack of slices": ([(12, 256, 256)] * 2, [(10.0, 1.37, 1.37)] * 2, 4),
    "stack along the last axis": ([(200, 220, 14), (180, 190, 12)], [(1.4, 1.4, 9.0), (1.4, 1.4, 10.0)], 3),
    "elongated": ([(40, 36, 900)] * 2, [(1.0, 1.0, 1.0)] * 2, 4),
    "abdomen": ([(70, 190, 170), (60, 170, 180)], [(2.5, 0.8, 0.8), (3.0, 0.9, 0.9)], 6),
}


@pytest.fixture
def planned(raw_dataset, tmp_path, monkeypatch):
    """Plans for two cases of these shapes and spacings."""

    def make(shapes, spacings, memory=8.0, planner_class=nnUNetPlannerSemi):
        monkeypatch.setattr("planners.nnUNetPlannerSemi.default_processes", lambda: 1)
        if not (tmp_path / "raw").exists():
            raw_dataset(semi=JOINED)
        file = next((tmp_path / "preprocessed").glob("*/dataset_fingerprint.json"))
        fingerprint = json.loads(file.read_text())
        file.write_text(json.dumps({**fingerprint, "shapes_after_crop": shapes, "spacings": spacings}))
        planner = planner_class(DATASET, memory)
        planner.lowres_creation_threshold = 0.0  # 3d_lowres takes long
        planner.plan_experiment()
        return planner

    return make


def plan_of(planner):
    """3d_atlas as nnU-Net reads it from the plans file."""
    folder = Path(os.environ["nnUNet_preprocessed"]) / planner.dataset_name
    return PlansManager(str(folder / f"{planner.plans_identifier}.json")).get_configuration("3d_atlas").configuration


def preprocessed_shapes(planner, spacing):
    """What preprocessing makes of the cases at a spacing."""
    axes = planner.plans["transpose_forward"]
    fingerprint = planner.dataset_fingerprint
    return [
        compute_new_shape([shape[axis] for axis in axes], [own[axis] for axis in axes], spacing)
        for shape, own in zip(fingerprint["shapes_after_crop"], fingerprint["spacings"], strict=True)
    ]


def memory_estimate(plan, patch_size=None, batch_size=None):
    """In GB, as nnU-Net counts."""
    arch = plan["architecture"]
    network = get_network_from_plans(
        arch["network_class_name"], arch["arch_kwargs"], arch["_kw_requires_import"], 2, 2, allow_init=False
    )
    entries = network.compute_conv_feature_map_size(patch_size or plan["patch_size"])
    return entries / 560_000_000 * 8 * (batch_size or plan["batch_size"]) / 2


def nnunet_plan(planner, spacing, shape):
    """What nnU-Net itself plans for images that all have this shape."""
    voxels = float(np.prod(shape)) * planner.dataset_json["numTraining"]
    return ExperimentPlanner.get_plans_for_configuration(planner, spacing, tuple(map(int, shape)), "", voxels, {})


def spacings_up_to(planner, plan):
    """All spacings that the search went through, the planned one last."""
    tried = [np.array(planner.plans["configurations"]["3d_fullres"]["spacing"])]
    while not np.allclose(tried[-1], plan["spacing"], rtol=1e-9):
        assert len(tried) < 200
        tried.append(coarser_spacing(tried[-1]))
    return tried


@pytest.mark.parametrize("geometry", LARGE)
def test_the_patch_holds_every_volume_and_fits_the_memory(planned, geometry):
    *_, memory = LARGE[geometry]
    planner = planned(*LARGE[geometry])
    plan = plan_of(planner)
    largest = np.max(preprocessed_shapes(planner, plan["spacing"]), axis=0)
    divisor = np.prod(plan["architecture"]["arch_kwargs"]["strides"], axis=0)
    # no smaller multiple of what the network divides by would do
    assert list(plan["patch_size"]) == [int(-(-size // by) * by) for size, by in zip(largest, divisor, strict=True)]
    assert plan["batch_size"] >= 2
    assert planner.planned_graphs * memory_estimate(plan, batch_size=2) <= memory
    assert plan["semi"] == {"planned_graphs": planner.planned_graphs} == {"planned_graphs": 2}


@pytest.mark.parametrize("geometry", [name for name in LARGE if name != "elongated"])
def test_a_step_finer_nnunet_would_cut_the_volume(planned, geometry):
    planner = planned(*LARGE[geometry])
    plan = plan_of(planner)
    *_, finer, spacing = spacings_up_to(planner, plan)
    shape = np.max(preprocessed_shapes(planner, finer), axis=0)
    assert (np.array(nnunet_plan(planner, finer, shape)["patch_size"]) < shape).any()
    shape = np.max(preprocessed_shapes(planner, spacing), axis=0)
    expected = nnunet_plan(planner, spacing, shape)
    assert list(expected["patch_size"]) == plan["patch_size"]
    assert json.loads(json.dumps(expected["architecture"])) == plan["architecture"]


def test_an_elongated_volume_is_held_where_nnunet_would_cut_its_ends_with_memory_to_spare(planned):
    planner = planned(*LARGE["elongated"])
    plan = plan_of(planner)
    *_, finer, spacing = spacings_up_to(planner, plan)
    shape = np.max(preprocessed_shapes(planner, spacing), axis=0)
    cut = nnunet_plan(planner, spacing, shape)
    assert max(cut["patch_size"]) < max(shape) <= max(plan["patch_size"])
    # a step finer, the volume takes more than a network's share of the memory
    share = LARGE["elongated"][-1] / planner.planned_graphs
    shape = np.max(preprocessed_shapes(planner, finer), axis=0)
    divisor = np.prod(plan["architecture"]["arch_kwargs"]["strides"], axis=0)
    patch_size = [int(-(-size // by) * by) for size, by in zip(shape, divisor, strict=True)]
    assert memory_estimate(plan, patch_size, batch_size=2) > share >= memory_estimate(plan)
    assert plan["batch_size"] == 2


@pytest.mark.parametrize("size", [4, 24])
def test_volumes_that_fit_keep_the_spacing_of_3d_fullres(planned, size):
    planner = planned([(size, 28, 20), (22, 30, 20)], [(1.0, 1.0, 1.0)] * 2)
    plan = plan_of(planner)
    fullres = planner.plans["configurations"]["3d_fullres"]
    assert plan["spacing"] == fullres["spacing"] == [1.0, 1.0, 1.0]
    assert (np.array(plan["patch_size"]) >= [22, 30, 20]).all()
    assert (np.array(plan["patch_size"]) <= [24, 32, 20]).all()
    assert plan["median_image_size_in_voxels"] == list(np.median([(size, 28, 20), (22, 30, 20)], axis=0))


def test_memory_that_is_left_goes_into_the_batch_as_nnunet_decides(planned):
    planner = planned([(24, 28, 20)] * 400, [(1.0, 1.0, 1.0)] * 400)
    assert plan_of(planner)["batch_size"] == 2  # at most 5 % of two cases, which is nnU-Net's smallest
    planner.dataset_json["numTraining"] = 400
    planner.plan_experiment()
    plan, fullres = plan_of(planner), planner.plans["configurations"]["3d_fullres"]
    assert plan["batch_size"] == fullres["batch_size"] > 2
    assert planner.planned_graphs * memory_estimate(plan) <= 8 * 1.1  # nnU-Net rounds the batch size


def test_more_memory_gives_a_finer_spacing(planned):
    shapes, spacings, memory = LARGE["isotropic"]
    small = plan_of(planned(shapes, spacings, memory))
    large = plan_of(planned(shapes, spacings, 1.5 * memory))
    assert max(large["spacing"]) < max(small["spacing"])


def test_passes_that_run_one_after_another_have_all_the_memory(planned, raw_dataset):
    shapes, spacings, memory = LARGE["isotropic"]
    joined = plan_of(planned(shapes, spacings, memory))
    raw_dataset(semi={})
    plan = plan_of(planned(shapes, spacings, memory / 2))
    assert (joined.pop("semi"), plan.pop("semi")) == ({"planned_graphs": 2}, {"planned_graphs": 1})
    assert plan == joined


def test_joined_modalities_share_the_memory(planned, raw_dataset):
    shapes, spacings, memory = LARGE["isotropic"]
    raw_dataset(semi={"modalities": {"T1": [0], "T2": [1]}, **JOINED})
    planner = planned(shapes, spacings, 2 * memory)
    plan = plan_of(planner)
    assert plan["semi"] == {"planned_graphs": 4}
    assert 4 * memory_estimate(plan) <= 2 * memory


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [
        ((1.0, 1.0, 1.0), (1.03, 1.03, 1.03)),
        ((10.0, 1.4, 1.5), (10.0, 1.442, 1.545)),
        ((10.0, 4.9, 5.1), (10.0, 5.047, 5.1)),
        ((10.0, 5.0, 5.0), (10.3, 5.15, 5.15)),
    ],
)
def test_fine_axes_catch_up_before_all_become_coarser(spacing, expected):
    np.testing.assert_allclose(coarser_spacing(np.array(spacing)), expected)


def test_slices_of_a_stack_stay_apart_as_they_are_until_their_pixels_are_half_as_large(planned):
    spacing = plan_of(planned(*LARGE["stack of slices"]))["spacing"]
    assert spacing[0] == 10.0 and 1.37 < spacing[1] == spacing[2] < 5.0


def test_2d_data_sets_have_none(planned):
    planner = planned([(1, 200, 220)] * 2, [(999.0, 1.0, 1.0)] * 2)
    assert set(planner.plans["configurations"]) == {"2d"}


@pytest.mark.parametrize("planner_class", [nnUNetPlannerSemi, nnUNetPlannerSemiCPU])
def test_everything_else_in_the_plans_stays_as_it_was(planned, raw_dataset, monkeypatch, planner_class):
    raw_dataset((80, 120, 110), (2.0, 1.0, 1.0), semi=JOINED)
    planner = planner_class(DATASET, 1)
    planner.plan_experiment()
    configurations = planner.plans["configurations"]
    assert "3d_atlas" in configurations
    assert planner_class is nnUNetPlannerSemiCPU or {"3d_lowres", "3d_cascade_fullres"} < set(configurations)
    monkeypatch.setattr(nnUNetPlannerSemi, "save_plans", lambda *_: None)
    without = planner_class(DATASET, 1)
    without.plan_experiment()
    monkeypatch.undo()
    expected = json.loads(json.dumps(without.plans, default=lambda value: value.tolist()))
    kept = {name: content for name, content in configurations.items() if name != "3d_atlas"}
    assert json.loads(json.dumps({**planner.plans, "configurations": kept})) == expected
    # and 3d_atlas has all that 3d_fullres has
    plan, fullres = configurations["3d_atlas"], configurations["3d_fullres"]
    assert plan.keys() == fullres.keys()
    own = {"data_identifier", "batch_size", "patch_size", "median_image_size_in_voxels", "spacing", "architecture"}
    assert {key for key in plan if plan[key] != fullres[key]} <= {*own, "batch_dice"}
    assert plan["data_identifier"] == f"{planner.plans_identifier}_3d_atlas"
    assert plan["batch_dice"] is False


def test_planning_again_replaces_it_and_keeps_configurations_of_the_user(planned):
    first = planned([(24, 28, 20)] * 2, [(1.0, 1.0, 1.0)] * 2)
    file = Path(os.environ["nnUNet_preprocessed"]) / first.dataset_name / "nnUNetSemiPlans.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["mine"] = {"inherits_from": "3d_atlas", "batch_size": 3}
    file.write_text(json.dumps(plans))
    second = planned([(40, 48, 44)] * 2, [(1.0, 1.0, 1.0)] * 2)
    assert (np.array(plan_of(second)["patch_size"]) >= [40, 48, 44]).all()
    assert json.loads(file.read_text())["configurations"]["mine"]["batch_size"] == 3


def test_unlabelled_volumes_are_held_only_if_asked_for(planned, raw_dataset, write_case):
    folder = raw_dataset(semi={"plan_with_unlabelled": False, **JOINED})
    write_case(folder, "imagesUn", "un_0", (62, 40, 44), 0)
    geometry = [(24, 28, 20)] * 2, [(1.0, 1.0, 1.0)] * 2
    assert max(plan_of(planned(*geometry))["patch_size"]) < 40
    dataset_json = json.loads((folder / "dataset.json").read_text())
    dataset_json["semi"]["plan_with_unlabelled"] = True
    (folder / "dataset.json").write_text(json.dumps(dataset_json))
    assert (np.array(plan_of(planned(*geometry))["patch_size"]) >= [60, 40, 44]).all()


@pytest.mark.parametrize("geometry", LARGE)
def test_the_cpu_preset_is_small_here_too(planned, geometry):
    shapes, spacings, _ = LARGE[geometry]
    planner = planned(shapes, spacings, 80, nnUNetPlannerSemiCPU)
    plan = plan_of(planner)
    assert np.prod(plan["patch_size"]) <= 40**3 and plan["batch_size"] == 2
    assert (np.array(plan["patch_size"]) >= np.max(preprocessed_shapes(planner, plan["spacing"]), axis=0)).all()
    # a step finer may need much more padding; more room than that is not left unused
    assert np.prod(plan["patch_size"]) > 0.4 * 40**3
    assert max(plan["architecture"]["arch_kwargs"]["features_per_stage"]) <= 64
    assert plan["semi"]["num_epochs"] == 50
    assert plan["data_identifier"] == "nnUNetSemiCPUPlans_3d_atlas"


@pytest.mark.e2e
def test_nnunets_command_plans_and_preprocesses_whole_volumes(tmp_path, run_in_this_process):
    make_phantom_dataset(
        tmp_path / "nnUNet_raw", 1, labelled=2, unlabelled=1, test=0, shape=(16, 72, 64), spacing=(6.0, 1.5, 1.5)
    )
    arguments = ["-d", "1", "-pl", "nnUNetPlannerSemiCPU", "-c", "3d_atlas", "-np", "1", "-npfp", "1"]
    run_in_this_process(tmp_path, "nnUNetv2_plan_and_preprocess", *arguments)
    preprocessed = tmp_path / "nnUNet_preprocessed" / "Dataset001_Phantom"
    plans_manager = PlansManager(str(preprocessed / "nnUNetSemiCPUPlans.json"))
    plan = plans_manager.get_configuration("3d_atlas")
    assert max(plan.spacing[1:]) > 1.5
    folder = preprocessed / "nnUNetSemiCPUPlans_3d_atlas"
    dataset = nnUNetDatasetBlosc2(str(folder))
    shapes = [dataset.load_case(case)[0].shape[1:] for case in dataset.identifiers]
    assert len(shapes) == 2
    assert (np.array(shapes) <= plan.patch_size).all()
    # the largest one fills the patch but for the padding
    divisor = np.prod(plan.network_arch_init_kwargs["strides"], axis=0)
    assert (np.array(plan.patch_size) - np.max(shapes, axis=0) < divisor).all()
    assert len(list((preprocessed / "nnUNetSemiCPUPlans_3d_atlas_unlabeled").glob("*.pkl"))) == 1
