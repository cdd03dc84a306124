"""nnU-Net's own Dice and cross-entropy with a weight for each voxel, for pseudo-labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.utilities.helpers import softmax_helper_dim1

from nnunetv2_semi.losses.deep_supervision import summed_over_scales
from nnunetv2_semi.losses.hard_labels import nearest, voxel_cross_entropy
from nnunetv2_semi.losses.predictions import Logits, all_scales


class WeightedDiceCE:
    """nnU-Net's loss of hard labels, over all outputs of the network.

    With weight 1 everywhere it is nnU-Net's loss; with weight 0 at some voxels it is nnU-Net's loss with those voxels
    under the ignore label. (For regions with an ignore label nnU-Net adds the cross-entropies of all regions up. Here
    it is their mean, as nnU-Net's own without an ignore label.)

    Args:
        regions: region-based labels.
        scale_weights: of the network's outputs, finest first.
        batch_dice: Dice of all patches together, as in nnU-Net's 2d configuration.
        ddp: sum the Dice of all processes; every process must then call the loss equally often.
    """

    def __init__(self, regions: bool, scale_weights: Sequence[float], batch_dice: bool, ddp: bool = False) -> None:
        self.regions, self.scale_weights = regions, tuple(scale_weights)
        self.dice = MemoryEfficientSoftDiceLoss(torch.sigmoid if regions else softmax_helper_dim1, batch_dice,
                                                do_bg=regions, smooth=1e-5, ddp=ddp)

    def __call__(self, output: Logits, labels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The loss, a scalar; 0 gradient where no voxel counts.

        Args:
            output: logits (B, K, *spatial), or a list of them, finest first; a single scale counts whole.
            labels: of the finest output: class numbers (B, 1, *spatial), for regions 0 or 1, (B, K, *spatial).
            weight: of each voxel's label, bool or 0 to 1, (B, 1, *spatial) or as ``labels``. Where it is 0 the label
                may be anything, nnU-Net's ignore label for one.
        """
        labels = torch.where(weight > 0, labels, 0)
        scales = all_scales(output)
        return summed_over_scales(
            self.scale_weights if len(scales) > 1 else (1.0,),
            lambda logits: self._at_one_scale(logits, nearest(labels, logits.shape[2:]),
                                              nearest(weight, logits.shape[2:])),
            scales)

    def _at_one_scale(self, logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        entropy = voxel_cross_entropy(logits, labels, self.regions)
        counted = weight.expand_as(entropy).sum().clamp_min(1e-8)
        return self.dice(logits, labels, loss_mask=weight) + (entropy * weight).sum() / counted
