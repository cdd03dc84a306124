"""RCPS: views of an image learn from its original version, and their voxels are contrasted with those of other images.

Source: Zhao et al., "RCPS: rectified contrastive pseudo supervision for semi-supervised medical image segmentation",
IEEE JBHI 2023, arXiv 2301.05500.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn

from nnunetv2_semi.data.mixing import CutMix
from nnunetv2_semi.data.views import IntensityViews
from nnunetv2_semi.losses.predictions import Logits, all_scales, class_codes, full_resolution, probabilities
from nnunetv2_semi.losses.rectified_pseudo_supervision import (
    PseudoTarget,
    cosine_consistency,
    divergence,
    rectified_pseudo_supervision,
    two_class_logits,
)
from nnunetv2_semi.losses.voxel_contrast import Voxels, unit_rows, voxel_contrast
from nnunetv2_semi.methods.base import Batch, Context, Method, Term
from nnunetv2_semi.methods.settings import Settings as BaseSettings
from nnunetv2_semi.networks.decoder_features import ProjectedFeatures
from nnunetv2_semi.networks.memory_bank import VoxelBank

_VIEWS = 2


@dataclass(frozen=True)
class RCPSSettings(BaseSettings):
    """Rectified pseudo supervision: pseudo_weight (alpha; the paper's 0.1 for the left atrium, 0.2 elsewhere, beside
    half of nnU-Net's loss), rectify (weigh by e^-D and minimise D), sharpening (temperature of the pseudo-label),
    consistency (cosine of the views), cutmix (sides of the box of the next unlabelled patch in the views, fraction of
    the patch's; the paper has none: 0).
    Contrast: contrast (have it at all), contrast_weight (beta), contrast_temperature, num_negatives, bidirectional,
    negatives ("confident", or "random" ones of another class), max_anchors (voxels a stream that are anchors, drawn
    anew each step; None: all), negatives_from_all_processes (with several GPUs), buffer_steps (earlier steps whose
    negatives are kept), projection_channels, projection_resolution (patch voxels per feature voxel along an axis).
    Views: view_gamma (the paper's: 0), view_scale, view_shift, view_noise, view_noise_probability (see
    `IntensityViews.draw`), view_shift_by ("std", or the paper's "mean", which does nothing to z-scored images).
    ramp_fraction: share of training over which both weights ramp up (the paper's: 1).
    """

    pseudo_weight: float = 0.5
    rectify: bool = True
    sharpening: float = 0.5
    consistency: bool = True
    cutmix: float = 0.5
    contrast: bool = True
    contrast_weight: float = 0.1
    contrast_temperature: float = 0.1
    num_negatives: int = 400
    bidirectional: bool = True
    negatives: Literal["confident", "random"] = "confident"
    max_anchors: int | None = None
    negatives_from_all_processes: bool = False
    buffer_steps: int = 0
    projection_channels: int = 64
    projection_resolution: int = 4
    view_gamma: float = 1.0
    view_scale: float = 0.5
    view_shift: float = 0.5
    view_shift_by: Literal["std", "mean"] = "std"
    view_noise: float = 0.1
    view_noise_probability: float = 0.5
    ramp_fraction: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.fractions("cutmix", "view_noise_probability")
        self.positive("sharpening", "contrast_temperature")
        self.at_least(1, "num_negatives", "projection_channels", "projection_resolution")
        self.at_least(0, "pseudo_weight", "contrast_weight", "buffer_steps", "view_gamma", "view_scale", "view_shift",
                      "view_noise", "ramp_fraction")
        self.require("max_anchors", self.max_anchors is None or self.max_anchors >= 1, "at least 1, or null")


@dataclass(frozen=True)
class _Versions:
    """A stream's logits for the original version of its patches and for the views; features in this order, or none.

    probability: of the original version at full resolution, without a graph.
    """

    original: Logits
    probability: torch.Tensor
    views: list[Logits]
    features: list[torch.Tensor]

    def mixed(self, mixing: CutMix) -> _Versions:
        """Where the views are of mixed patches: what the originals give, mixed as these."""
        return _Versions(mixing.of(self.original), mixing.of(self.probability), self.views,
                         [mixing.of(self.features[0]), *self.features[1:]] if self.features else [])


class RCPS(Method):
    """Supervised loss + w(t) (alpha L_rp + beta L_bc), both over labelled and unlabelled patches."""

    name: ClassVar[str] = "RCPS"
    Settings: ClassVar[type[BaseSettings]] = RCPSSettings
    settings: RCPSSettings

    def __init__(self, student: nn.Module, settings: RCPSSettings, context: Context) -> None:
        super().__init__(student, settings, context)
        self.projected = ProjectedFeatures(student, settings.projection_resolution, settings.projection_channels) \
            if settings.contrast else None
        # of the labelled and of the unlabelled stream, in this order
        self.banks = nn.ModuleList(VoxelBank(settings.buffer_steps, settings.num_negatives) for _ in range(2))
        self._new_voxels: list[Voxels] = []

    @classmethod
    def graphs(cls, settings: BaseSettings) -> int:
        return 2 * (1 + _VIEWS)

    def called_networks(self) -> list[nn.Module]:
        return [self.student] if self.projected is None else [self.student, self.projected]

    # loss

    def loss(self, batch: Batch) -> Iterator[list[Term]]:
        labelled, unlabelled = self._outputs(batch)
        terms = [self.supervised(labelled.original, batch.target)]
        self.note_agreement(unlabelled.probability, self._probability(unlabelled.views[0]))
        settings = self.settings
        pseudo = self._pseudo_supervision(labelled) + self._pseudo_supervision(unlabelled)
        terms.append(Term("pseudo_supervision", pseudo,
                          self.unlabelled_weight(settings.pseudo_weight, settings.ramp_fraction)))
        if settings.contrast:
            terms.append(Term("contrast", self._contrast(labelled, unlabelled),
                              self.unlabelled_weight(settings.contrast_weight, settings.ramp_fraction)))
        yield terms

    def _outputs(self, batch: Batch) -> tuple[_Versions, _Versions]:
        mixing = CutMix.draw(batch.unlabelled, self.settings.cutmix)
        images = [batch.labelled, *self._views(_VIEWS, batch.labelled),
                  batch.unlabelled, *self._views(_VIEWS, mixing.of(batch.unlabelled))]
        network = self.student if self.projected is None else self.projected
        outputs = list(self.passes(network, *images, together=True))
        streams = []
        for versions in (outputs[:1 + _VIEWS], outputs[1 + _VIEWS:]):
            logits = versions if self.projected is None else [single for single, _ in versions]
            features = [] if self.projected is None else [single for _, single in versions]
            streams.append(_Versions(logits[0], self._probability(logits[0]), logits[1:], features))
        return streams[0], streams[1].mixed(mixing)

    def _probability(self, output: Logits) -> torch.Tensor:
        with torch.no_grad():
            return probabilities(output, self.context.regions)

    def _views(self, number: int, image: torch.Tensor) -> torch.Tensor:
        """Intensity views (number, B, C, *spatial) of ``image`` (B, C, *spatial)."""
        settings = self.settings
        drawn = IntensityViews.draw(number, image, settings.view_scale, settings.view_shift, settings.view_noise,
                                    settings.view_noise_probability, settings.view_gamma)
        return drawn.apply(image, settings.view_shift_by)

    def _pseudo_supervision(self, versions: _Versions) -> torch.Tensor:
        """L_rp = L_urp(view 1) + L_urp(view 2) + L_cr, summed over the network's outputs with nnU-Net's weights."""
        total: torch.Tensor | float = 0.0
        views = [all_scales(view) for view in versions.views]
        originals, settings = all_scales(versions.original), self.settings
        for scale, (weight, original) in enumerate(zip(self.context.scale_weights, originals, strict=True)):
            if weight == 0:
                continue
            target = PseudoTarget.from_logits(self._softmax_logits(original), settings.sharpening)
            logits = [self._softmax_logits(view[scale]) for view in views]
            losses = [rectified_pseudo_supervision(view, target, settings.rectify) for view in logits]
            loss = torch.stack(losses).sum()
            if settings.consistency:
                # The cosine of a region's two-class logits (a, 0) knows the sign of a alone: take probabilities.
                first, second = (view.softmax(1) for view in logits) if self.context.regions else logits
                loss = loss + cosine_consistency(first, second)
            total = total + weight * loss
        return torch.as_tensor(total)

    def _softmax_logits(self, logits: torch.Tensor) -> torch.Tensor:
        return two_class_logits(logits) if self.context.regions else logits

    def _contrast(self, labelled: _Versions, unlabelled: _Versions) -> torch.Tensor:
        """L_bc of both streams; each takes its negatives from the other one's original version."""
        settings = self.settings
        voxels = [self._voxels(versions) for versions in (labelled, unlabelled)]
        self._new_voxels = voxels
        total: torch.Tensor | float = 0.0
        for stream, versions in enumerate((labelled, unlabelled)):
            negatives = voxels[1 - stream]
            if settings.negatives_from_all_processes:
                gathered = self.context.rows_of_all_processes
                negatives = Voxels(gathered(negatives.features), gathered(negatives.classes),
                                   gathered(negatives.confidence))
            bank = self.banks[1 - stream]
            assert isinstance(bank, VoxelBank)
            negatives = bank.joined_with(negatives)
            if settings.negatives == "random":
                negatives = Voxels(negatives.features, negatives.classes, torch.rand_like(negatives.confidence))
            classes, views = voxels[stream].classes, [unit_rows(features) for features in versions.features[1:]]
            if settings.max_anchors is not None and len(classes) > settings.max_anchors:
                anchors = torch.randperm(len(classes))[:settings.max_anchors].to(classes.device)
                classes, views = classes[anchors], [view[anchors] for view in views]
            total = total + voxel_contrast(views[0], views[1], classes, negatives, settings.num_negatives,
                                           settings.contrast_temperature, settings.bidirectional)
        return torch.as_tensor(total)

    def _voxels(self, versions: _Versions) -> Voxels:
        """Feature voxels of a stream's original version, with the class and certainty of its prediction."""
        features = versions.features[0]
        pool: Callable = F.adaptive_avg_pool2d if features.ndim == 4 else F.adaptive_avg_pool3d
        classes, confidence = class_codes(pool(versions.probability, features.shape[2:]), self.context.regions)
        return Voxels.of(features, classes, confidence)

    # after a step

    def after_step(self) -> None:
        if self.settings.buffer_steps:
            for bank, voxels in zip(self.banks, self._new_voxels, strict=True):
                assert isinstance(bank, VoxelBank)
                bank.add(voxels)
        self._new_voxels = []

    # pictures

    def picture(self, image: torch.Tensor) -> tuple[dict[str, Logits], dict[str, torch.Tensor]]:
        """The pseudo-label, what a view makes of it, and e^-D between them: how much a voxel's pseudo-label counts."""
        original, view = self.student(image), self.student(self._views(1, image)[0])
        first, second = (self._softmax_logits(full_resolution(output)) for output in (original, view))
        certainty = torch.exp(-divergence(second, PseudoTarget.from_logits(first)))
        # of regions the least certain one
        return {"pseudo-label": original, "prediction of a view": view}, {"e^-D": certainty.amin(0, keepdim=True)}
