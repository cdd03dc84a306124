"""Experiment planner for machines without a GPU."""

from __future__ import annotations

import numpy as np

from nnunetv2_semi.planning.whole_volumes import SPACING_STEP

from .nnUNetPlannerSemi import nnUNetPlannerSemi

_MAX_PATCH_VOXELS_3D = 40**3
_MAX_PATCH_VOXELS_2D = 96**2
# 2D images of more than so many voxels are made coarser, so that a patch of at most 128^2 holds the whole image.
_MAX_IMAGE_VOXELS_2D = 4 * _MAX_PATCH_VOXELS_2D
_MAX_WHOLE_IMAGE_VOXELS_2D = 128**2
_BATCH_SIZE_3D = 2
_BATCH_SIZE_2D = 8
_MOST_PASSES = 6  # of RCPS: no method holds more at once, but those that hold some per modality


class nnUNetPlannerSemiCPU(nnUNetPlannerSemi):
    """A small preset for demonstration, teaching and tests: few features, small patches, short training.

    Patches have at most 40^3 voxels (3D) or 96^2 (2D), shaped by spacing and image size as nnU-Net does; 3d_atlas has
    the finest spacing at which the largest volume, padded, has no more. There is no 3d_lowres and no cascade. The
    memory target does not matter, so the plan is always for joined forward passes.

    In configuration 2d, a median image of more than 4 x 96^2 voxels gets a coarser spacing, by the same factor on both
    axes, at which one patch of at most 128^2 voxels holds the whole image. A patch of 96^2 would show too little of it.
    Predictions still have the size of the original images.

    Args:
        dataset_name_or_id: as for nnU-Net's planner.
        gpu_memory_target_in_gb: ignored.
        preprocessor_name: see `nnUNetPlannerSemi`.
        plans_name: of the plans file.
        overwrite_target_spacing: mm, of 3d_fullres.
        suppress_transpose: keep the axes in the order of the images.

    Raises:
        UserError: see `nnUNetPlannerSemi`.
    """

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = 8,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str = "nnUNetSemiCPUPlans",
        overwrite_target_spacing: list[float] | tuple[float, ...] | None = None,
        suppress_transpose: bool = False,
    ) -> None:
        super().__init__(
            dataset_name_or_id,
            gpu_memory_target_in_gb,
            preprocessor_name,
            plans_name,
            overwrite_target_spacing,
            suppress_transpose,
        )
        self.UNet_base_num_features = 8
        self.UNet_max_features_2d = 64
        self.UNet_max_features_3d = 64
        self.UNet_blocks_per_stage_encoder = (1,) + (2,) * 13
        self.UNet_blocks_per_stage_decoder = (1,) * 13
        self.lowres_creation_threshold = 0.0
        self.planned_graphs = max(self.passes_of_a_step, _MOST_PASSES)
        # nnU-Net shrinks the patch until its cost for a batch of two is below a reference. Here cost is the number of
        # voxels (see static_estimate_VRAM_usage), so the reference is the largest number allowed.
        self.UNet_vram_target_GB = self.UNet_reference_val_corresp_GB
        self.UNet_reference_val_3d = _MAX_PATCH_VOXELS_3D
        self.UNet_reference_val_2d = _MAX_PATCH_VOXELS_2D
        self.UNet_reference_val_corresp_bs_3d = 2
        self.UNet_reference_val_corresp_bs_2d = 2

    @staticmethod
    def static_estimate_VRAM_usage(
        patch_size: tuple[int, ...],
        input_channels: int,
        output_channels: int,
        arch_class_name: str,
        arch_kwargs: dict,
        arch_kwargs_req_import: tuple[str, ...],
    ) -> int:
        """Number of voxels of the patch: what limits this preset is time, not memory."""
        return int(np.prod(patch_size))

    def _batch_beside_foundation(self, plan: dict, image_size: int, passes: int) -> int:
        """The network's own: there is no memory target, and the batch has one size."""
        return int(plan["batch_size"])

    def get_plans_for_configuration(
        self,
        spacing: np.ndarray | tuple[float, ...] | list[float],
        median_shape: np.ndarray | tuple[int, ...],
        data_identifier: str,
        approximate_n_voxels_dataset: float,
        _cache: dict,
    ) -> dict:
        """The plan of one configuration, with a fixed batch size; in 2D at a coarser spacing where images are large."""
        if len(spacing) == 2 and np.prod(median_shape) > _MAX_IMAGE_VOXELS_2D:
            plan = self._plan_of_whole_images(
                np.array(spacing), median_shape, data_identifier, approximate_n_voxels_dataset, _cache
            )
        else:
            plan = super().get_plans_for_configuration(
                spacing, median_shape, data_identifier, approximate_n_voxels_dataset, _cache
            )
        plan["batch_size"] = _BATCH_SIZE_2D if len(spacing) == 2 else _BATCH_SIZE_3D
        return plan

    def _plan_of_whole_images(
        self,
        spacing: np.ndarray,
        median_shape: np.ndarray | tuple[int, ...],
        data_identifier: str,
        approximate_n_voxels_dataset: float,
        _cache: dict,
    ) -> dict:
        """The 2D plan with the finest spacing at which one patch holds the median image, in steps of 3 %."""
        self.UNet_reference_val_2d = _MAX_WHOLE_IMAGE_VOXELS_2D
        factor = float(np.sqrt(np.prod(median_shape) / _MAX_WHOLE_IMAGE_VOXELS_2D))
        while True:
            shape = tuple(max(1, round(size / factor)) for size in median_shape)
            plan = super().get_plans_for_configuration(
                spacing * factor, shape, data_identifier, approximate_n_voxels_dataset / factor**2, _cache
            )
            if all(side >= size for side, size in zip(plan["patch_size"], shape, strict=True)):
                break
            factor *= SPACING_STEP  # too large for one patch once padded as the network's poolings need
        self.UNet_reference_val_2d = _MAX_PATCH_VOXELS_2D
        return plan

    def semi_settings(self) -> dict[str, object]:
        """The object "semi" of each configuration, with a training short enough for a CPU.

        nnU-Net's momentum of 0.99 averages 100 steps, too slow for a training of some hundred: 0.9 with ten times the
        learning rate makes steps of the same size that set in ten times sooner.
        """
        return {
            **super().semi_settings(),
            "num_epochs": 50,
            "num_iterations_per_epoch": 50,
            "num_val_iterations_per_epoch": 8,
            "initial_lr": 0.1,
            "momentum": 0.9,
        }
