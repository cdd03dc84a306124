"""The study file, the list of trainings it makes, and what is refused before any of them starts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from nnunetv2_semi.benchmark.study.comparability import check_unchanged
from nnunetv2_semi.benchmark.study.jobs import Folders, jobs_of
from nnunetv2_semi.benchmark.study.study import Study, read_study
from nnunetv2_semi.benchmark.study.trainer_facts import differences
from nnunetv2_semi.errors import UserError

STUDY = """
datasets: [511, Dataset512_Name]
trainers:
  - nnUNetTrainerSemiSupervised
  - {trainer: nnUNetTrainerSemiRCPS, name: RCPS without contrast, settings: {RCPS: {contrast: false}}}
  - nnUNetTrainer
upper_bound: 513
seeds: [3, 4]
folds: [0, all]
settings: {num_epochs: 5, RCPS: {num_negatives: 7}}
"""


def written(folder: Path, text: str) -> Path:
    file = folder / "labels.yaml"
    file.write_text(text)
    return file


def jobs(study: Study, folder: Path) -> list:
    names = {511: "Dataset511_A", "Dataset512_Name": "Dataset512_Name", 513: "Dataset513_A"}
    folders = Folders(folder / "raw", folder / "preprocessed", folder / "results")
    for name in names.values():
        (folders.preprocessed / name).mkdir(parents=True, exist_ok=True)
        (folders.preprocessed / name / "P.json").write_text(json.dumps(
            {"plans_name": "P", "configurations": {"3d_fullres": {"semi": {"initial_lr": 0.1, "num_epochs": 50}}}}))
    return list(jobs_of(study, names, "P", folders))


def test_every_trainer_data_set_fold_and_seed_once_and_the_upper_bound_with_the_control(tmp_path):
    study = read_study(written(tmp_path, STUDY))
    found = jobs(study, tmp_path)
    assert study.name == "labels" and study.folder == tmp_path / "labels"
    assert len(found) == len({job.name for job in found}) == len({job.model for job in found}) == 2 * 2 * (2 * 3 + 1)
    assert {job.role for job in found if job.dataset == "Dataset513_A"} == {"upper bound"}
    assert {job.entry.name for job in found if job.role != "method"} == {"Supervised"}
    assert [job.seed for job in found] == sorted(job.seed for job in found)  # whole seeds first


def test_settings_go_from_the_plans_over_the_study_to_the_entry(tmp_path):
    job = next(job for job in jobs(read_study(written(tmp_path, STUDY)), tmp_path)
               if job.entry.name == "RCPS without contrast")
    plans = job.own_plans()
    assert plans["configurations"]["3d_fullres"]["semi"] == {
        "initial_lr": 0.1, "num_epochs": 5, "seed": 3, "final_validation": False,
        "RCPS": {"num_negatives": 7, "contrast": False}}
    assert plans["plans_name"] == job.plans_name == "P_labels_RCPS_without_contrast_seed3"


def test_settings_of_the_configuration_that_is_inherited_from_count(tmp_path):
    """A "semi" of the configuration's own replaces the inherited one whole, in nnU-Net."""
    job = jobs(read_study(written(tmp_path, STUDY)), tmp_path)[0]
    plans = json.loads(job.base_plans_file.read_text())
    configurations = plans["configurations"]
    configurations["parent"] = configurations["3d_fullres"]
    configurations["3d_fullres"] = {"inherits_from": "parent", "batch_size": 4}
    job.base_plans_file.write_text(json.dumps(plans))
    semi = job.own_plans()["configurations"]["3d_fullres"]["semi"]
    assert semi["initial_lr"] == 0.1 and semi["num_epochs"] == 5
    configurations["3d_fullres"]["semi"] = {"momentum": 0.5}
    job.base_plans_file.write_text(json.dumps(plans))
    semi = job.own_plans()["configurations"]["3d_fullres"]["semi"]
    assert semi["momentum"] == 0.5 and "initial_lr" not in semi


def test_what_decides_the_result_is_in_the_digest(tmp_path):
    def digests(text: str) -> list[str]:
        return [job.made_with() for job in jobs(read_study(written(tmp_path, text)), tmp_path)]

    first = digests(STUDY)
    assert len(set(first)) == 2 * 3  # by seed and trainer; fold and data set are in the name
    assert digests(STUDY + "devices: [cpu]\n") == first
    assert not set(digests(STUDY.replace("num_epochs: 5", "num_epochs: 6"))) & set(first)
    assert not set(digests(STUDY + "test_time_mirroring: false\n")) & set(first)


@pytest.mark.parametrize("change, message", [
    (("seeds:", "seed:"), "unknown key 'seed'.*Did you mean seeds"),
    (("seeds: [3, 4]", "seeds: 3"), "seeds must be a list"),
    (("seeds: [3, 4]", "seeds: [a]"), "seeds must hold int"),
    (("seeds: [3, 4]", "seeds: []"), "seeds is empty"),
    (("seeds: [3, 4]", "seeds: [3, 3]"), "seeds has a value twice"),
    (("datasets:", "title: x\ndataset:"), "unknown key 'dataset'"),
    (("folds: [0, all]", "folds: [first]"), "a fold is a number from 0 or all"),
    (("num_epochs: 5", "num_epochs: 5, seed: 1"), "list seeds"),
    (("name: RCPS without contrast", "names: x"), "unknown key 'names'.*Did you mean name"),
    (("  - nnUNetTrainer\n", "  - nnUNetTrainerSemiSupervised\n"), "two of trainers have the name Supervised"),
    (("  - nnUNetTrainerSemiSupervised\n", ""), "has no control"),
    (("upper_bound: 513", "upper_bound: 513\ncontrol: none of them"), "not the name of a trainer.*Supervised"),
    (("upper_bound: 513", "tolerance_mm: wide"), "tolerance_mm must be float"),
    (("datasets: [", "datasets: [[["), "is not YAML"),
    (("datasets: [511", "datasets: [011"), "without zeros"),
    (("folds: [0", "folds: [-1"), "a fold is a number from 0"),
    (("name: RCPS without contrast", "name: 2024"), "name must be text"),
    (("name: RCPS without contrast", "name: '-'"), "name must be text with letters"),
    (("- nnUNetTrainer\n", "- {trainer: nnUNetTrainer, selftrain: {round: 1}}\n"), "unknown key 'round'.*mean rounds"),
    (("- nnUNetTrainer\n", "- {trainer: nnUNetTrainer, selftrain: {rounds: 0}}\n"), "rounds must be a whole number"),
    (("- nnUNetTrainer\n", "- {trainer: nnUNetTrainer, selftrain: {keep: 1.5}}\n"), "keep must be a number above 0"),
    (("- nnUNetTrainer\n", "- {trainer: nnUNetTrainer, selftrain: {teachers: 0}}\n"),
     "teachers must be a whole number"),
    (("- nnUNetTrainer\n", "- {trainer: nnUNetTrainer, selftrain: {finetune: 1}}\n"),
     "finetune must be a number of at least 0"),
    (("- nnUNetTrainer\n", "- {trainer: nnUNetTrainer, selftrain: {ignore_unstable: 1}}\n"),
     "ignore_unstable must be true or false"),
    ((STUDY, "- a list"), "labels.yaml must have keys such as datasets: and trainers:"),
    (("datasets: [511, Dataset512_Name]", "datasets: []"), "datasets is missing or empty"),
    (("  - nnUNetTrainer\n", "  - 3\n"), "each of trainers must be a class name, or an object.*got 3"),
    (("settings: {RCPS: {contrast: false}}", "settings: 5"), "settings of nnUNetTrainerSemiRCPS must be an object"),
])
def test_a_wrong_file_is_refused_with_the_key(tmp_path, change, message):
    assert change[0] in STUDY
    with pytest.raises(UserError, match=message):
        read_study(written(tmp_path, STUDY.replace(*change)))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.yaml cannot be read: No such file"):
        read_study(tmp_path / "nowhere.yaml")


def test_the_folder_of_a_study_needs_another_name_than_its_file(tmp_path):
    written(tmp_path, STUDY).rename(tmp_path / "labels")
    with pytest.raises(UserError, match="labels: give the file the ending .yaml: the folder labels is made beside it"):
        read_study(tmp_path / "labels")


def test_without_a_reader_of_yaml_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(UserError, match=r'Studies need further packages: pip install "nnunetv2-semi\[benchmark\]"'):
        read_study(written(tmp_path, STUDY))


def test_differences_are_found_unless_meant():
    facts = {"A": {"iterations": 10, "batch_size": 2, "unlabelled_batch_size": 2, "num_epochs": 1},
             "B": {"iterations": 20, "batch_size": 2, "unlabelled_batch_size": None, "num_epochs": 2}}
    assert differences(facts, []) == ["iterations differs (A: 10, B: 20)"]
    assert differences(facts, ["iterations"]) == []
    facts["C"] = {**facts["A"], "unlabelled_batch_size": 4}
    assert differences(facts, ["iterations"]) == ["unlabelled_batch_size differs (A: 2, C: 4)"]


def test_epochs_done_again_after_a_kill_count_once(tmp_path):
    job = jobs(read_study(written(tmp_path, STUDY)), tmp_path)[0]
    job.folder.mkdir(parents=True)
    assert job.epochs_done(40) == 0
    lines = [f"2026-01-01 10:00:00.000000: Epoch {epoch}\n10:01: Epoch time: 3 s\n"
             for epoch in [*range(20), *range(10, 15)]]
    job.training_log.write_text("".join(lines))
    assert job.epochs_done(40) == 14
    assert job.epochs_done(5) == 5


def test_a_model_of_another_study_of_the_same_name_is_noticed(tmp_path):
    job, other = jobs(read_study(written(tmp_path, STUDY)), tmp_path)[:2]
    assert job.begun_with() is None
    job.model.mkdir(parents=True)
    (job.model / "study.json").write_text(json.dumps({"made_with": "another digest"}))
    other.model.mkdir(parents=True)
    (other.model / "checkpoint_best.pth").touch()
    for begun in (job, other):
        with pytest.raises(UserError, match="begun with other settings.*another study of this name"):
            check_unchanged([begun])
    elsewhere = tmp_path / "elsewhere" / "study"
    for further in ({}, {"study": str(job.study.folder)}, {"study": str(elsewhere)}):
        (job.model / "study.json").write_text(json.dumps({"made_with": job.made_with(), **further}))
        check_unchanged([job])  # the last one was moved here
    elsewhere.mkdir(parents=True)
    with pytest.raises(UserError, match="another study of this name"):
        check_unchanged([job])
    elsewhere.rmdir()
    job.base_plans_file.unlink()
    with pytest.raises(UserError, match=f"{job.base_plans_file} is missing.*--predictions"):
        check_unchanged([job])


def test_a_job_is_worked_on_by_one_process_at_a_time(tmp_path):
    job = jobs(read_study(written(tmp_path, STUDY)), tmp_path)[0]
    job.write_record("running")
    assert job.state_now() == "stopped"  # nobody holds the lock: it was killed

    def stop() -> None:
        raise KeyboardInterrupt

    with job.lock():
        assert job.state_now() == "running"
        with pytest.raises(KeyboardInterrupt):
            with job.lock(stop):
                raise AssertionError("two at a time")
