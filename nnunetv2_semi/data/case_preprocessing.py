"""Preprocessing of single unlabelled cases, whole or not at all."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_semi import compat
from nnunetv2_semi.data.case_channels import PRESENT_CHANNELS
from nnunetv2_semi.data.case_records import CaseRecords
from nnunetv2_semi.data.file_contents import FileContent
from nnunetv2_semi.data.filling_preprocessor import FillingPreprocessor
from nnunetv2_semi.data.preprocessed_images import image_problem
from nnunetv2_semi.data.resampled_size import size_problem
from nnunetv2_semi.errors import UserError, one_line, shown
from nnunetv2_semi.processes.pool import results_in_parallel

_UNFINISHED_FOLDER = "unfinished"
_LEFTOVERS_AFTER_SECONDS = 24 * 3600.0


@dataclass(frozen=True)
class PreprocessingJob:
    """What a worker process needs to preprocess a case.

    Attributes:
        plans_manager: of the data set.
        configuration_manager: of the configuration.
        dataset_json: content of dataset.json.
        preprocessor_class: None for the one that the configuration names.
        folder: where finished cases go.
    """

    plans_manager: PlansManager
    configuration_manager: ConfigurationManager
    dataset_json: dict
    preprocessor_class: type[DefaultPreprocessor] | None
    folder: str

    @property
    def preprocessor(self) -> type[DefaultPreprocessor]:
        """The class to use. Raises UserError where nnU-Net does not find the one that the configuration names."""
        found = self.preprocessor_class or self.configuration_manager.preprocessor_class
        if found is None:
            raise UserError(
                f"The plans name the preprocessor {self.configuration_manager.preprocessor_name}, which nnU-Net does "
                f"not find. Run `nnunetv2_semi doctor` to see whether the plug-in is visible to nnU-Net."
            )
        return found


def preprocess_missing(
    job: PreprocessingJob,
    cases: Mapping[str, list[str]],
    contents: Mapping[str, FileContent],
    lacking: Mapping[str, Sequence[int]],
    records: CaseRecords,
    num_processes: int,
    show_progress_bar: bool,
    report: Callable[[str], None],
) -> dict[str, str]:
    """Preprocess those of `cases` (name to channel files) that are not done, and record each when its files are there.

    Args:
        job: what and where.
        cases: readable cases only.
        contents: of every channel file.
        lacking: case name to the channels that it has, of the cases that lack some.
        records: of the same folder.
        num_processes: 1 works in the calling process.
        show_progress_bar: one step per case.
        report: receives one line if there is anything to do.

    Returns:
        Case name to the reason, of cases whose image cannot be used: preprocessed, it is none. They are not done.

    Raises:
        UserError: nnU-Net does not find the preprocessor, or it cannot fill the channels that cases lack.
        RuntimeError: names the cases that failed, after the others are done.
    """
    missing = [
        case
        for case, files in cases.items()
        if not records.is_done(case, [contents[file] for file in files], lacking.get(case))
    ]
    if not missing:
        return {}
    report(f"Preprocessing {len(missing)} of {len(cases)} unlabelled cases into {job.folder}")
    preprocessor = job.preprocessor
    unfilled = [case for case in missing if case in lacking]
    if unfilled and not issubclass(preprocessor, FillingPreprocessor):
        raise UserError(
            f"{len(unfilled)} unlabelled case(s) lack channels ({shown(unfilled)}), and {preprocessor.__name__} "
            f'cannot fill them. Write "preprocessor_name": "nnUNetPreprocessorSemi" into the configuration in the '
            f"plans file (preprocessed cases that lack nothing stay as they are), or plan with -pl nnUNetPlannerSemi."
        )
    _remove_leftovers(job.folder)
    for case in missing:
        records.forget(case)
    failures: list[str] = []
    unusable: dict[str, str] = {}
    for (case, files), (outputs, failure, is_unusable) in results_in_parallel(
        partial(_preprocess_case, job),
        [(case, cases[case]) for case in missing],
        num_processes=num_processes,
        description="Preprocessing unlabelled cases",
        show_progress_bar=show_progress_bar,
    ):
        if is_unusable:
            unusable[case] = failure
        elif failure:
            failures.append(f"{case} ({failure})")
        else:
            records.write(case, files, [contents[file] for file in files], outputs, lacking.get(case))
    if failures:
        raise RuntimeError(
            f"Preprocessing failed for {len(failures)} unlabelled case(s): {'; '.join(sorted(failures))}"
        )
    return dict(sorted(unusable.items()))


def _preprocess_case(job: PreprocessingJob, task: tuple[str, list[str]]) -> tuple[dict[str, int], str, bool]:
    """Write one case's files, each whole, if they are an image.

    Returns the size of each file by name, the reason of a failure or '', and whether the image is the reason.
    """
    case, files = task
    unfinished = os.path.join(job.folder, _UNFINISHED_FOLDER, uuid.uuid4().hex)
    os.makedirs(unfinished)
    try:
        target = os.path.join(unfinished, case)
        job.preprocessor(verbose=False).run_case_save(
            target,
            files,
            None,
            job.plans_manager,
            job.configuration_manager,
            job.dataset_json,  # type: ignore[arg-type]
        )
        problem = stored_image_problem(unfinished, case)
        if problem is not None:
            return {}, problem, True
        compat.add_empty_class_locations(target + ".pkl")
        outputs = {name: os.path.getsize(os.path.join(unfinished, name)) for name in sorted(os.listdir(unfinished))}
        for name in outputs:
            os.replace(os.path.join(unfinished, name), os.path.join(job.folder, name))
        return outputs, "", False
    except MemoryError:
        raise
    except Exception as error:  # the other cases are still to be done
        problem = _problem_after_cropping(job, files)
        return {}, problem or one_line(error), problem is not None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def stored_image_problem(folder: str, case: str) -> str | None:
    """`image_problem` of a preprocessed case."""
    image, mask, _, properties = infer_dataset_class(folder)(folder, [case]).load_case(case)
    return image_problem(image, mask, properties.get(PRESENT_CHANNELS))


def _problem_after_cropping(job: PreprocessingJob, files: list[str]) -> str | None:
    """Why the part of an image that is not zero cannot be resampled; None if that is not why preprocessing failed."""
    try:
        image, properties = job.plans_manager.image_reader_writer_class().read_images(files)
        cropped, _, _ = crop_to_nonzero(image)
        problem = size_problem(
            cropped.shape[1:], properties["spacing"], len(image), job.plans_manager, job.configuration_manager
        )
    except MemoryError:
        raise
    except Exception:  # the error that preprocessing ended with says more
        return None
    return problem and f"cropped to what is not zero, {problem}"


def _remove_leftovers(folder: str) -> None:
    """Remove what killed runs left unfinished; what is younger may belong to a run on another node."""
    unfinished = os.path.join(folder, _UNFINISHED_FOLDER)
    if not os.path.isdir(unfinished):
        return
    for name in os.listdir(unfinished):
        path = os.path.join(unfinished, name)
        if os.path.isdir(path) and time.time() - os.path.getmtime(path) > _LEFTOVERS_AFTER_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
