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

from nnunetv2_semi.data.views import IntensityViews
from nnunetv2_semi.distributed import rows_of_all_processes
from nnunetv2_semi.losses.deep_supervision import summed_over_scales
from nnunetv2_semi.losses.predictions import Logits, all_scales, class_codes, full_resolution, probabilities
from nnunetv2_semi.losses.rectified_pseudo_supervision import (
    PseudoTarget,
    cosine_consistency,
    divergence,
    rectified_pseudo_supervision,
    two_class_logits,
)
from nnunetv2_semi.losses.voxel_contrast import Voxels, unit_rows, voxel_contrast
from nnunetv2_semi.methods.base import Method
from nnunetv2_semi.methods.contract import Batch, Context, Term
from nnunetv2_semi.methods.mixing import CutMix
from nnunetv2_semi.methods.settings import Settings as BaseSettings
from nnunetv2_semi.methods.settings import setting
from nnunetv2_semi.networks.decoder_features import ProjectedFeatures
from nnunetv2_semi.networks.memory_bank import VoxelBank

_VIEWS = 2


class RCPSSettings(BaseSettings):
    """Settings of RCPS."""

    pseudo_weight: float = setting(
        0.5,
        "alpha: of the rectified pseudo supervision; paper: 0.1 for the left atrium, 0.2 for pancreas and "
        "brain injury, beside half of nnU-Net's loss",
        at_least=0, paper=0.1,
    )
    rectify: bool = setting(True, "weigh a voxel's pseudo-label by e^-D, and minimise D")
    sharpening: float = setting(0.5, "temperature of the pseudo-label", above=0)
    consistency: bool = setting(True, "cosine between the logits of the two views")
    cutmix: float = setting(
        0.5,
        "views of unlabelled patches: sides of the box that shows the next one, as a share of the patch's; "
        "`0`: none",
        at_least=0, at_most=1, paper=0,
    )
    contrast: bool = setting(True, "voxel contrast at all; `false` leaves the projection head out too")
    contrast_weight: float = setting(0.1, "beta", at_least=0)
    contrast_temperature: float = setting(0.1, "similarities are divided by it", above=0)
    num_negatives: int = setting(400, "negatives of an anchor; 100 loses little", at_least=1)
    bidirectional: bool = setting(True, "both views are anchors")
    negatives: Literal["confident", "random"] = setting("confident", 'or `"random"` voxels of another class')
    max_anchors: int | None = setting(
        None,
        "at most so many anchors a stream, drawn anew each step; `null`: all voxels",
        at_least=1,
    )
    negatives_from_all_processes: bool = setting(False, "with several GPUs: negatives of all of them")
    buffer_steps: int = setting(
        0,
        "earlier steps whose negatives stay among the candidates, without gradient",
        at_least=0,
    )
    projection_channels: int = setting(64, "of the projected features", at_least=1)
    projection_resolution: int = setting(
        4,
        "the decoder stage for the features: the coarsest with at most so many patch voxels per voxel on "
        "every axis",
        at_least=1,
    )
    view_gamma: float = setting(
        1.0,
        "a gamma curve between a patch's lowest and highest intensity, exponent 1 / (1 + this) to 1 + this",
        at_least=0, paper=0,
    )
    view_scale: float = setting(0.5, "intensities are multiplied by 1 ± this", at_least=0, at_most=1)
    view_shift: float = setting(0.5, "and shifted by up to this many units, see next line", at_least=0)
    view_shift_by: Literal["std", "mean"] = setting(
        "std",
        "unit of the shift: the channel's standard deviation; its mean is 0 in z-scored images",
        paper="mean",
    )
    view_noise: float = setting(0.1, "largest standard deviation of the noise", at_least=0)
    view_noise_probability: float = setting(0.5, "of adding noise to a view", at_least=0, at_most=1)
    ramp_fraction: float = setting(0.2, "share of training over which both weights ramp up", at_least=0, paper=1.0)

    @property
    def mixes_unlabelled(self) -> bool:
        return self.cutmix > 0


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
        return drawn.apply(image, settings.view_shift_by, self.context.masked_channels)

    def _pseudo_supervision(self, versions: _Versions) -> torch.Tensor:
        """L_rp = L_urp(view 1) + L_urp(view 2) + L_cr, summed over the network's outputs with nnU-Net's weights."""
        return summed_over_scales(self.context.scale_weights, self._pseudo_supervision_at_one_scale,
                                  all_scales(versions.original), *(all_scales(view) for view in versions.views))

    def _pseudo_supervision_at_one_scale(self, original: torch.Tensor, *views: torch.Tensor) -> torch.Tensor:
        settings = self.settings
        target = PseudoTarget.from_logits(self._softmax_logits(original), settings.sharpening)
        logits = [self._softmax_logits(view) for view in views]
        loss = torch.stack([rectified_pseudo_supervision(view, target, settings.rectify) for view in logits]).sum()
        if settings.consistency:
            # The cosine of a region's two-class logits (a, 0) knows the sign of a alone: take probabilities.
            first, second = (view.softmax(1) for view in logits) if self.context.regions else logits
            loss = loss + cosine_consistency(first, second)
        return loss

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
                gathered = rows_of_all_processes
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
        if self.settings.buffer_steps and self._new_voxels:  # none without the contrast
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
