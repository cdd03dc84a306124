"""Which labelled training cases become atlases, and how they are aligned to each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

import numpy as np
import torch

from nnunetv2_semi.data.affine_alignment import affine_transform, resampled
from nnunetv2_semi.data.whole_case import WholeCase
from nnunetv2_semi.errors import UserError, one_line
from nnunetv2_semi.present_channels import present_channels


@dataclass(frozen=True)
class Atlas:
    """A labelled case that stands for one of its modalities.

    modality: its number. seen: bool (1, *spatial), where the case shows anything; an aligned one does not everywhere.
    """

    case: WholeCase
    modality: int
    seen: torch.Tensor


def chosen_atlases(cases: Iterable[WholeCase], modalities: Sequence[str], per_modality: int, seed: int) -> list[Atlas]:
    """Atlases of each modality in turn, drawn from ``cases``: the same ones on every process.

    Args:
        cases: read one by one; no more than are wanted are held at a time.
        modalities: their names; the order gives the numbers.
        per_modality: how many atlases; fewer where fewer cases have the modality.
        seed: of the draw.

    Raises:
        UserError: no case has one of the modalities.
    """
    drawn: list[list[tuple[float, WholeCase]]] = [[] for _ in modalities]
    generator = torch.Generator().manual_seed(seed)
    for case in cases:
        lot = float(torch.rand((), generator=generator))
        for modality in case.modalities:
            drawn[modality] = sorted([*drawn[modality], (lot, case)], key=itemgetter(0))[:per_modality]
    lacking = [name for name, found in zip(modalities, drawn, strict=True) if not found]
    if lacking:
        raise UserError(f"No labelled training case of this fold has the modality {', '.join(lacking)}: MASS needs "
                        "an atlas of each. Label one, or choose another fold or split (splits_final.json).")
    return [Atlas(case, modality, torch.ones_like(case.target[:1], dtype=torch.bool))
            for modality, found in enumerate(drawn) for _, case in found]


def aligned_atlases(atlases: Sequence[Atlas], modalities: Mapping[str, Sequence[int]],
                    spacing: Sequence[float]) -> Iterator[Atlas]:
    """The first atlas as it is, and the others mapped affinely to it.

    Args:
        atlases: one or more.
        modalities: name -> channels, in the order of the numbers.
        spacing: mm per axis.

    Raises:
        UserError: an atlas cannot be aligned.
    """
    first, *others = atlases
    channels = list(modalities.values())
    fixed = _shown(first.case, channels[first.modality])
    yield first
    for atlas in others:
        case = atlas.case
        try:
            transform = affine_transform(_shown(case, channels[atlas.modality]), fixed, spacing)
        except RuntimeError as error:
            raise UserError(f"Atlas {case.name} cannot be aligned to {first.case.name} ({one_line(error)}). Set "
                            '"MASS": {"align_atlases": false} in the plans file\'s "semi".') from error
        target = case.target.numpy()
        image = torch.from_numpy(resampled(case.image.numpy(), transform, spacing, nearest=False))
        labels = torch.from_numpy(resampled(target, transform, spacing, nearest=True))
        seen = torch.from_numpy(resampled(np.ones_like(target[:1]), transform, spacing, nearest=True)) > 0
        yield Atlas(replace(case, image=image, target=labels), atlas.modality, seen)


def _shown(case: WholeCase, channels: Sequence[int]) -> np.ndarray:
    """The first of a modality's ``channels`` that the case has, (*spatial)."""
    there = present_channels(case.image[None])[0].tolist()
    return case.image[next(channel for channel in channels if there[channel])].numpy()
