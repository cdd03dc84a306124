"""The report: its files, what the page says, and the command that makes it."""

from __future__ import annotations

import argparse
import base64
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from skimage import io

from nnunetv2_semi.benchmark.report import report
from nnunetv2_semi.benchmark.report.pairing import Arm
from nnunetv2_semi.benchmark.report.report import predictions_of, with_control, write_report
from nnunetv2_semi.benchmark.report.runs import PredictedRun, Role
from nnunetv2_semi.benchmark.report.summary import rows_of_metric
from nnunetv2_semi.benchmark.report.tables import settings_table
from nnunetv2_semi.benchmark.study.study import Study
from nnunetv2_semi.benchmark.study.trained import curves_of, settings_of
from nnunetv2_semi.errors import UserError

CASES = [f"case_{index}" for index in range(7)]
SHAPE = (4, 12, 14)
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Text, sources, alternative texts and table cells of a page; fails where elements do not nest."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.alternatives: list[str | None] = []
        self.said: list[str] = []
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.sources += [values[name] or "" for name in ("src", "href", "srcset", "data") if name in values]
        if tag == "img":
            self.alternatives.append(values.get("alt"))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "title"} & set(self.open):
            self.said.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.said).split())


def write(array: np.ndarray, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array.astype(np.int16))
    image.SetSpacing((1.0, 1.0, 2.0))
    sitk.WriteImage(image, str(file))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Truth and images of a data set with two labels; the kidney is absent from the last case."""
    folder = tmp_path_factory.mktemp("data")
    content = {"labels": {"background": 0, "liver": 1, "kidney": 2}, "file_ending": ".nii.gz",
               "channel_names": {"0": "CT"}, "name": "Abdomen"}  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(content))
    for case in CASES:
        truth = np.zeros(SHAPE, int)
        truth[1:3, 2:7, 2:6] = 1
        if case != CASES[-1]:
            truth[1:3, 7:11, 8:13] = 2
        write(truth, folder / "labelsTs" / f"{case}.nii.gz")
        write(np.random.default_rng(0).normal(100, 20, SHAPE), folder / "imagesTs" / f"{case}_0000.nii.gz")
    return folder


def predict(data: Path, folder: Path, shift: int, seed: int) -> Path:
    """Predictions whose liver is wrong by ``shift`` rows in all cases, more or less by one voxel."""
    generator = np.random.default_rng(seed)
    for case in CASES:
        truth = sitk.GetArrayFromImage(sitk.ReadImage(str(data / "labelsTs" / f"{case}.nii.gz")))
        predicted = np.where(truth == 2, 2, 0)
        predicted[1:3, 2 + shift : 7 + shift, 2:6] = 1
        predicted[1, 2 + shift, 2 : 3 + generator.integers(3)] = 0
        write(predicted, folder / f"{case}.nii.gz")
    return folder


def trained_model(folder: Path, trainer: str, epochs: int = 3, **semi: object) -> Path:
    """A fold folder as nnU-Net leaves it."""
    fold = folder / f"{trainer}__nnUNetPlans__3d_fullres" / "fold_0"
    fold.mkdir(parents=True)
    logged = {"train_losses": list(np.linspace(0, -0.5, epochs)), "val_losses": list(np.linspace(0, -0.4, epochs)),
              "ema_fg_dice": [np.float32(value) for value in np.linspace(0, 0.625, epochs)]}  # fmt: skip
    torch.save({"network_weights": {}, "logging": logged}, fold / "checkpoint_final.pth")
    configuration = {"batch_size": 2, "semi": {"num_epochs": epochs, "seed": len(trainer), **semi}}
    (fold.parent / "plans.json").write_text(json.dumps({"configurations": {"3d_fullres": configuration}}))
    return fold


@pytest.fixture(scope="module")
def study(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[PredictedRun]:
    """Control and one method with 4 and 8 labelled cases, two seeds, and an upper bound."""
    folder = tmp_path_factory.mktemp("runs")
    shifts: list[tuple[str, Role, int, int]] = [("Baseline", "control", 4, 3), ("Ours", "method", 4, 1),
                                                ("Baseline", "control", 8, 1), ("Ours", "method", 8, 1),
                                                ("Baseline", "upper bound", 50, 0)]  # fmt: skip
    models = {"Baseline": trained_model(folder, "nnUNetTrainerPlain"),
              "Ours": trained_model(folder, "nnUNetTrainerOurs", 4, Ours={"ramp": 0.5})}  # fmt: skip
    return [
        PredictedRun("Dataset001_Abdomen", "Abdomen", labelled, method, role, seed, "0",
                     predict(data, folder / f"{method}_{labelled}_{seed}", shift, seed + 7 * (method == "Ours")),
                     data / "labelsTs", data / "imagesTs", data / "dataset.json",
                     model=models[method] if role != "upper bound" else None, training_seconds=90.0 + seed)
        for method, role, labelled, shift in shifts for seed in (0, 1)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def written(study: list[PredictedRun], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(study, folder / "new", "Labels & effort", 1.5, worst_cases=1, num_processes=1)
    return folder / "new"


@pytest.fixture(scope="module")
def page(written: Path) -> Page:
    return Page((written / "report.html").read_text(encoding="utf-8"))


def summary_row(
    written: Path, method: str, labelled: int, label: str = "mean over labels", metric: str = "dice"
) -> pd.Series:
    table = pd.read_csv(written / "summary.csv")
    found = table[(table["method"] == method) & (table["labelled"] == labelled)]
    return rows_of_metric(found, metric, label).iloc[0]


def test_all_files_are_written_and_nothing_else(written: Path) -> None:
    names = sorted(file.name for file in written.iterdir())
    assert names == ["measures.csv", "report.html", "report.md", "summary.csv"]
    measures = pd.read_csv(written / "measures.csv")
    assert len(measures) == 10 * len(CASES) * 2
    assert set(measures["label"]) == {"liver", "kidney"}


def test_page_and_markdown_hold_the_numbers_computed(written: Path, page: Page) -> None:
    markdown = (written / "report.md").read_text(encoding="utf-8")
    for method, labelled in (("Baseline", 4), ("Ours", 4), ("Ours", 8), ("Baseline", 50)):
        row = summary_row(written, method, labelled)
        shown = f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        assert shown in page.text and shown in markdown
        liver = summary_row(written, method, labelled, "liver", "hd95_mm")
        assert f"{liver['mean']:.2f} [{liver['low']:.2f}, {liver['high']:.2f}]" in page.text
    row = summary_row(written, "Ours", 4)
    assert f"{row['difference']:+.3f} [{row['difference_low']:+.3f}, {row['difference_high']:+.3f}]" in page.text
    assert f"{row['gap_closed']:.0%} [{row['gap_low']:.0%}, {row['gap_high']:.0%}]" in page.text


def test_statements_follow_from_the_corrected_test(written: Path, page: Page) -> None:
    # Seven gains of seven cases, two comparisons: 2 * 2 / 2^7.
    assert summary_row(written, "Ours", 4)["p_corrected"] == pytest.approx(4 / 2**7)
    assert "Ours, 4 labelled: ahead of the control. Dice" in page.text
    assert "corrected p 0.031, 7 cases, 2 trainings." in page.text
    assert summary_row(written, "Ours", 8)["p_corrected"] > 0.05
    assert "Ours, 8 labelled: not distinguishable from the control." in page.text


def test_page_needs_no_other_file_and_says_what_pictures_show(page: Page) -> None:
    assert page.sources and all(re.match(r"data:image/(png|svg\+xml);base64,", source) for source in page.sources)
    assert all(page.alternatives) and len(page.alternatives) == len(page.sources)
    for source in page.sources:
        content = base64.b64decode(source.split(",", 1)[1])
        assert content.startswith((b"\x89PNG", b"<?xml"))
        assert not re.search(rb'(?:href|src)="https?:', content)


def test_no_number_is_missing_without_a_dash(written: Path, page: Page) -> None:
    for text in (page.text, (written / "report.md").read_text(encoding="utf-8"), *map(str, page.alternatives)):
        assert not re.search(r"\b(nan|None|NaT|inf)\b|<NA>", text, re.IGNORECASE)


def test_title_is_escaped(written: Path) -> None:
    content = (written / "report.html").read_text(encoding="utf-8")
    assert "<h1>Labels &amp; effort</h1>" in content


def test_empty_structures_are_counted(page: Page) -> None:
    # The kidney is in neither truth nor prediction of one of seven cases, in both seeds.
    assert "4 Ours kidney 2 0 0 14" in page.text


def test_settings_times_and_curves_of_the_models_are_shown(page: Page) -> None:
    assert "Ours 4, 8 trainer nnUNetTrainerOurs nnUNetTrainerPlain" in page.text
    assert "Ours 4, 8 semi.num_epochs 4 3" in page.text
    assert "Ours 4, 8 only here Ours.ramp 0.5" in page.text
    assert "semi.seed" not in page.text
    assert "4 Ours 2 1.5 min 3.0 min" in page.text
    curves = [text for text in page.alternatives if text and text.startswith("Training curves")]
    assert curves == ["Training curves. Dice of patches: Baseline ends at 0.625; Ours ends at 0.625."] * 2
    assert "Models without curves (no final checkpoint): Baseline (upper bound), 50 labelled: 2 of 2." in page.text


def test_plots_tell_their_numbers(written: Path, page: Page) -> None:
    plot = next(text for text in page.alternatives if text and text.startswith("Plot of mean Dice"))
    assert f"Ours, 4 labelled: {summary_row(written, 'Ours', 4)['mean']:.3f}" in plot
    assert f"upper bound: {summary_row(written, 'Baseline', 50)['mean']:.3f}" in plot
    assert "Scatter plot of Dice per case. Ours is higher in 7 of 7 cases, lower in 0." in page.alternatives


def test_worst_case_of_each_method_is_drawn(written: Path, page: Page) -> None:
    measures = pd.read_csv(written / "measures.csv")
    ours = measures[(measures["method"] == "Ours") & (measures["labelled"] == 4)]
    means = ours.groupby(["case", "seed"])["dice"].mean()
    drawn = [text for text in page.alternatives if text and text.startswith("Outlines")]
    assert len(drawn) == 5
    assert f"{means.idxmin()[0]}: Prediction Dice {means.min():.2f}" in drawn[1]


def test_two_groups_have_a_part_each(study: list[PredictedRun], tmp_path: Path) -> None:
    first = [run for run in study if run.labelled == 4 and run.seed == 0]
    write_report([*first, *(replace(run, group="Thorax") for run in first)], tmp_path, "Both", worst_cases=0,
                 num_processes=1)  # fmt: skip
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "Ours, Abdomen, 4 labelled:" in page.text and "Ours, Thorax, 4 labelled:" in page.text
    assert page.text.count("Case by case") == 2
    assert "Some rows have one training." in page.text


def test_comparison_of_other_folds_is_told_without_a_verdict(study: list[PredictedRun], tmp_path: Path) -> None:
    runs = [replace(run, fold="1") if run.role == "method" else run for run in study if run.labelled == 4]
    write_report(runs, tmp_path, "Folds", worst_cases=0, num_processes=1)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "Ours, 4 labelled: no verdict, because it was trained on other data sets or folds than the" in page.text
    assert "Nothing was tested against a control." in page.text
    assert "A model of a fold other than all was trained on a part of them" in page.text


def test_what_is_not_compared_is_told_and_not_drawn(study: list[PredictedRun], tmp_path: Path) -> None:
    ours = [run for run in study if run.method == "Ours" and run.labelled == 8]
    # Without the control's bad second seed there is nothing between them.
    bad = next(run for run in study if run.role == "control" and run.labelled == 4)
    control = [replace(ours[0], role="control", method="Baseline"), replace(bad, labelled=8, seed=1)]
    runs = [replace(run, fold="all") for run in (*control, ours[0])]
    write_report(runs, tmp_path, "Seeds", worst_cases=0, num_processes=1)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "1 training. Compared without seed 1 of the control." in page.text
    assert "Scatter plot of Dice per case. Ours is higher in 0 of 7 cases, lower in 0." in page.alternatives
    assert "the test cannot give a corrected p below 1.000" in page.text
    assert "was trained on a part of them" not in page.text


def test_settings_are_compared_with_the_control_on_the_same_data_set(tmp_path: Path) -> None:
    arms: dict[Arm, list[PredictedRun]] = {}
    # The plans of the data sets differ, and the first run of the control is of another data set.
    for name, role, dataset, batch_size in [("Baseline", "control", "B", 4), ("Baseline", "control", "A", 2),
                                            ("Ours", "method", "A", 2)]:  # fmt: skip
        model = trained_model(tmp_path / f"{name}_{dataset}", "nnUNetTrainerPlain")
        plans = {"configurations": {"3d_fullres": {"batch_size": batch_size}}}
        (model.parent / "plans.json").write_text(json.dumps(plans))
        run = PredictedRun(dataset, "Abdomen", 4, name, role, 0, "all", tmp_path, tmp_path, None, tmp_path, model)
        arms.setdefault(Arm("Abdomen", 4, name, role), []).append(run)
    assert settings_table(arms).rows == []


def test_settings_are_found_whatever_the_study_is_called(tmp_path: Path) -> None:
    plans = {"configurations": {"3d_fullres": {"batch_size": 2}}}
    folder = tmp_path / "nnUNetTrainerOurs__Plans_my__study__Ours_seed0__3d_fullres"
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    assert settings_of(folder / "fold_0") == {
        "trainer": "nnUNetTrainerOurs", "plans": "Plans_my__study__Ours_seed0", "configuration": "3d_fullres",
        "batch_size": "2",
    }  # fmt: skip
    assert settings_of(tmp_path / "other" / "fold_0") == {}


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    return parser.parse_args(list(arguments))


def test_command_reports_on_plain_folders(study: list[PredictedRun], data: Path, tmp_path: Path) -> None:
    folders = {run.method: run.predictions for run in study if run.labelled == 4 and run.seed == 0}
    arguments = ["--truth", str(data / "labelsTs"), "--dataset-json", str(data / "dataset.json"), "--predictions",
                 *(f"{name}={folder}" for name, folder in folders.items()), "--control", "Baseline",
                 "-o", str(tmp_path / "out"), "--worst-cases", "1", "-np", "1"]  # fmt: skip
    assert report.run(parsed(*arguments)) == 0
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert "Comparison on Abdomen" in page.text
    assert "Ours: ahead of the control." in page.text
    assert "unknown Ours 7 unknown unknown Abdomen unknown" in page.text
    assert not re.search(r"\b(nan|None)\b|<NA>", page.text)


def test_command_reports_on_a_study_in_its_folder(study: list[PredictedRun], tmp_path: Path) -> None:
    described = Study(tmp_path / "study", (1,), (), tolerance_mm=2.5)
    chosen = [run for run in study if run.labelled == 4]
    assert report.run(parsed("study.yaml", "--worst-cases", "0", "-np", "1"), lambda file: (described, chosen)) == 0
    page = Page((tmp_path / "study" / "report" / "report.html").read_text(encoding="utf-8"))
    assert "within 2.5 mm" in page.text and page.text.startswith("study ")


def test_a_study_is_compared_with_another_of_its_methods_if_that_is_named(
    study: list[PredictedRun], tmp_path: Path
) -> None:
    described = Study(tmp_path / "study", (1,), ())
    call = parsed("study.yaml", "--worst-cases", "0", "-np", "1", "--control", "Ours")
    assert report.run(call, lambda file: (described, [run for run in study if run.labelled == 4])) == 0
    page = Page((tmp_path / "study" / "report" / "report.html").read_text(encoding="utf-8"))
    assert page.text.startswith("study, compared with Ours ")
    assert "Baseline, 4 labelled: behind the control." in page.text and "Ours (control)" in page.text


def test_upper_bounds_stay_what_they_are_whatever_others_are_compared_with(study: list[PredictedRun]) -> None:
    bound = replace(study[0], role="upper bound", method="Ours", labelled=40)
    roles = {(run.method, run.labelled): run.role for run in with_control([*study, bound], "Ours")}
    assert roles["Ours", 40] == "upper bound" and roles["Ours", 4] == "control" and roles["Baseline", 4] == "method"
    with pytest.raises(UserError, match="--control Theirs is not among the predictions: .*Baseline"):
        with_control(study, "Theirs")


@pytest.mark.parametrize("arguments, message", [
    ([], "Give a study file, or all of --truth"),
    (["--truth", "labelsTs"], "Give a study file, or all of --truth"),
    (["study.yaml", "--truth", "labelsTs"], "Give a study file, or all of --truth"),
    (["study.yaml", "--upper-bound", "A", "--images", "."],
     "A study has its own: leave out --images and --upper-bound"),
    (["--truth", ".", "--dataset-json", "d.json", "--predictions", "folder"], "takes NAME=FOLDER, not 'folder'"),
    (["--truth", ".", "--dataset-json", "d.json", "--predictions", "A=."], "d.json is not a dataset.json"),
    (["--truth", ".", "--dataset-json", "d.json", "--predictions", "A=absent"], "absent is not a folder"),
    (["--truth", ".", "--dataset-json", "d.json", "--predictions", "A=.", "--control", "B"],
     "--control B is not among the predictions: A"),
    (["--truth", ".", "--dataset-json", "d.json", "--predictions", "A=.", "--tolerance", "-1"],
     "The tolerance and the number of worst cases must not be negative"),
    (["study.yaml"], "Reports of studies: nnunetv2_semi benchmark report STUDY"),
])  # fmt: skip
def test_wrong_calls_are_told(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)):
        report.run(parsed(*arguments))
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named_with_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "statsmodels", None)
    with pytest.raises(UserError, match=r'Reports need statsmodels: pip install "nnunetv2-semi\[benchmark\]"'):
        write_report([], tmp_path, "")
    with pytest.raises(UserError, match="Reports need statsmodels"):  # before anything is read
        report.run(parsed("no_study.yaml", "--postprocessing", "no.pkl"), lambda _: pytest.fail("the study was read"))


def test_a_name_given_twice_is_two_seeds(tmp_path: Path) -> None:
    named = [("A", tmp_path), ("B", tmp_path), ("A", tmp_path)]
    runs = predictions_of(named, tmp_path, tmp_path / "dataset.json", control="A", upper_bound="B")
    assert [(run.method, run.seed, run.role) for run in runs] == [
        ("A", 0, "control"), ("B", None, "upper bound"), ("A", 1, "control")
    ]  # fmt: skip


def test_regions_and_flat_images_are_drawn(tmp_path: Path) -> None:
    content = {"labels": {"background": 0, "whole": [1, 2], "core": [2]}, "regions_class_order": [1, 2],
               "file_ending": ".png", "channel_names": {"0": "R"}}  # fmt: skip
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    for folder, shift in (("labelsTs", 0), ("A", 1), ("imagesTs", 0)):
        (tmp_path / folder).mkdir()
        for case in "ab":
            array = np.zeros((16, 20), np.uint8)
            array[4:10, 4 + shift : 12] = 1
            array[6:8, 6:8] = 2
            name = f"{case}_0000.png" if folder == "imagesTs" else f"{case}.png"
            io.imsave(tmp_path / folder / name, array, check_contrast=False)
    truth, images = tmp_path / "labelsTs", tmp_path / "imagesTs"
    runs = predictions_of([("A", tmp_path / "A")], truth, tmp_path / "dataset.json", images)
    write_report(runs, tmp_path / "out", "Flat", num_processes=1)
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert any(text and text.startswith("Outlines") for text in page.alternatives)
    assert "A: not compared, because there is no control." in page.text
    assert "Core" in page.text and "Whole" in page.text


def test_checkpoints_that_are_no_checkpoints_have_no_curves(tmp_path: Path) -> None:
    assert curves_of(tmp_path) is None
    (tmp_path / "checkpoint_final.pth").write_bytes(b"not a checkpoint")
    assert curves_of(tmp_path) is None
    torch.save({"weights": 1}, tmp_path / "checkpoint_final.pth")
    assert curves_of(tmp_path) is None
