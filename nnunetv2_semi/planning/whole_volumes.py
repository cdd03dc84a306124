"""Plan of the configuration 3d_atlas, whose patch holds the whole volume of every case.

Registration needs the anatomy that two cases have in common, so patches from anywhere in the images do not do.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import numpy as np
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape

from nnunetv2_semi.data.dataset_settings import num_channels

ATLAS_CONFIGURATION = "3d_atlas"
# As nnU-Net has them in its search for 3d_lowres, ...
SPACING_STEP = 1.03
SIMILAR_SPACING = 2
# ... in its network topology, which sets no limit to the number of poolings, ...
MAX_POOLINGS = 999999
# ... and in its judgement whether a patch fits the memory.
JUDGED_BATCH_SIZE = 2


def plan_whole_volumes(planner: ExperimentPlanner, fullres: dict, transpose_forward: Sequence[int]) -> dict:
    """Configuration with the finest spacing at which the largest volume, as one patch, fits the memory target.

    The search starts at the spacing of 3d_fullres and makes it coarser as nnU-Net does for 3d_lowres, in steps of 3 %.
    A patch fits if nnU-Net's estimate for a batch of two does. nnU-Net's own search for a patch cannot be asked: it
    starts from a cube (in mm) of 256^3 voxels, which cuts off the ends of an elongated volume.

    The patch is the largest resampled size along each axis, over all cases of the fingerprint, rounded up as the
    network's poolings need; so a single very large case makes the spacing coarser for all. The batch size is nnU-Net's
    too: two, or more where memory is left, up to 5 % of the voxels of all cases; two where nnU-Net's cube is too short.

    Args:
        planner: has the memory target, the settings of the network and the fingerprint.
        fullres: its plan of 3d_fullres.
        transpose_forward: the axes of the images in the order of the plan.

    Returns:
        The configuration as it stands in a plans file; "median_image_size_in_voxels" is the median at its spacing.
    """
    axes = list(transpose_forward)
    shapes = np.vstack(planner.dataset_fingerprint["shapes_after_crop"])[:, axes]
    spacings = np.vstack(planner.dataset_fingerprint["spacings"])[:, axes]
    fits: dict[tuple, bool] = {}
    spacing = np.array(fullres["spacing"], dtype=float)
    while True:
        resampled = resampled_shapes(shapes, spacings, spacing)
        patch_size, architecture = network_for_volume(planner, resampled.max(axis=0), spacing, fullres["architecture"])
        key = (*patch_size, architecture["arch_kwargs"]["strides"])
        if key not in fits:
            fits[key] = fits_memory(planner, patch_size, architecture)
        if fits[key]:
            break
        spacing = coarser_spacing(spacing)
    median_shape = np.median(resampled, axis=0)
    plan = planner.get_plans_for_configuration(
        spacing,
        tuple(int(size) for size in resampled.max(axis=0)),
        planner.generate_data_identifier(ATLAS_CONFIGURATION),
        float(np.prod(median_shape) * planner.dataset_json["numTraining"]),
        {},
    )
    if tuple(plan["patch_size"]) != patch_size:  # cut off by nnU-Net's cube
        plan.update(patch_size=patch_size, architecture=architecture, batch_size=planner.UNet_min_batch_size)
    plan["median_image_size_in_voxels"] = median_shape
    plan["batch_dice"] = False  # as in other configurations whose patch shows most of an image
    return plan


def resampled_shapes(shapes: np.ndarray, spacings: np.ndarray, target_spacing: np.ndarray) -> np.ndarray:
    """Shapes in voxels, (N, 3), that preprocessing makes of volumes with these shapes (voxels) and spacings (mm)."""
    resampled = [
        compute_new_shape(shape, spacing, target_spacing) for shape, spacing in zip(shapes, spacings, strict=True)
    ]
    return np.maximum(resampled, 1)


def coarser_spacing(spacing: np.ndarray) -> np.ndarray:
    """Spacing (mm), 3 % coarser along the axes that are finer than half the coarsest; along all where none is."""
    finer = spacing.max() / spacing > SIMILAR_SPACING
    return np.where(finer if finer.any() else True, spacing * SPACING_STEP, spacing)


def network_for_volume(
    planner: ExperimentPlanner, shape: np.ndarray, spacing: np.ndarray, architecture: dict
) -> tuple[tuple[int, ...], dict]:
    """Patch size in voxels, at least `shape`, and the network that nnU-Net builds for such a patch.

    Args:
        planner: has the settings of the network.
        shape: of the volume, voxels.
        spacing: mm.
        architecture: of another configuration for 3D images; only what depends on the patch is replaced.
    """
    _, strides, kernel_sizes, patch_size, _ = get_pool_and_conv_props(
        spacing, shape, planner.UNet_featuremap_min_edge_length, MAX_POOLINGS
    )
    stages = len(strides)
    features = [planner.UNet_base_num_features * 2**stage for stage in range(stages)]
    adapted = deepcopy(architecture)
    adapted["arch_kwargs"].update(
        n_stages=stages,
        kernel_sizes=kernel_sizes,
        strides=strides,
        features_per_stage=tuple(min(planner.UNet_max_features_3d, number) for number in features),
        n_conv_per_stage=planner.UNet_blocks_per_stage_encoder[:stages],
        n_conv_per_stage_decoder=planner.UNet_blocks_per_stage_decoder[: stages - 1],
    )
    return tuple(int(size) for size in patch_size), adapted


def fits_memory(planner: ExperimentPlanner, patch_size: tuple[int, ...], architecture: dict) -> bool:
    """Whether nnU-Net's estimate for a batch of two such patches is within the planner's memory target."""
    estimate = planner.static_estimate_VRAM_usage(
        patch_size,  # type: ignore[arg-type]
        num_channels(planner.dataset_json),
        len(planner.dataset_json["labels"]),
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
    )
    share_of_reference = planner.UNet_vram_target_GB / planner.UNet_reference_val_corresp_GB
    estimate_of_two = estimate / planner.UNet_reference_val_corresp_bs_3d * JUDGED_BATCH_SIZE
    return estimate_of_two <= planner.UNet_reference_val_3d * share_of_reference
