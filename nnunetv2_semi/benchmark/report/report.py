"""``nnunetv2_semi benchmark report``: tables and a page from predictions of test cases."""

from __future__ import annotations

import argparse
import importlib.util
import pickle
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from nnunetv2_semi.benchmark.report.runs import PredictedRun, Role
from nnunetv2_semi.benchmark.study.study import Study
from nnunetv2_semi.data.atomic_files import read_json_object, whole_file
from nnunetv2_semi.errors import UserError, one_line

# Beyond what a training needs; the modules that use them are imported where they are needed.
PACKAGES = ("jinja2", "monai", "pandas", "statsmodels")
FOLDER = "report"
WORST_CASES = 2
# About a voxel of most CT and MR. Better: the distance between two raters, which depends on the organ.
TOLERANCE_MM = Study.tolerance_mm

StudyRuns = Callable[[Path], tuple[Study, Sequence[PredictedRun]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``nnunetv2_semi benchmark report``."""
    parser.add_argument("study", type=Path, nargs="?", help="study file (YAML); or --truth, --dataset-json and "
                                                            "--predictions, for predictions of any tool")  # fmt: skip
    parser.add_argument("--truth", type=Path, metavar="FOLDER", help="labels of the test cases, as labelsTs")
    parser.add_argument("--dataset-json", type=Path, metavar="FILE", help="names labels and file ending")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="images of the test cases, as imagesTs")
    parser.add_argument("--predictions", nargs="+", metavar="NAME=FOLDER", default=[],
                        help="one file a case, named as in --truth; the same name again is another seed")  # fmt: skip
    parser.add_argument("--control", metavar="NAME",
                        help="the method that others are compared with (default: the study's control)")  # fmt: skip
    parser.add_argument("--upper-bound", metavar="NAME", help="the predictions of a training with all labels")
    parser.add_argument("--title", help="of the page")
    parser.add_argument("--tolerance", type=float, metavar="MM",
                        help=f"of the surface Dice, NSD (default: the study's; else {TOLERANCE_MM:g})")  # fmt: skip
    parser.add_argument("--postprocessing", type=Path, metavar="FILE",
                        help="nnU-Net's postprocessing.pkl: measure what it makes of all predictions")  # fmt: skip
    parser.add_argument("--worst-cases", type=int, default=WORST_CASES, metavar="N",
                        help=f"to draw for each method (default: {WORST_CASES})")  # fmt: skip
    parser.add_argument("-np", type=int, metavar="N", dest="num_processes",
                        help="cases measured at once (default: as nnU-Net)")  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER",
                        help=f"for the report (default: {FOLDER} in the study's folder, else here)")  # fmt: skip


def run(args: argparse.Namespace, study_runs: StudyRuns | None = None) -> int:
    """Write the report of a study or of plain folders.

    Args:
        args: As declared in ``add_arguments``.
        study_runs: Reads a study file and gives its finished runs.

    Raises:
        UserError: The call or a file is wrong; nothing is written.
    """
    plain = {"--truth": args.truth, "--dataset-json": args.dataset_json, "--predictions": args.predictions}
    missing = [option for option, value in plain.items() if not value]
    if (args.study is None) == (len(missing) == len(plain)) or (args.study is None and missing):
        raise UserError("Give a study file, or all of --truth, --dataset-json and --predictions.")
    _check_packages()
    tolerance, title, folder = args.tolerance, args.title, args.output
    if args.study is not None:
        if unused := [name for name, value in {"--images": args.images, "--upper-bound": args.upper_bound}.items()
                      if value is not None]:
            raise UserError(f"A study has its own: leave out {' and '.join(unused)}.")
        if study_runs is None:
            raise UserError("Reports of studies: nnunetv2_semi benchmark report STUDY")
        study, runs = study_runs(args.study)
        tolerance = study.tolerance_mm if tolerance is None else tolerance
        title, folder = title or study.title or study.name, folder or study.folder / FOLDER
        if args.control is not None:
            runs, title = with_control(runs, args.control), f"{title}, compared with {args.control}"
    else:
        named = [_name_and_folder(text) for text in args.predictions]
        runs = predictions_of(named, args.truth, args.dataset_json, args.images, args.control, args.upper_bound)
        title, folder = title or f"Comparison on {runs[0].dataset}", folder or Path(FOLDER)
    tolerance = TOLERANCE_MM if tolerance is None else tolerance
    if args.postprocessing is not None:
        title = f"{title}, postprocessed with {args.postprocessing.name}"
    with postprocessed(runs, args.postprocessing) as measured:
        write_report(measured, folder, title, tolerance, worst_cases=args.worst_cases, num_processes=args.num_processes)
    print(f"Report: {(folder / 'report.html').resolve()}")
    return 0


@contextmanager
def postprocessed(runs: Sequence[PredictedRun], file: Path | None) -> Iterator[Sequence[PredictedRun]]:
    """The runs, with predictions that nnU-Net's postprocessing.pkl was applied to; as they are without a file.

    The file is unpickled, which runs code in it: use files that you trust, as for nnUNetv2_apply_postprocessing.

    Raises:
        UserError: the file cannot be read.
    """
    if file is None:
        yield runs
        return
    from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name
    from nnunetv2.postprocessing.remove_connected_components import load_postprocess_save

    from nnunetv2_semi.benchmark.report.measures import case_files, reader_name

    try:
        with file.open("rb") as stream:
            functions, arguments = pickle.load(stream)
    except Exception as error:  # unpickling raises whatever the file makes it
        raise UserError(f"{file} is not nnU-Net's postprocessing.pkl: {one_line(error)}") from error
    with tempfile.TemporaryDirectory() as folder:
        changed = []
        for number, run in enumerate(runs):
            changed.append(replace(run, predictions=Path(folder, str(number))))
            changed[-1].predictions.mkdir()
            cases = case_files(run)
            reader = recursive_find_reader_writer_by_name(reader_name(run, cases[0].truth))()
            for case in cases:
                if case.prediction.is_file():
                    output = str(changed[-1].predictions / case.prediction.name)
                    load_postprocess_save(str(case.prediction), output, reader, functions, arguments)
        yield changed


def predictions_of(
    name_and_folders: Sequence[tuple[str, Path]],
    truth: Path,
    dataset_json: Path,
    images: Path | None = None,
    control: str | None = None,
    upper_bound: str | None = None,
) -> list[PredictedRun]:
    """Runs from plain folders, made by any tool.

    Args:
        name_and_folders: Name of the method, and folder with one file a case. A name that comes again is another seed.
        truth: Folder with labels of the test cases.
        dataset_json: nnU-Net's dataset.json.
        images: Folder with images of the test cases, for pictures.
        control: Name of the method that others are compared with.
        upper_bound: Name of the method that was trained with all labels.

    Raises:
        UserError: A folder does not exist, or ``control`` or ``upper_bound`` is not among the names.
    """
    names = [name for name, _ in name_and_folders]
    _check_named("--upper-bound", upper_bound, names)
    for folder in (truth, *([images] if images else []), *(folder for _, folder in name_and_folders)):
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder.")
    content = read_json_object(str(dataset_json)) or {}
    dataset = str(content.get("name") or truth.resolve().parent.name)
    runs = []
    for index, (name, folder) in enumerate(name_and_folders):
        seed = names[:index].count(name) if names.count(name) > 1 else None
        role: Role = "upper bound" if name == upper_bound else "method"
        runs.append(PredictedRun(dataset, dataset, None, name, role, seed, None, folder, truth, images, dataset_json))
    return runs if control is None else with_control(runs, control)


def with_control(runs: Sequence[PredictedRun], control: str) -> list[PredictedRun]:
    """The runs, all compared with the method of that name; upper bounds stay what they are.

    Raises:
        UserError: There is no such method.
    """
    _check_named("--control", control, [run.method for run in runs if run.role != "upper bound"])
    return [run if run.role == "upper bound" else replace(run, role="control" if run.method == control else "method")
            for run in runs]


def _check_named(option: str, name: str | None, names: Sequence[str]) -> None:
    if name is not None and name not in names:
        raise UserError(f"{option} {name} is not among the predictions: {', '.join(dict.fromkeys(names))}.")


def write_report(
    runs: Sequence[PredictedRun],
    folder: Path,
    title: str,
    tolerance_mm: float = TOLERANCE_MM,
    *,
    worst_cases: int = WORST_CASES,
    num_processes: int | None = None,
) -> None:
    """Write measures.csv, summary.csv, report.md and report.html, each whole.

    Args:
        runs: What is compared.
        folder: For the four files; made if need be.
        title: Of the page.
        tolerance_mm: Of NSD.
        worst_cases: Cases drawn for each method and number of labelled cases.
        num_processes: Cases measured at once; by default as many as nnU-Net uses.

    Raises:
        UserError: The packages of ``nnunetv2-semi[benchmark]`` are missing, or predictions are missing or do not
            belong to the truth.
    """
    _check_packages()
    if not (tolerance_mm >= 0 and worst_cases >= 0):
        raise UserError("The tolerance and the number of worst cases must not be negative.")
    import pandas as pd

    from nnunetv2_semi.benchmark.report.domains import domains_of_groups, with_domain_column, with_domain_rows
    from nnunetv2_semi.benchmark.report.measures import label_means, measure_runs
    from nnunetv2_semi.benchmark.report.page import as_html, as_markdown
    from nnunetv2_semi.benchmark.report.sections import sections_of
    from nnunetv2_semi.benchmark.report.summary import summarise

    domains = domains_of_groups(runs)
    measures = measure_runs(runs, tolerance_mm, num_processes=num_processes)
    summary = with_domain_rows(summarise(measures), measures, domains)
    with_means = pd.concat([label_means(measures), measures], ignore_index=True)
    sections = sections_of(runs, with_means, summary, tolerance_mm, worst_cases)
    contents = {
        "measures.csv": with_domain_column(measures, domains).to_csv(index=False),
        "summary.csv": summary.to_csv(index=False),
        "report.md": as_markdown(title, sections),
        "report.html": as_html(title, sections),
    }
    for name, content in contents.items():
        with whole_file(folder / name) as unfinished:
            Path(unfinished).write_text(content, encoding="utf-8")


def _check_packages() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'Reports need {", ".join(missing)}: pip install "nnunetv2-semi[benchmark]"')


def _name_and_folder(text: str) -> tuple[str, Path]:
    name, sign, folder = text.partition("=")
    if not (name and sign and folder):
        raise UserError(f"--predictions takes NAME=FOLDER, not {text!r}.")
    return name, Path(folder)
