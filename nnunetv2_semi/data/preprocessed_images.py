"""Whether what comes out of preprocessing is an image: damage that only shows after normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_SAMPLES = 100_000
_SHARE_OF_ONE_VALUE = 0.999
_SAME_VALUE_WITHIN = 1e-4  # fraction of the range


def image_problem(image: np.ndarray, mask: np.ndarray, present: Sequence[int] | None = None) -> str | None:
    """Why nothing can be learned from a preprocessed image; None if all is well.

    Voxels that are NaN or infinite make every loss so. An extreme value among ordinary ones makes the normalisation
    overflow, or moves all others into one point.

    Args:
        image: (C, *spatial), float32.
        mask: (1, *spatial); negative outside the region of the raw image that is not zero.
        present: channels that the case has; None for all. One of several may be constant, as a filler for a channel
            that was not taken.
    """
    inside = np.asarray(mask[0]) >= 0
    constant = []
    channels = list(range(len(image)) if present is None else present)
    for channel in channels:
        voxels = np.asarray(image[channel])
        if not (np.isfinite(voxels.min()) and np.isfinite(voxels.max())):
            return (f"channel {channel} has voxels that are NaN or infinite after normalisation, so the file must hold "
                    "extreme values")
        voxels = voxels[inside]
        if voxels.size == 0 or voxels.min() == voxels.max():
            constant.append(channel)
            continue
        share = _share_of_one_value(voxels)
        if share >= _SHARE_OF_ONE_VALUE:
            return (f"{100 * share:.1f} % of the voxels of channel {channel} have the same value after normalisation, "
                    f"and a few others reach {voxels.min():.3g} and {voxels.max():.3g}")
    if len(constant) == len(channels):
        return "all voxels have the same value"
    return None


def _share_of_one_value(voxels: np.ndarray) -> float:
    """Fraction of ``voxels`` (N,) that differ from their median by less than a tiny part of the range."""
    width = _SAME_VALUE_WITHIN * (float(voxels.max()) - float(voxels.min()))
    sample = voxels[:: max(1, voxels.size // _SAMPLES)]
    return float((np.abs(sample - np.median(sample)) <= width).mean())
