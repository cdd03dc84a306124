"""What a study refuses before its first training, one check at a time and without nnU-Net."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from nnunetv2_semi import cli
from nnunetv2_semi.benchmark.command import study_runs
from nnunetv2_semi.benchmark.study import cluster, local_pool, planned_data, preparation
from nnunetv2_semi.benchmark.study.comparability import check_data_sets
from nnunetv2_semi.benchmark.study.trainer_facts import Question, trainer_facts
from nnunetv2_semi.benchmark.training_data import TrainingData
from nnunetv2_semi.errors import UserError

STUDY = "datasets: [1]\ntrainers: [nnUNetTrainerSemiSupervised]\n"


@pytest.fixture
def study_file(tmp_path: Path) -> Path:
    file = tmp_path / "labels.yaml"
    file.write_text(STUDY)
    return file


def data_set(raw: Path, name: str, group: str = "A", labelled: int = 2, role: str = "method") -> SimpleNamespace:
    """What the checks ask of a training on a data set with one test case."""
    for file in ("imagesTs/test_0000.nii.gz", "labelsTs/test.nii.gz"):
        (raw / name / file).parent.mkdir(parents=True, exist_ok=True)
        (raw / name / file).touch()
    return SimpleNamespace(
        dataset=name, raw=raw / name, group=group, role=role, dataset_json={"file_ending": ".nii.gz"},
        labelled_cases=lambda: [f"case_{number}" for number in range(labelled)],
        test_cases=lambda: sorted(file.name for file in (raw / name / "labelsTs").iterdir()))  # fmt: skip


def test_data_sets_that_can_be_compared_are_taken(tmp_path):
    check_data_sets([data_set(tmp_path, "Dataset001_A"), data_set(tmp_path, "Dataset002_A", labelled=5),
                     data_set(tmp_path, "Dataset003_A", labelled=9, role="upper bound")])


def test_two_data_sets_with_as_many_labelled_cases_are_refused(tmp_path):
    with pytest.raises(UserError, match="Dataset001_A and Dataset002_A have the same test cases and as many labelled"):
        check_data_sets([data_set(tmp_path, "Dataset001_A"), data_set(tmp_path, "Dataset002_A")])


def test_an_upper_bound_with_other_test_cases_is_refused(tmp_path):
    with pytest.raises(UserError, match="The upper bound has other test cases than the data sets.*subset --labeled"):
        check_data_sets([data_set(tmp_path, "Dataset001_A"),
                         data_set(tmp_path, "Dataset002_B", group="B", role="upper bound")])


@pytest.mark.parametrize("label, message", [
    ("lost.nii.gz", "labelsTs: 1 labels have no image in imagesTs: lost.nii.gz"),
    (None, "there are no labels with the ending of dataset.json"),
])
def test_labels_of_test_cases_need_images(tmp_path, label, message):
    job = data_set(tmp_path, "Dataset001_A")
    (job.raw / "labelsTs" / (label or "note.txt")).touch()
    if label is None:
        job.test_cases = list
    with pytest.raises(UserError, match=message):
        check_data_sets([job])


def test_an_id_of_several_data_sets_is_refused(tmp_path):
    for name in ("Dataset001_A", "Dataset001_B"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="Data set 1 is several in .*: Dataset001_[AB], Dataset001_[AB]"):
        preparation.full_name(1, tmp_path)


def test_an_unknown_planner_is_refused():
    with pytest.raises(UserError, match="nnU-Net finds no planner nnUNetPlannerThatIsNowhere.*doctor"):
        preparation._plans_of_planner("nnUNetPlannerThatIsNowhere")


def test_one_labelled_case_makes_no_fold(tmp_path):
    job = SimpleNamespace(dataset="Dataset001_A", plans_file=tmp_path / "Plans.json", labelled_cases=lambda: ["a"])
    with pytest.raises(UserError, match=r"Dataset001_A has 1 labelled case: use folds: \[all\]"):
        planned_data.write_split(SimpleNamespace(folds=(0, "all")), job)
    planned_data.write_split(SimpleNamespace(folds=("all",)), job)
    assert list(tmp_path.iterdir()) == []


def test_other_splits_matter_to_trainings_of_folds_alone(tmp_path, monkeypatch):
    now = {"imagesTr/a_0000.nii.gz": "1", "splits_final.json": "2"}
    monkeypatch.setattr(TrainingData, "digests", property(lambda data: dict(now)))
    plans = tmp_path / "P.json"
    plans.touch()

    def begun(fold):
        return SimpleNamespace(dataset="Dataset001_A", fold=fold, begun_with=lambda: "digest", folder="run",
                               model="model", study=SimpleNamespace(folder=tmp_path), base_plans_file=plans,
                               raw=tmp_path / "Dataset001_A", plans_file=plans, data_record=tmp_path / "data.json",
                               data_begun_with=lambda: None, data_digest=lambda digests: "digest",
                               own_plans=lambda: {"image_reader_writer": "SimpleITKIO"})

    planned_data.note_data(begun("all"))
    now["splits_final.json"] = "3"
    planned_data.check_data_unchanged([begun("all")])
    with pytest.raises(UserError, match="changed since 2 trainings of the study began with it: splits_final.json"):
        planned_data.check_data_unchanged([begun("all"), begun(0)])
    del now["splits_final.json"]
    planned_data.check_data_unchanged([begun("all")])
    now["imagesTr/a_0000.nii.gz"] = "4"
    with pytest.raises(UserError, match="imagesTr/a_0000.nii.gz"):
        planned_data.check_data_unchanged([begun("all")])


def test_more_trainings_than_cores_are_refused(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    with pytest.raises(UserError, match="3 trainings at a time on the CPU, but there are 2 cores"):
        local_pool._cores(["cpu"] * 3)
    assert local_pool._cores(["cpu", "cuda:0", "cpu"]) == [[0], None, [1]]


def test_trainers_that_cannot_be_made_are_told_with_the_output(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stdout="Bus error"))
    with pytest.raises(UserError, match="The trainers of the study could not be made:\nBus error"):
        trainer_facts([Question("nnUNetTrainer", "Plans.json", "3d_fullres", 0)], os.environ)


def test_without_the_package_for_clusters_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r'further package: pip install "nnunetv2-semi\[cluster\]"'):
        cluster.cluster_executor(SimpleNamespace(cluster={"timeout_min": 1}))


def test_what_a_cluster_answers_to_jobs_it_refuses_is_told(tmp_path, monkeypatch):
    class Submission(ModuleType):
        core = SimpleNamespace(utils=SimpleNamespace(FailedSubmissionError=ZeroDivisionError))

    def refuse(task: cluster.ClusterTask) -> None:
        raise ZeroDivisionError("sbatch: invalid partition")

    monkeypatch.setitem(sys.modules, "submitit", Submission("submitit"))
    states: list[str] = []
    job = SimpleNamespace(name="first", folder=tmp_path, made_with=str, labelled_cases=list,
                          write_record=lambda state, **_: states.append(state))
    with pytest.raises(UserError, match="The cluster refuses the trainings: sbatch: invalid partition"):
        cluster.run_on_cluster([job], SimpleNamespace(cluster={}),
                               SimpleNamespace(batch=nullcontext, submit=refuse), SimpleNamespace())
    assert states == ["waiting"]


def test_a_report_without_finished_trainings_says_how_to_start_them(study_file, monkeypatch):
    monkeypatch.setattr(preparation, "list_jobs", lambda study: [SimpleNamespace(state="failed")])
    with pytest.raises(UserError, match="No training of .*labels.yaml is finished. Start it: .* run .*labels.yaml"):
        study_runs(study_file)


def test_a_study_is_run_by_one_command_at_a_time(study_file, capsys):
    from filelock import FileLock

    study_file.with_suffix("").mkdir()
    with FileLock(study_file.with_suffix("") / ".lock"):
        assert cli.main(["benchmark", "run", str(study_file), "--devices", "cpu"]) == 1
    assert "Another 'nnunetv2_semi benchmark run' is at work on this study" in capsys.readouterr().err
