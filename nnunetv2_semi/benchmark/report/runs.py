"""What a study's report is made of: predictions of test cases, and what they were predicted with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Role = Literal["method", "control", "upper bound"]


@dataclass(frozen=True)
class PredictedRun:
    """Predictions of one training for the test cases, in the images' own space.

    dataset: name, for instance Dataset511_Hippocampus. group: data sets with the same group have the same test cases
    and differ in how many training cases are labelled. labelled: how many are, None if unknown. method: name shown in
    tables. seed, fold: of the training; None for predictions that other tools made. predictions: folder with one file
    a case, named as in ``truth`` (the labelsTs folder). images: the imagesTs folder, None if there is none.
    dataset_json: the file with labels, channel names and file ending. model: nnU-Net's fold folder (with
    checkpoint_final.pth and logs), None for predictions of other tools. training_seconds: wall time of the training.
    """

    dataset: str
    group: str
    labelled: int | None
    method: str
    role: Role
    seed: int | None
    fold: str | None
    predictions: Path
    truth: Path
    images: Path | None
    dataset_json: Path
    model: Path | None = None
    training_seconds: float | None = None

    @property
    def name(self) -> str:
        """For messages."""
        parts = [self.dataset, self.method]
        parts += [] if self.fold is None else [f"fold {self.fold}"]
        parts += [] if self.seed is None else [f"seed {self.seed}"]
        return ", ".join(parts)
