"""The matched control: same loader, iterations, augmentation and seeds, no unlabelled data."""

from __future__ import annotations

from typing import ClassVar

from nnunetv2_semi.methods.base import Method


class Supervised(Method):
    """nnU-Net's own training step within the semi-supervised trainer."""

    name: ClassVar[str] = "Supervised"
    uses_unlabelled: ClassVar[bool] = False
