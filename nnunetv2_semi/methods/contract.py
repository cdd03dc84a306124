"""What the trainer and a method tell each other: batches, terms of the loss, and what the trainer knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from nnunetv2_semi.data.whole_case import WholeCase
from nnunetv2_semi.losses.predictions import Logits
from nnunetv2_semi.methods.arrangement import Arrangement

Target = torch.Tensor | list[torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """One step's patches on the training device.

    labelled: (B, C, *spatial). target: nnU-Net's target, a list with deep supervision.
    unlabelled: (B_u, C, *spatial); an empty tensor for methods that need none.
    labelled_present, unlabelled_present: bool (B, modalities) and (B_u, modalities) on the CPU, which modalities (in
    the order of ``Context.modalities``) the case of each patch has; None: all.
    """

    labelled: torch.Tensor
    target: Target
    unlabelled: torch.Tensor
    labelled_present: torch.Tensor | None = None
    unlabelled_present: torch.Tensor | None = None


@dataclass(frozen=True)
class Term:
    """One named part of the loss: ``weight * value`` is minimised, ``value`` and ``weight`` are logged.

    value: a scalar with a graph. supervised: it comes from labelled voxels; other terms are left out of a step in which
    they are not finite. patches: of so many patches of the step ``value`` is a mean, so that of several processes each
    counts by its number, and one that has none for nothing; None: each counts alike. Whether it is None must not differ
    between processes.
    """

    name: str
    value: torch.Tensor
    weight: float = 1.0
    supervised: bool = False
    patches: int | None = None

    @property
    def applies(self) -> bool:
        """Whether a patch of the step is of its kind."""
        return self.patches != 0


@dataclass(frozen=True, kw_only=True)
class Context:
    """What the trainer tells a method.

    supervised_loss: nnU-Net's loss of (logits, target), deep supervision included. weighted_loss: the same of (logits,
    labels, weight of each voxel), see `WeightedDiceCE`. regions: region-based labels.
    spacing: of the configuration, mm per axis of a patch. modalities: name -> channels. arrangement: of a step's
    passes.
    scale_weights: of the network's outputs in nnU-Net's loss, finest first; (1.0,) without deep supervision.
    patch_size: voxels per axis. image_size: median of the images, voxels of the configuration's spacing; three axes
    where patches are slices of 3D images. num_channels: of the images. num_heads: channels of the logits.
    training_cases: the fold's labelled training cases, in alphabetical order, read one by one. mirror_axes: spatial
    axes of a patch that may be mirrored, from 0. rotation: nnU-Net's largest angle about each axis, radians.
    turned_in_plane: in 3D nnU-Net turns and scales patches within the last two axes alone. masked_channels: those that
    are 0 outside of what nnU-Net normalised ("use_mask_for_norm" in the plans), in augmented patches too.
    connected_classes: foreground labels, as (0, label), or regions, as (region from 0, 1), that are one connected
    component in every labelled training case (in 2D in every slice) that has them, and in one without the ignore
    label; reads their labels.
    """

    supervised_loss: Callable[[Logits, Target], torch.Tensor]
    weighted_loss: Callable[[Logits, torch.Tensor, torch.Tensor], torch.Tensor]
    regions: bool
    ignore_label: int | None
    spacing: tuple[float, ...]
    modalities: dict[str, list[int]]
    arrangement: Arrangement
    scale_weights: tuple[float, ...]
    patch_size: tuple[int, ...]
    image_size: tuple[float, ...]
    num_channels: int
    num_heads: int
    training_cases: Callable[[], Iterator[WholeCase]]
    mirror_axes: tuple[int, ...]
    rotation: float
    turned_in_plane: bool
    masked_channels: tuple[int, ...]
    connected_classes: Callable[[], frozenset[tuple[int, int]]]
