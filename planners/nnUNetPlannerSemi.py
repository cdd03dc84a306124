"""Experiment planner for semi-supervised training."""

from __future__ import annotations

import os

import numpy as np
import torch
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunetv2_semi.data.dataset_json import read_dataset_json
from nnunetv2_semi.data.dataset_settings import named_channels, read_dataset_settings
from nnunetv2_semi.data.raw_checks import check_case_names
from nnunetv2_semi.planning.foundation import batch_beside_foundation
from nnunetv2_semi.planning.geometry import unlabelled_geometry
from nnunetv2_semi.planning.whole_volumes import ATLAS_CONFIGURATION, plan_whole_volumes
from nnunetv2_semi.processes.pool import default_processes


class nnUNetPlannerSemi(ExperimentPlanner):
    """nnU-Net's planner: patch and batch size are those of nnU-Net's own planner for the same memory target.

    The forward passes of a step then run one after another. With "semi": {"plan_joined_passes": true} in dataset.json
    they fit the memory target together, in smaller patches or batches: one pass of the labelled and one of the
    unlabelled batch, for each modality that dataset.json names under "semi": {"modalities": ...}. Each configuration
    says how many passes the memory target holds at once: "semi": {"planned_graphs": N}, 1 by default.

    With "semi": {"plan_with_unlabelled": true} in dataset.json, shapes and spacings of unlabelled cases count like
    those of labelled ones; intensity statistics come from labelled foreground in any case.

    With "semi": {"plan_with_foundation": 512} in dataset.json, batches of 2D configurations are so small that SAM's
    ViT-B with inputs of that many pixels a side, which the plan then asks for, trains beside the network within the
    memory target.

    Data sets of 3D images get one configuration more, 3d_atlas: its patch holds the whole volume of the largest case
    along each axis, at the finest spacing that fits the memory target (see `nnunetv2_semi.planning.whole_volumes`).
    Unlabelled cases count only with "plan_with_unlabelled"; without it, one of them may be larger than the patch.

    Args:
        dataset_name_or_id: as for nnU-Net's planner.
        gpu_memory_target_in_gb: as for nnU-Net's planner; of all passes together with "plan_joined_passes".
        preprocessor_name: nnU-Net's default one is replaced by the one that prepares unlabelled cases too.
        plans_name: of the plans file.
        overwrite_target_spacing: mm, of 3d_fullres.
        suppress_transpose: keep the axes in the order of the images.

    Raises:
        UserError: mistakes in dataset.json, images or names of cases that cannot be used (see `check_case_names`), or
            no memory for two patches beside a foundation model.
    """

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = 8,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str = "nnUNetSemiPlans",
        overwrite_target_spacing: list[float] | tuple[float, ...] | None = None,
        suppress_transpose: bool = False,
    ) -> None:
        if preprocessor_name == "DefaultPreprocessor":
            preprocessor_name = "nnUNetPreprocessorSemi"
        raw_dataset_folder = os.path.join(nnUNet_raw, maybe_convert_to_dataset_name(dataset_name_or_id))
        dataset_json_file = os.path.join(raw_dataset_folder, "dataset.json")
        dataset_json = read_dataset_json(dataset_json_file)
        preprocessed_dataset_folder = os.path.join(nnUNet_preprocessed, os.path.basename(raw_dataset_folder))
        check_case_names(raw_dataset_folder, preprocessed_dataset_folder, dataset_json)
        settings = read_dataset_settings(dataset_json, dataset_json_file)
        super().__init__(
            dataset_name_or_id,
            gpu_memory_target_in_gb,
            preprocessor_name,
            plans_name,
            overwrite_target_spacing,  # type: ignore[arg-type]
            suppress_transpose,
        )
        self.passes_of_a_step = 2 * (len(settings.modalities) if settings.modalities else 1)
        self.planned_graphs = self.passes_of_a_step if settings.plan_joined_passes else 1
        self.UNet_vram_target_GB = gpu_memory_target_in_gb / self.planned_graphs
        self.gpu_memory_target_in_gb, self.foundation_size = gpu_memory_target_in_gb, settings.plan_with_foundation
        if settings.plan_with_unlabelled:
            self._add_unlabelled_geometry()

    @staticmethod
    def static_estimate_VRAM_usage(
        patch_size: tuple[int, ...],
        input_channels: int,
        output_channels: int,
        arch_class_name: str,
        arch_kwargs: dict,
        arch_kwargs_req_import: tuple[str, ...],
    ) -> int:
        """Number of feature map entries of one network, as nnU-Net counts them.

        nnU-Net's own method sets the number of threads from nnUNet_n_proc_DA, and fails where that is 0.
        """
        with torch.device("meta"):  # the count needs no weights, and making them would take most of the planning
            network = get_network_from_plans(
                arch_class_name, arch_kwargs, arch_kwargs_req_import, input_channels, output_channels, allow_init=False
            )
        return int(network.compute_conv_feature_map_size(patch_size))

    def get_plans_for_configuration(
        self,
        spacing: np.ndarray | tuple[float, ...] | list[float],
        median_shape: np.ndarray | tuple[int, ...],
        data_identifier: str,
        approximate_n_voxels_dataset: float,
        _cache: dict,
    ) -> dict:
        """nnU-Net's plan of one configuration, with the object "semi"."""
        plan = super().get_plans_for_configuration(
            spacing,  # type: ignore[arg-type]
            median_shape,  # type: ignore[arg-type]
            data_identifier,
            approximate_n_voxels_dataset,
            _cache,
        )
        plan["semi"] = self.semi_settings()
        if self.foundation_size is not None and len(plan["patch_size"]) == 2:
            joined = 2 if self.planned_graphs > 1 else 0  # passes of the foundation model
            plan["batch_size"] = self._batch_beside_foundation(plan, self.foundation_size, max(joined, 1))
            plan["semi"] |= {"planned_graphs": self.planned_graphs + joined,
                             "SynFoC": {"image_size": self.foundation_size}}
        return plan

    def _batch_beside_foundation(self, plan: dict, image_size: int, passes: int) -> int:
        """See `batch_beside_foundation`."""
        return batch_beside_foundation(plan["batch_size"], self._gb_of_a_2d_patch(plan) * self.planned_graphs,
                                       self.gpu_memory_target_in_gb, image_size, passes=passes)

    def _gb_of_a_2d_patch(self, plan: dict) -> float:
        """Memory of a forward pass of one patch, as nnU-Net estimates it."""
        arch = plan["architecture"]
        estimate = self.static_estimate_VRAM_usage(
            plan["patch_size"], len(named_channels(self.dataset_json)), len(self.dataset_json["labels"]),
            arch["network_class_name"], arch["arch_kwargs"], arch["_kw_requires_import"])
        return estimate / self.UNet_reference_val_2d * self.UNet_reference_val_corresp_GB \
            / self.UNet_reference_val_corresp_bs_2d

    def semi_settings(self) -> dict[str, object]:
        """The object "semi" of each configuration."""
        return {"planned_graphs": self.planned_graphs}

    def save_plans(self, plans: dict) -> None:
        """nnU-Net's last step of planning, before which 3D data sets get the configuration 3d_atlas.

        Here and not after `plan_experiment`, because saving merges in what an older plans file has.
        """
        configurations = plans["configurations"]
        if "3d_fullres" in configurations and ATLAS_CONFIGURATION not in configurations:
            plan = plan_whole_volumes(self, configurations["3d_fullres"], plans["transpose_forward"])
            configurations[ATLAS_CONFIGURATION] = plan
            print(f"{ATLAS_CONFIGURATION} U-Net configuration:\n{plan}\n")
        super().save_plans(plans)

    def _add_unlabelled_geometry(self) -> None:
        """Extend the fingerprint in memory; the file keeps what nnU-Net wrote."""
        reader_name = self.determine_reader_writer().__name__
        shapes, spacings = unlabelled_geometry(
            self.raw_dataset_folder, self.dataset_json, reader_name, num_processes=default_processes()
        )
        print(f'"plan_with_unlabelled": shapes and spacings of {len(shapes)} unlabelled cases enter the plan')
        self.dataset_fingerprint["shapes_after_crop"] = [*self.dataset_fingerprint["shapes_after_crop"], *shapes]
        self.dataset_fingerprint["spacings"] = [*self.dataset_fingerprint["spacings"], *spacings]
