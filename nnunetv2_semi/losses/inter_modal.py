"""Agreement of two modalities' predictions of the same patches."""

from __future__ import annotations

import torch

from nnunetv2_semi.losses.predictions import foreground

_EPS = 1e-5


def inter_modal_loss(first: torch.Tensor, second: torch.Tensor, regions: bool) -> torch.Tensor:
    """1 - mean over patches and foreground classes of (2 sum pq + eps) / (sum p + sum q + eps), a scalar.

    first, second: probabilities p and q (B, K, *spatial). Gradients reach both.
    """
    p, q = (foreground(single, regions).flatten(2) for single in (first, second))
    return 1 - ((2 * (p * q).sum(-1) + _EPS) / (p.sum(-1) + q.sum(-1) + _EPS)).mean()
