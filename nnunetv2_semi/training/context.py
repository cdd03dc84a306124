"""What a method is told of the training that it is part of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnunetv2_semi.losses.weighted_dice_ce import WeightedDiceCE
from nnunetv2_semi.methods.arrangement import Arrangement
from nnunetv2_semi.methods.contract import Context
from nnunetv2_semi.training import labelled_cases

if TYPE_CHECKING:
    from nnunetv2_semi.trainer import nnUNetTrainerSemi


def build_context(trainer: nnUNetTrainerSemi) -> Context:
    """The `Context` of a trainer whose loss is built.

    Raises NotImplementedError for the second stage of a cascade, where the method needs unlabelled cases.
    """
    if trainer.is_cascaded and trainer.method_class.uses_unlabelled:
        raise NotImplementedError(
            f"{trainer.configuration_name} is the second stage of a cascade: it takes the first stage's predictions "
            "as input, and unlabelled cases have none. Train 3d_fullres or 2d with this trainer, or the cascade "
            "with nnUNetTrainerSemiSupervised.")
    labels, plan, settings = trainer.label_manager, trainer.configuration_manager, trainer.settings
    scale_weights = tuple(float(weight) for weight in getattr(trainer.loss, "weight_factors", (1.0,)))
    rotation, in_plane, _, mirror_axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    return Context(
        supervised_loss=lambda output, target: trainer.loss(output, target),
        weighted_loss=WeightedDiceCE(labels.has_regions, scale_weights, plan.batch_dice, trainer.is_ddp),
        regions=labels.has_regions, ignore_label=labels.ignore_label, spacing=tuple(plan.spacing),
        modalities=trainer.modalities,
        arrangement=Arrangement.of(settings, trainer.method_class.graphs(settings)),
        scale_weights=scale_weights, patch_size=tuple(plan.patch_size), image_size=_image_size(trainer),
        num_channels=trainer.num_input_channels, num_heads=labels.num_segmentation_heads,
        training_cases=lambda: labelled_cases.whole_training_cases(trainer, trainer.modalities),
        mirror_axes=tuple(mirror_axes or ()), rotation=float(max(rotation)), turned_in_plane=bool(in_plane),
        masked_channels=tuple(channel for channel, masked in enumerate(plan.use_mask_for_norm) if masked),
        connected_classes=lambda: labelled_cases.connected_classes(trainer))


def _image_size(trainer: nnUNetTrainerSemi) -> tuple[float, ...]:
    """See ``Context.image_size``."""
    plan = trainer.configuration_manager.configuration
    size = [float(axis) for axis in plan.get("median_image_size_in_voxels", plan["patch_size"])]
    whole = [float(axis) for axis in trainer.plans_manager.original_median_shape_after_transp]
    return tuple(size if len(size) == len(whole) or whole[0] == 1 else [whole[0], *size])
