"""Dice of each domain that dataset.json names."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from nnunetv2_semi.training.domains import cases_of_domains, print_dice_of_domains
from nnunetv2_semi.training.validation import without_loss


def test_cases_of_domains_by_patterns():
    found = cases_of_domains({"a": ("A_*", "x1"), "b": ("b?",)}, ["A_1", "a_1", "x1", "b2", "b22"])
    assert found["a"].tolist() == [True, False, True, False, False]
    assert found["b"].tolist() == [False, False, False, True, False]


def test_final_dice_of_each_domain_is_the_mean_over_its_cases(tmp_path):
    (tmp_path / "validation").mkdir()
    metrics = {"A_1": {"1": 0.5, "2": 0.7}, "A_2": {"1": 0.9, "2": float("nan")}, "B_1": {"1": 0.2, "2": 0.4}}
    (tmp_path / "validation" / "summary.json").write_text(json.dumps({"metric_per_case": [
        {"prediction_file": f"/somewhere/{case}.nii.gz", "metrics": {k: {"Dice": d} for k, d in dice.items()}}
        for case, dice in metrics.items()]}))
    lines = []
    trainer = SimpleNamespace(output_folder=str(tmp_path), local_rank=0, dataset_json={"file_ending": ".nii.gz"},
                              print_to_log_file=lambda line, **_: lines.append(line))
    print_dice_of_domains(trainer, {"a": ("A_*",), "b": ("B_*",), "c": ("C_*",)})
    assert lines == ["Mean Validation Dice of domain a: 0.7500 (2 cases)",
                     "Mean Validation Dice of domain b: 0.3000 (1 cases)",
                     "Mean Validation Dice of domain c: no validation case"]


def test_nnunets_loss_is_left_out_where_processes_may_have_different_patches():
    trainer = SimpleNamespace(loss=lambda output, target: pytest.fail("it was computed"))
    before = trainer.loss
    with without_loss(trainer):
        assert float(trainer.loss(None, None)) == 0
    assert trainer.loss is before


def test_every_epoch_logs_the_dice_of_each_domain(tools, tmp_path, monkeypatch):
    workspace = tmp_path / "w"
    tools.prepare(workspace, "2d", monkeypatch, shape=(12, 20, 16), labelled=4)
    path = tools.plans_path(workspace).parent / "dataset.json"
    dataset_json = json.loads(path.read_text())
    dataset_json["semi"] = {**dataset_json.get("semi", {}), "domains": {"all": "*", "none": "nothing_*"}}
    path.write_text(json.dumps(dataset_json))
    trainer = tools.trainer(workspace, "nnUNetTrainerSemiSupervised", "2d")
    trainer.run_training()
    log = trainer.logger.local_logger.my_fantastic_logging
    both = np.array(log["semi/validation_dice_domain_all"])
    assert both == pytest.approx(np.array([np.nanmean(dice) for dice in log["dice_per_class_or_region"]]), abs=1e-6)
    assert np.isnan(log["semi/validation_dice_domain_none"]).all()
