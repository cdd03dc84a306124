"""What a foundation model is to the methods that train one beside nnU-Net's network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from nnunetv2_semi.losses.predictions import single_precision

_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


class FoundationModel(nn.Module, ABC):
    """A segmentation network that was trained on other data, most of it frozen.

    It takes nnU-Net's normalised patches as they are and does whatever its weights expect of them itself. What trains
    are the parameters with ``requires_grad``; every one of them gets a gradient in each pass.

    notes: for the log, what of the model did not come from its file.
    """

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []
        self._frozen_names: tuple[str, ...] = ()

    @abstractmethod
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """``image`` (B, C, *spatial) -> logits (B, K, *grid), on a grid of the model's own over the same extent."""

    def at_patch_grid(self, logits: torch.Tensor, spatial: Sequence[int]) -> torch.Tensor:
        """``logits`` (B, K, *grid) of a forward pass, linearly interpolated to (B, K, *spatial)."""
        if tuple(logits.shape[2:]) == tuple(spatial):
            return logits
        return F.interpolate(single_precision(logits), tuple(spatial), mode=_LINEAR[logits.ndim - 2])

    def frozen_names(self) -> list[str]:
        """Names in the state dict of the frozen parameters that came from a file; a checkpoint can do without them.

        A parameter that the state dict has under several names is named as often.
        """
        return list(self._frozen_names)

    def _note_frozen(self, from_file: Iterable[nn.Parameter]) -> None:
        """Of the parameters ``from_file``, those that do not train are what `frozen_names` names."""
        loaded = {id(parameter) for parameter in from_file}
        self._frozen_names = tuple(name for name, parameter in self.named_parameters(remove_duplicate=False)
                                   if id(parameter) in loaded and not parameter.requires_grad)
