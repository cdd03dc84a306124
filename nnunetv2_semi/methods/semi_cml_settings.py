"""The settings of Semi-CML, which both of its stages read."""

from __future__ import annotations

from typing import Literal

from nnunetv2_semi.methods.settings import Settings as BaseSettings
from nnunetv2_semi.methods.settings import setting


class SemiCMLSettings(BaseSettings):
    """Settings of SemiCML."""

    asc: bool = setting(True, "area-similarity contrast at all, in both stages")
    asc_weight: float = setting(
        0.1,
        "its weight in stage 1; paper: 3.5, beside a larger supervised loss",
        at_least=0, paper=3.5,
    )
    asc_ramp_fraction: float = setting(0.0, "share of training over which that weight ramps up", at_least=0)
    temperature: float = setting(1.0, "similarities are divided by it", above=0)
    areas: Literal["slice", "volume"] = setting(
        "slice",
        '`"slice"`: in 3D, slices along the coarsest axis; `"volume"`: whole patches',
    )
    max_slices: int = setting(16, "at most so many slices a patch", at_least=1)
    empty_areas: bool = setting(
        False,
        "areas without a predicted foreground voxel take part in the contrast",
        paper=True,
    )
    consistency_weight: float = setting(1.0, "of the mean squared difference in stage 1", at_least=0)
    ramp_fraction: float = setting(0.2, "share of training over which that weight ramps up", at_least=0, paper=1.0)
    prel: bool = setting(True, "stage 2 at all")
    prel_weight: float = setting(
        0.1,
        "of all terms of stage 2; paper: 1, beside a larger supervised loss that its code drops",
        at_least=0, paper=1,
    )
    prel_start: float = setting(0.63, "share of training after which stage 2 begins", at_least=0, at_most=1)
    prel_passes: int = setting(4, "noisy passes whose mean is the soft label", at_least=1)
    prel_noise: float = setting(
        0.1,
        "standard deviation of that noise, before it is clamped to [0, 2 × this]",
        at_least=0,
    )
    alpha_weaker: float = setting(0.01, "share of the contrast in stage 2, weaker modalities", at_least=0, at_most=1)
    alpha_better: float = setting(0.2, "the same, better modality", at_least=0, at_most=1)
    self_relearning: float = setting(
        0.2,
        "last share of stage 2 in which the better modality learns from itself too",
        at_least=0, at_most=1,
    )
    better_modality: str | None = setting(
        None,
        "which modality teaches; `null`: the higher Dice on labelled training patches",
    )
    soft_label: Literal["better", "mean"] = setting(
        "better",
        "`\"better\"`: of the better modality's teacher; `\"mean\"`: of all teachers, and all modalities learn "
        "from it throughout stage 2",
    )
    teacher: Literal["ema", "best_model_average"] = setting(
        "ema",
        'paper: `"best_model_average"`',
        paper="best_model_average",
    )
    ema_decay: float | None = setting(None, 'of the `"ema"` teacher, as in Mean Teacher', at_least=0, at_most=1)
    drop_supervised_in_prel: bool = setting(False, "paper's code: `true`, no labelled loss in stage 2", paper=True)
    deploy: Literal["student", "teacher"] = setting(
        "student",
        '`"student"` or `"teacher"`: which networks are validated, saved and predicted with',
    )

    def of_lone_patches(self, labelled: int, unlabelled: int, dimensions: int) -> list[str]:
        warnings = super().of_lone_patches(labelled, unlabelled, dimensions)
        if self.asc and unlabelled == 1 and (dimensions == 2 or self.areas == "volume"):
            warnings.append('a step has one unlabelled patch (on a GPU), so "asc" has no other area beside it and '
                            'changes nothing. Set "unlabelled_batch_size" to at least 2 for each GPU.')
        return warnings
