"""MASS: images of one modality each; labelled ones are atlases whose labels are warped onto the others.

Source: Chen et al., "MASS: Modality-collaborative semi-supervised segmentation by exploiting cross-modal consistency
from unpaired CT and MRI images", Medical Image Analysis 80, 2022, 102506.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunetv2_semi.data.atlas_choice import aligned_atlases, chosen_atlases
from nnunetv2_semi.losses.channel_contrast import channel_contrast
from nnunetv2_semi.losses.displacement_smoothness import displacement_smoothness
from nnunetv2_semi.losses.local_ncc import local_ncc_map
from nnunetv2_semi.losses.predictions import Logits, full_resolution, probabilities
from nnunetv2_semi.losses.soft_labels import soft_dice_loss, weighted_soft_cross_entropy
from nnunetv2_semi.methods.base import Method, require_modalities
from nnunetv2_semi.methods.contract import Batch, Context, Term
from nnunetv2_semi.methods.optimization import Optimization
from nnunetv2_semi.methods.settings import Settings as BaseSettings
from nnunetv2_semi.methods.settings import changed, setting
from nnunetv2_semi.networks.atlas_network import AtlasNetwork, Predict
from nnunetv2_semi.networks.atlases import Atlases
from nnunetv2_semi.networks.channel_tokens import ChannelTokens
from nnunetv2_semi.networks.modality_encoders import Pyramid
from nnunetv2_semi.networks.warp import folded_share, resize_displacement, warp


class MASSSettings(BaseSettings):
    """Settings of MASS."""

    mirroring: bool = changed(BaseSettings, "mirroring", False)
    rotation: float | None = changed(BaseSettings, "rotation", 15.0)
    atlases_per_modality: int = setting(
        5,
        "labelled training cases that become atlases, drawn by the seed; fewer where there are fewer",
        at_least=1,
    )
    align_atlases: bool = setting(
        False,
        "map all atlases affinely to the first one (SimpleITK, mutual information) when they are taken",
    )
    correspondence_lr: float = setting(
        1e-3,
        "initial learning rate of the correspondence head (Adam)",
        above=0, paper=0.0003,
    )
    registration: bool = setting(True, "find correspondences at all; without it unlabelled patches teach nothing")
    ncc_weight: float = setting(
        1.0,
        "of 1 - squared local NCC between a target and its warped same-modality atlas",
        at_least=0, paper=1,
    )
    mse_weight: float = setting(1.0, "of the mean squared difference between them", at_least=0, paper=1)
    smoothness_weight: float = setting(
        5.0,
        "of the squared differences of each displacement between neighbours",
        at_least=0, paper=1,
    )
    semantic_weight: float = setting(
        1.0,
        "of 1 - Dice between the labels warped from an atlas of either modality; the released code's has no "
        "gradient",
        at_least=0, paper=1,
    )
    semantic_moves: Literal["other", "both"] = setting(
        "other",
        "which displacement that term moves: that of the other-modality atlas alone, or of the same-modality "
        "one too",
        paper="both",
    )
    contrast_weight: float = setting(1.0, "of the contrast of feature channels", at_least=0, paper=1)
    contrast_temperature: float = setting(0.1, "of that contrast", above=0)
    contrast_tokens: Literal["normalised", "released"] = setting(
        "normalised",
        "tokens normalised along features, or as in the released code across channels and without a "
        "temperature",
        paper="released",
    )
    contrast_stage: int = setting(1, "decoder stage whose channels are contrasted, 0 the coarsest", at_least=0)
    pseudo_weight: float = setting(
        0.1,
        "of the warped labels as pseudo-labels of the segmentation head, each voxel weighted by its squared "
        "local NCC; [why not 1](results/unpaired.md#why)",
        at_least=0,
    )
    ramp_fraction: float = setting(0.2, "share of training over which `pseudo_weight` ramps up", at_least=0)
    predict: Predict = setting(
        "segmentation",
        "what the deployed network gives: the segmentation head, the fused labels of the atlases, or the mean"
        ' of `"both"`',
        paper="atlas",
    )
    refine: bool = setting(False, "register warped atlases once more in prediction", paper=True)
    skip_finest: int = setting(1, "finest decoder stages at which no correspondence is sought", at_least=0)


@dataclass(frozen=True)
class _Warped:
    """An atlas of each target's, warped onto it: image (B, C, *spatial), one-hot labels (B, K, *spatial), how far they
    are known (B, 1, *spatial) from 0 to 1, displacement (B, axes, *spatial) in voxels, pyramid of the atlas as it was.
    """

    image: torch.Tensor
    labels: torch.Tensor
    known: torch.Tensor
    displacement: torch.Tensor
    pyramid: Pyramid


class MASS(Method):
    """Supervised loss + registration of atlases to unlabelled patches + the warped labels as pseudo-labels."""

    name: ClassVar[str] = "MASS"
    Settings: ClassVar[type[BaseSettings]] = MASSSettings
    settings: MASSSettings
    student: AtlasNetwork

    def __init__(self, student: AtlasNetwork, settings: MASSSettings, context: Context) -> None:
        super().__init__(student, settings, context)
        self.tokens = ChannelTokens(len(context.patch_size)) if settings.contrast_weight > 0 else None

    # networks

    @classmethod
    def build_student(cls, plans_manager: PlansManager, configuration_manager: ConfigurationManager,
                      num_input_channels: int, num_output_channels: int, deep_supervision: bool) -> AtlasNetwork:
        semi = configuration_manager.configuration["semi"]
        networks = cls.build_for_each_modality(plans_manager, configuration_manager, num_output_channels,
                                               deep_supervision)
        own = semi["MASS"]
        return AtlasNetwork(networks, semi["modalities"], Atlases(num_output_channels, semi["regions"]),
                            len(configuration_manager.patch_size), own["predict"], own["refine"], own["skip_finest"])

    @classmethod
    def check(cls, context: Context, settings: BaseSettings) -> list[str]:
        require_modalities(context, "MASS needs images of two or more modalities", '{"CT": [0], "MR": [1]}')
        patch, image = context.patch_size, context.image_size
        patch = (1,) * (len(image) - len(patch)) + patch  # of a slice
        if all(shown >= size for shown, size in zip(patch, image, strict=True)):
            return []
        return [f"patches of {_voxels(patch)} voxels show a part of the median image ({_voxels(image)}). Registration "
                "needs the anatomy that images have in common: expect little of it here, and train 3d_atlas, which "
                "nnUNetv2_plan_and_preprocess -pl nnUNetPlannerSemi plans for 3D images."]

    @classmethod
    def graphs(cls, settings: BaseSettings) -> int:
        return 4  # labelled, unlabelled, and two atlases

    def called_networks(self) -> list[nn.Module]:
        return [self.student.encoders, self.student.correspondence]

    def optimizers(self, initial_lr: float, weight_decay: float, num_epochs: int) -> list[Optimization]:
        """nnU-Net's for encoders and decoder; Adam for the correspondence head and the tokens.

        At nnU-Net's learning rate displacements, which nothing bounds, grow until every voxel lies outside the atlas.
        """
        registration = [*self.student.correspondence.parameters(), *(self.tokens.parameters() if self.tokens else [])]
        learning_rate = self.settings.correspondence_lr
        adam = torch.optim.Adam(registration, learning_rate)
        return [self.sgd(self.student.encoders.parameters(), initial_lr, weight_decay, num_epochs),
                Optimization(adam, PolyLRScheduler(adam, learning_rate, num_epochs))]

    def on_start(self) -> None:
        super().on_start()
        settings, context = self.settings, self.context
        atlases = chosen_atlases(context.training_cases(), list(context.modalities), settings.atlases_per_modality,
                                 settings.seed)
        if settings.align_atlases:
            atlases = list(aligned_atlases(atlases, context.modalities, context.spacing))
        alone = [self.student.only(atlas.case.image[None], atlas.modality)[0] for atlas in atlases]
        self.student.atlases.take(alone, [atlas.case.target for atlas in atlases],
                                  [atlas.modality for atlas in atlases], context.ignore_label,
                                  [atlas.seen for atlas in atlases])

    # loss

    def loss(self, batch: Batch) -> Iterator[list[Term]]:
        labelled = self._with_one_modality(batch.labelled)
        logits, _ = next(self.passes(self.student.encoders, labelled))
        yield [self.supervised(logits if isinstance(batch.target, list) else logits[0], batch.target)]
        if self.settings.registration:
            yield self._registration(self._with_one_modality(batch.unlabelled))

    def _with_one_modality(self, image: torch.Tensor) -> torch.Tensor:
        """``image`` with one of the modalities that each patch has, drawn from torch's global random state."""
        present = self.student.encoders.present_modalities(image)
        chosen = torch.multinomial(present.float().cpu(), 1)[:, 0]
        return self.student.only(image, chosen)

    def _registration(self, target: torch.Tensor) -> list[Term]:
        """The terms of unlabelled patches (B, C, *spatial), each of one modality."""
        settings, regions = self.settings, self.context.regions
        modality = self.student.encoders.modality(target).tolist()
        same, other = self._drawn_atlases(modality)
        atlases = self.student.atlases
        images = [target, atlases.image(same), atlases.image(other)]
        pyramid, *pyramids = self.passes(self.student.encoders, *images, together=True)
        both_move = settings.semantic_moves == "both"
        near, far = (self._warped(pyramid, source, numbers, image, moves)
                     for source, numbers, image, moves in zip(pyramids, (same, other), images[1:], (both_move, True),
                                                              strict=True))
        similarity, difference, trust = self._similarity(near.image, target, modality)
        trust, known = trust * near.known, near.known * far.known
        smoothness = (displacement_smoothness(near.displacement) + displacement_smoothness(far.displacement)) / 2
        terms = [Term("ncc", 1 - similarity, self.unlabelled_weight(settings.ncc_weight)),
                 Term("mse", difference, self.unlabelled_weight(settings.mse_weight)),
                 Term("smoothness", smoothness, self.unlabelled_weight(settings.smoothness_weight)),
                 Term("semantic", soft_dice_loss(far.labels * known, near.labels * known, regions),
                      self.unlabelled_weight(settings.semantic_weight))]
        if self.tokens is not None:
            terms.append(Term("contrast", self._contrast(pyramid, far),
                              self.unlabelled_weight(settings.contrast_weight)))
        logits = full_resolution(pyramid[0])
        probability, pseudo = probabilities(logits, regions), near.labels.detach()
        terms.append(Term("pseudo", weighted_soft_cross_entropy(logits, pseudo, trust, regions)
                          + soft_dice_loss(probability * trust, pseudo * trust, regions),
                          self.unlabelled_weight(settings.pseudo_weight, settings.ramp_fraction)))
        self.note_agreement(pseudo, probability)
        self.metrics["folding"] = folded_share(near.displacement[:1].detach())  # of one patch: it is for the log
        return terms

    def _drawn_atlases(self, modality: Sequence[int]) -> tuple[list[int], list[int]]:
        """For each patch the number of an atlas of its modality, and of one of another modality, drawn from torch's
        global random state of the CPU."""
        own = self.student.atlases.modality.tolist()

        def drawn(wanted: list[int]) -> int:
            return wanted[int(torch.randint(len(wanted), ()))]
        numbers = range(len(own))
        return ([drawn([n for n in numbers if own[n] == index]) for index in modality],
                [drawn([n for n in numbers if own[n] != index]) for index in modality])

    def _warped(self, target: Pyramid, atlas: Pyramid, numbers: Sequence[int], image: torch.Tensor,
                moves: bool) -> _Warped:
        """moves: whether the labels have a gradient to the displacement."""
        displacement = self.student.displacement(target, atlas, image.shape[2:])
        atlases = self.student.atlases
        labels = warp(atlases.one_hot(numbers), displacement if moves else displacement.detach())
        known = warp(atlases.known(numbers), displacement.detach())
        return _Warped(warp(image, displacement), labels, known, displacement, atlas)

    def _similarity(self, warped: torch.Tensor, target: torch.Tensor,
                    modality: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean squared local NCC, mean squared difference, and the squared local NCC (B, 1, *spatial) without a graph.

        Of the channels of each patch's modality.
        """
        maps, differences = [], []
        for row, index in enumerate(modality):
            channels = list(self.context.modalities.values())[index]
            one, other = warped[row:row + 1, channels], target[row:row + 1, channels]
            maps.append(local_ncc_map(one, other).mean(1, keepdim=True))
            differences.append((one - other).square().mean())
        similarity = torch.cat(maps)
        return similarity.mean(), torch.stack(differences).mean(), similarity.detach().clamp(0, 1)

    def _contrast(self, target: Pyramid, atlas: _Warped) -> torch.Tensor:
        """Of the features of the target and the warped ones of the other-modality atlas.

        The features are warped, where the paper's are of the warped image: one pass less.
        """
        stage = min(self.settings.contrast_stage, len(target[1]) - 1)
        features = target[1][stage]
        displacement = resize_displacement(atlas.displacement, features.shape[2:])
        assert self.tokens is not None
        first, second = self.tokens(features), self.tokens(warp(atlas.pyramid[1][stage], displacement))
        return channel_contrast(first, second, self.settings.contrast_temperature, self.settings.contrast_tokens)

    # deployment

    def picture(self, image: torch.Tensor) -> tuple[dict[str, Logits], dict[str, torch.Tensor]]:
        """All predictions, and a grid deformed as the first atlas is to match the patch."""
        network = self.student
        modality = int(network.encoders.modality(image))
        source = network.atlases.image(network.atlases.of_modality(modality)[:1])
        pyramid = network.encoders(network.only(image, modality))
        displacement = network.displacement(pyramid, network.encoders(source), image.shape[2:])
        grid = warp(_grid(image.shape[2:], image.device), displacement)[0]
        return network.predictions(image), {"grid": grid}


def _voxels(sizes: Sequence[float]) -> str:
    return " x ".join(f"{size:.0f}" for size in sizes)


def _grid(shape: Sequence[int], device: torch.device, spacing: int = 4) -> torch.Tensor:
    """White with black lines every ``spacing`` voxels in the plane of the last two axes: (1, 1, *shape)."""
    grid = torch.ones(1, 1, *shape, device=device)
    grid[..., ::spacing] = 0
    grid[..., ::spacing, :] = 0
    return grid
