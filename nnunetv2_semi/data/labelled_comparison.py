"""Whether the preprocessed labelled cases are those of the raw data set, and images.

nnU-Net does not tell. A case whose label was taken away stays in its folder, and in the validation split, while its
image may be unlabelled training data by then. Its files are compared and never written.
"""

from __future__ import annotations

import filecmp
import hashlib
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_semi.data.atomic_files import read_json_object
from nnunetv2_semi.data.cached_reading import companion_files, saved_now_and_then
from nnunetv2_semi.data.case_channels import PRESENT_CHANNELS
from nnunetv2_semi.data.case_preprocessing import PreprocessingJob, stored_image_problem
from nnunetv2_semi.data.case_records import plans_digest
from nnunetv2_semi.data.dataset_settings import num_channels
from nnunetv2_semi.data.file_contents import FileContent, file_contents, refuse_unreadable
from nnunetv2_semi.data.grids import same_spacing
from nnunetv2_semi.data.label_files import Labels, read_labels
from nnunetv2_semi.data.raw_cases import list_labelled_cases
from nnunetv2_semi.data.resampled_size import NO_RESAMPLING, resampled_shape
from nnunetv2_semi.data.thumbnails import look_alikes, thumbnail
from nnunetv2_semi.errors import UserError, one_line
from nnunetv2_semi.processes.pool import results_in_parallel

_RECORD_VERSION = 2
_TOLERANCE = 1e-3  # of normalised intensities: other versions of the same libraries round otherwise


@dataclass(frozen=True)
class Comparison:
    """How a folder of preprocessed labelled cases differs from the raw data set.

    Attributes:
        gone: preprocessed, but no labelled case of the raw data set (any more).
        new: labelled in the raw data set, but not preprocessed.
        changed: case to what is another since it was preprocessed.
        unusable: case to why its preprocessed image is none.
    """

    gone: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    changed: dict[str, str] = field(default_factory=dict)
    unusable: dict[str, str] = field(default_factory=dict)

    @property
    def agrees(self) -> bool:
        """Whether preprocessing again would give the same cases."""
        return not (self.gone or self.new or self.changed)

    def findings(self) -> list[str]:
        """One text per case that differs."""
        return [
            *(f"{case} (preprocessed, but not a labelled case of the raw data set any more)" for case in self.gone),
            *(f"{case} (labelled in the raw data set, but not preprocessed)" for case in self.new),
            *(f"{case} ({reason})" for case, reason in self.changed.items()),
        ]


def names_preprocessed(folder: str) -> set[str]:
    """Cases of which nnU-Net's preprocessing has begun to write files into a folder; empty if there is none."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return {name.removesuffix(".pkl") for name in names if name.endswith(".pkl")} | {
        name.removesuffix(ending) for name in names for ending in (".b2nd", ".npz")
        if name.endswith(ending) and not name.endswith(f"_seg{ending}")
    }  # fmt: skip


def labelled_folder(plans_manager: PlansManager, configuration_manager: ConfigurationManager) -> str:
    """Where nnU-Net puts the configuration's preprocessed labelled cases."""
    return os.path.join(nnUNet_preprocessed, plans_manager.dataset_name, configuration_manager.data_identifier)


def read_labelled(
    plans_manager: PlansManager,
    dataset_json: dict,
    *,
    num_processes: int,
    report: Callable[[str], None] = print,
    show_progress_bar: bool = True,
) -> tuple[dict[str, FileContent], Labels]:
    """Read images, by file, and labels of the labelled cases of the raw data set, with the caches beside the plans.

    Raises UserError for images that cannot be read.
    """
    raw_dataset_folder = os.path.join(nnUNet_raw, plans_manager.dataset_name)
    images, unreadable = file_contents(
        [file for files in list_labelled_cases(raw_dataset_folder, dataset_json).values() for file in files],
        cache_folder=os.path.join(nnUNet_preprocessed, plans_manager.dataset_name),
        raw_dataset_folder=raw_dataset_folder,
        reader_name=plans_manager.plans["image_reader_writer"],
        num_processes=num_processes,
        show_progress_bar=show_progress_bar,
        report=report,
    )
    labels = read_labels(plans_manager, dataset_json, raw_dataset_folder, num_processes, show_progress_bar, report)
    refuse_unreadable(unreadable)
    return images, labels


def compare_with_raw(
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    dataset_json: dict,
    *,
    images: Mapping[str, FileContent],
    labels: Labels,
    num_processes: int,
    report: Callable[[str], None] = print,
    show_progress_bar: bool = True,
) -> Comparison:
    """Compare the preprocessed labelled cases with the raw data set.

    What a case was made of is recorded when it is first seen: then its size and voxel size are compared, and where a
    raw file is younger than the preprocessed one, its image looks another, or its label is another than nnU-Net's copy,
    or its size is not that of the plans, the case is preprocessed in memory and compared voxel by voxel. From then on
    contents and plans tell, and a copied or touched file is the same.
    Arguments as `nnunetv2_semi.data.labelled_checks.check_labelled_cases`, and `images` (by file) and `labels` as
    `read_labelled` gives them: cases with files that it could not read are not compared.
    """
    folder = labelled_folder(plans_manager, configuration_manager)
    labelled = list_labelled_cases(os.path.join(nnUNet_raw, plans_manager.dataset_name), dataset_json)
    there = names_preprocessed(folder)
    files = {case: (labelled[case], labels.files[case]) for case in sorted(set(labelled) & there & set(labels.files))}
    files = {case: (channels, label) for case, (channels, label) in files.items()
             if label in labels.contents and all(file in images for file in channels)}
    raw = {case: _raw_identity([images[file] for file in channels], labels.contents[label])
           for case, (channels, label) in files.items()}
    job = PreprocessingJob(plans_manager, configuration_manager, dataset_json, None, folder)
    changed, unusable = _changed_and_unusable(
        job, raw, files, images, num_processes, show_progress_bar, report
    )
    return Comparison(sorted(there - set(labelled)), sorted(set(labelled) - there), changed, unusable)


def _changed_and_unusable(
    job: PreprocessingJob,
    raw: Mapping[str, dict],
    files: Mapping[str, tuple[list[str], str]],
    images: Mapping[str, FileContent],
    num_processes: int,
    show_progress_bar: bool,
    report: Callable[[str], None],
) -> tuple[dict[str, str], dict[str, str]]:
    """Of cases that are raw and preprocessed: what changed, and why an image is none."""
    name = f"semi_labelled_{os.path.basename(job.folder)}.json"
    record_file = os.path.join(os.path.dirname(job.folder), name)
    record, plans = read_json_object(record_file) or {}, plans_digest(job.plans_manager, job.configuration_manager)
    known: dict[str, dict] = record.get("cases", {}) if record.get("version") == _RECORD_VERSION else {}
    current = {case: known[case] for case in raw if case in known}
    changed: dict[str, str] = {}
    tasks = []
    for case, identity in raw.items():
        entry, made = known.get(case), _preprocessed_identity(job.folder, case)
        if made is None:
            changed[case] = "files of its preprocessed case are missing"
        elif entry is None or entry["preprocessed"] != made:
            difference = _header_difference(job, case, [images[file] for file in files[case][0]])
            if difference is not None:
                changed[case] = difference
            else:
                thumbnails = [images[file].thumbnail for file in files[case][0]]
                tasks.append((case, *files[case], thumbnails, _may_be_another(job, case, *files[case])))
        elif entry["raw"] != identity or entry["plans"] != plans:
            tasks.append((case, *files[case], [], True))
    content = {"version": _RECORD_VERSION, "cases": current}
    with saved_now_and_then(record_file if tasks else None, content, report) as save:
        for (case, *_), (difference, problem) in results_in_parallel(
            partial(_examine, job),
            tasks,
            num_processes=num_processes,
            description="Comparing labelled cases",
            show_progress_bar=show_progress_bar,
        ):
            if difference is not None:
                changed[case] = difference
            else:
                made = _preprocessed_identity(job.folder, case)
                current[case] = {"preprocessed": made, "raw": raw[case], "plans": plans, "problem": problem}
            save()
    unusable = {case: current[case]["problem"] for case in raw
                if case not in changed and current[case]["problem"] is not None}
    return dict(sorted(changed.items())), unusable


def _examine(
    job: PreprocessingJob, task: tuple[str, list[str], str, list[str], bool]
) -> tuple[str | None, str | None]:
    """What differs when the case is preprocessed anew, if it may be another; and why the stored image is none."""
    case, images, label, thumbnails, may_be_another = task
    problem = stored_image_problem(job.folder, case)
    anew = may_be_another or (problem is None and not _looks_as_stored(job, case, images, label, thumbnails))
    return _difference_anew(job, case, images, label) if anew else None, problem


def _difference_anew(job: PreprocessingJob, case: str, images: list[str], label: str) -> str | None:
    try:
        image, segmentation, _ = job.preprocessor(verbose=False).run_case(
            images, label, job.plans_manager, job.configuration_manager, job.dataset_json
        )
    except (MemoryError, UserError):
        raise
    except Exception as error:  # whatever a reader or preprocessor raises
        return f"cannot be preprocessed any more: {one_line(error)}"
    stored_image, stored_segmentation, *_ = infer_dataset_class(job.folder)(job.folder, [case]).load_case(case)
    if not _close(stored_image[:], image):
        return "its image, or the plans, changed since it was preprocessed"
    if not np.array_equal(stored_segmentation[:], segmentation):
        return "its label changed since it was preprocessed"
    return None


def _close(first: np.ndarray, second: np.ndarray) -> bool:
    return first.shape == second.shape and np.allclose(first, second, _TOLERANCE, _TOLERANCE, equal_nan=True)


def _header_difference(job: PreprocessingJob, case: str, images: Sequence[FileContent]) -> str | None:
    with open(os.path.join(job.folder, f"{case}.pkl"), "rb") as file:
        properties = pickle.load(file)
    total = num_channels(job.dataset_json)
    channels = len(properties.get(PRESENT_CHANNELS, range(total))), sum(image.shape[0] for image in images)
    if channels[0] != channels[1]:
        return f"it had {channels[0]} channel(s) when it was preprocessed, and has {channels[1]} now"
    shape = tuple(images[0].shape[1:][axis] for axis in job.plans_manager.transpose_forward)
    before = tuple(int(size) for size in properties["shape_before_cropping"])
    if before != shape:
        return f"its size was {list(before)} voxels when it was preprocessed, and is {list(shape)} now"
    spacing = [float(size) for size in properties["spacing"]]
    if not same_spacing(spacing, images[0].spacing):
        return f"its voxel size was {spacing} mm when it was preprocessed, and is {list(images[0].spacing)} mm now"
    return None


def _may_be_another(job: PreprocessingJob, case: str, images: Sequence[str], label: str) -> bool:
    """Whether the files' times, or nnU-Net's copy of the label, leave open what the case was made of."""
    made = os.path.getmtime(os.path.join(job.folder, f"{case}.pkl"))
    sources = [*images, label]
    if any(os.path.getmtime(file) > made for source in sources for file in (source, *companion_files(source))):
        return True
    copy = os.path.join(os.path.dirname(job.folder), "gt_segmentations", case + job.dataset_json["file_ending"])
    return os.path.isfile(copy) and not filecmp.cmp(copy, label, shallow=False)


def _has_size_of_plans(job: PreprocessingJob, image: np.ndarray, properties: Mapping) -> bool:
    if job.configuration_manager.configuration.get("resampling_fn_data") == NO_RESAMPLING:
        return True
    cropped = [properties["shape_after_cropping_and_before_resampling"][axis]
               for axis in np.argsort(job.plans_manager.transpose_forward)]
    return tuple(image.shape[1:]) == resampled_shape(cropped, properties["spacing"], job.plans_manager,
                                                     job.configuration_manager)


def _looks_as_stored(job: PreprocessingJob, case: str, images: list[str], label: str,
                     thumbnails: Sequence[str]) -> bool:
    """Whether the preprocessed case looks like the raw one, so that they need not be compared voxel by voxel."""
    image, _, _, properties = infer_dataset_class(job.folder)(job.folder, [case]).load_case(case)
    if not _has_size_of_plans(job, image, properties):
        return False
    stored = _thumbnails(image, properties)
    return _alike(stored, thumbnails) or _alike(stored, _thumbnails_normalised(job, images, label))


def _thumbnails_normalised(job: PreprocessingJob, images: list[str], label: str) -> list[str]:
    """Of a raw case once it is cropped and normalised, as clipping or a mask may change how it looks.

    Without resampling, which takes most of the time. Empty if that fails: a comparison anew says why.
    """
    as_it_is = {"resampling_fn_data": NO_RESAMPLING, "resampling_fn_data_kwargs": {},
                "resampling_fn_seg": NO_RESAMPLING, "resampling_fn_seg_kwargs": {}}
    configuration = ConfigurationManager({**job.configuration_manager.configuration, **as_it_is})
    try:
        image, _, properties = job.preprocessor(verbose=False).run_case(
            images, label, job.plans_manager, configuration, job.dataset_json)
    except MemoryError:
        raise
    except Exception:  # whatever a reader or preprocessor raises
        return []
    return _thumbnails(image, properties)


def _thumbnails(image: np.ndarray, properties: Mapping) -> list[str]:
    """Of the channels that a preprocessed case has."""
    return [thumbnail(image[channel][:]) for channel in properties.get(PRESENT_CHANNELS, range(len(image)))]


def _alike(first: Sequence[str], second: Sequence[str]) -> bool:
    return len(first) == len(second) and all(
        here == there or bool(look_alikes([here], [there])) for here, there in zip(first, second, strict=True))


def _preprocessed_identity(folder: str, case: str) -> list | None:
    """Tells whether a case was preprocessed again; a copy of the folder has the same. None where a file is missing."""
    paths = [os.path.join(folder, case + ending) for ending in (".b2nd", "_seg.b2nd", ".npz")]
    sizes = [os.path.getsize(path) for path in paths if os.path.isfile(path)]
    properties = os.path.join(folder, f"{case}.pkl")
    if not os.path.isfile(properties) or (len(sizes) < 2 and not os.path.isfile(paths[-1])):
        return None
    with open(properties, "rb") as file:
        return [*sizes, hashlib.blake2b(file.read(), digest_size=20).hexdigest()]


def _raw_identity(images: Sequence[FileContent], label: FileContent) -> dict:
    contents = [[image.digest, list(image.shape), list(image.spacing)] for image in images]
    return {"images": contents, "label": label.digest}
