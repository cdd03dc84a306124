"""Dice of each domain that dataset.json names, for the log."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_semi.data.dataset_settings import is_of_domain

Domains = Mapping[str, Sequence[str]]


def cases_of_domains(domains: Domains, cases: Sequence[str]) -> dict[str, torch.Tensor]:
    """Name of each domain -> which of ``cases`` are of it, bool (cases,).

    domains: name -> patterns of case names, as in dataset.json.
    """
    return {name: torch.tensor([is_of_domain(str(case), patterns) for case in cases], dtype=torch.bool)
            for name, patterns in domains.items()}


def print_dice_of_domains(trainer: nnUNetTrainer, domains: Domains) -> None:
    """Into the training log: mean Dice over foreground classes of each domain's cases, of nnU-Net's summary.json."""
    path = os.path.join(trainer.output_folder, "validation", "summary.json")
    if not domains or trainer.local_rank != 0 or not os.path.isfile(path):
        return
    with open(path) as file:
        summary = json.load(file)
    dice = {os.path.basename(case["prediction_file"])[:-len(trainer.dataset_json["file_ending"])]:
            np.nanmean([metrics["Dice"] for label, metrics in case["metrics"].items() if label != "0"] or [np.nan])
            for case in summary["metric_per_case"]}
    for name, of_domain in cases_of_domains(domains, list(dice)).items():
        values = [value for value, own in zip(dice.values(), of_domain.tolist(), strict=True) if own]
        shown = f"{np.nanmean(values):.4f} ({len(values)} cases)" if values else "no validation case"
        trainer.print_to_log_file(f"Mean Validation Dice of domain {name}: {shown}", also_print_to_console=True)
