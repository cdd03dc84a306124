"""One case whose modalities are aligned to one of them, and written into a new raw data set.

Beside the data set's own folders, `alignment/` has a record of each case (written last, so that it tells that all else
is there) and the transforms.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import SimpleITK as sitk

from nnunetv2_semi.data.alignment_source import SourceCase
from nnunetv2_semi.data.atomic_files import read_json_object, write_json_whole
from nnunetv2_semi.data.cached_reading import file_stamp
from nnunetv2_semi.data.dataset_settings import folder_name
from nnunetv2_semi.data.elastix_registration import ElastixBackend
from nnunetv2_semi.data.file_integrity import check_file_complete
from nnunetv2_semi.data.registration import Backend, Kind, Quality, Registered, SimpleITKBackend, register
from nnunetv2_semi.errors import UserError, one_line
from nnunetv2_semi.processes.pool import results_in_parallel

BACKENDS = ("simpleitk", "elastix")
FOLDER = "alignment"
_INTERPOLATORS = {"linear": sitk.sitkLinear, "bspline": sitk.sitkBSpline}
_SAME_GRID = 1e-3  # mm, and of direction cosines


@dataclass(frozen=True)
class AlignmentOptions:
    """How cases are aligned, and where to.

    Attributes:
        target: folder of the new data set.
        file_ending: of its images.
        modalities: name to channels.
        fixed: the modality that the others are registered to.
        kind: of transform.
        backend: one of `BACKENDS`.
        interpolation: linear or bspline.
    """

    target: str
    file_ending: str
    modalities: Mapping[str, Sequence[int]]
    fixed: str
    kind: Kind = "rigid"
    backend: str = "simpleitk"
    interpolation: Literal["linear", "bspline"] = "linear"


@dataclass(frozen=True, kw_only=True)
class AlignedModality(Quality):
    """Quality of the registration of ``modality`` to ``fixed``."""

    modality: str
    fixed: str


@dataclass(frozen=True)
class AlignedCase:
    """What became of a case.

    Attributes:
        split, name: of the case.
        failure: why it was left out; "" if it was not.
        note: what is unusual about it; "" if nothing is.
        modalities: those that were registered.
    """

    split: str
    name: str
    failure: str = ""
    note: str = ""
    modalities: list[AlignedModality] = field(default_factory=list)


def backend_named(name: str) -> Backend:
    """One of `BACKENDS`.

    Raises:
        UserError: it is not installed.
    """
    return ElastixBackend() if name == "elastix" else SimpleITKBackend()


def align_cases(cases: Sequence[SourceCase], options: AlignmentOptions, num_processes: int) -> list[AlignedCase]:
    """Align those that are not yet aligned, in parallel, with a progress bar; all outcomes, in the order of ``cases``.

    Cases that failed before, or whose files changed since, are done again.
    """
    outcomes = {(case.split, case.name): finished(case, options) for case in cases}
    rest = [case for case in cases if outcomes[case.split, case.name] is None]
    for case, outcome in results_in_parallel(partial(align_case, options=options), rest, num_processes=num_processes,
                                             description="Aligning"):
        outcomes[case.split, case.name] = outcome
    return [outcome for outcome in outcomes.values() if outcome is not None]


def finished(case: SourceCase, options: AlignmentOptions) -> AlignedCase | None:
    """The outcome of a case that was aligned before; None if it must be done."""
    record = read_json_object(_record_file(case.split, case.name, options))
    if record is None or record["failure"] or record.pop("sources") != _states(case):
        return None
    modalities = [AlignedModality(**modality) for modality in record.pop("modalities")]
    return AlignedCase(**record, modalities=modalities)


def align_case(case: SourceCase, options: AlignmentOptions) -> AlignedCase:
    """Register, resample and write one case; what goes wrong with its images is told, not raised."""
    remove_case(case.split, case.name, options)
    unfinished = os.path.join(options.target, FOLDER, "unfinished", f"{case.split}_{case.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        outcome = _write(case, options, unfinished)
        # Moved whole, never seen half-written under their names.
        for file in sorted(path for path in Path(unfinished).rglob("*") if path.is_file()):
            to = os.path.join(options.target, file.relative_to(unfinished))
            os.makedirs(os.path.dirname(to), exist_ok=True)
            os.replace(file, to)
    except (MemoryError, UserError):
        raise
    except Exception as error:  # SimpleITK and elastix raise RuntimeError with any message; readers raise anything
        outcome = AlignedCase(case.split, case.name, failure=_reason(error))
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    write_json_whole(_record_file(case.split, case.name, options), asdict(outcome) | {"sources": _states(case)})
    return outcome


def remove_case(split: str, name: str, options: AlignmentOptions) -> None:
    """Remove what was written of a case, its record first."""
    Path(_record_file(split, name, options)).unlink(missing_ok=True)
    ending = options.file_ending
    files = [transform_file(options, split, name, modality, inverse) for modality in options.modalities
             for inverse in (False, True)]
    channels = (channel for channels in options.modalities.values() for channel in channels)
    files += [image_file(options, split, name, channel) for channel in channels]
    for file in [*files, os.path.join(options.target, f"labels{split}", name + ending)]:
        Path(file).unlink(missing_ok=True)


def image_file(options: AlignmentOptions, split: str, name: str, channel: int) -> str:
    """Of a channel in the new data set."""
    return os.path.join(options.target, f"images{split}", f"{name}_{channel:04d}{options.file_ending}")


def transform_file(options: AlignmentOptions, split: str, name: str, modality: str, inverse: bool = False) -> str:
    """Of a registered modality."""
    end = "_inverse.tfm" if inverse else ".tfm"
    return os.path.join(options.target, FOLDER, "transforms", split, f"{name}_{folder_name(modality)}{end}")


def resampled(image: sitk.Image, fixed: sitk.Image, transform: sitk.Transform, interpolation: str) -> sitk.Image:
    """``image`` on the grid of ``fixed``, with its own voxel type and range; its minimum where it shows nothing."""
    lowest, highest = (float(value) for value in _range(image))
    moved = sitk.Resample(sitk.Cast(image, sitk.sitkFloat64), fixed, transform, _INTERPOLATORS[interpolation], lowest)
    kind = image.GetPixelID()
    if kind not in (sitk.sitkFloat32, sitk.sitkFloat64):
        moved = sitk.Round(moved)
    return sitk.Clamp(moved, kind, lowest, highest)  # splines overshoot


def read_image(file: str) -> sitk.Image:
    """A scalar image of two or three axes.

    Raises:
        RuntimeError, OSError, EOFError: it is none, is damaged, or has voxels that are not finite.
    """
    check_file_complete(file)
    image = sitk.ReadImage(file)
    if image.GetNumberOfComponentsPerPixel() > 1 or image.GetDimension() > 3:
        raise RuntimeError(f"{os.path.basename(file)} holds several channels: write each into a file of its own")
    if not np.isfinite(sitk.GetArrayViewFromImage(image)).all():
        raise RuntimeError(f"{os.path.basename(file)} has voxels that are not finite numbers (NaN or infinity)")
    return image


def _write(case: SourceCase, options: AlignmentOptions, folder: str) -> AlignedCase:
    there = {name: present for name, channels in options.modalities.items()
             if (present := [channel for channel in channels if channel in case.images])}
    note, fixed_name = "", options.fixed
    if fixed_name not in there:
        fixed_name = next(iter(there), "")
        note = f"{options.fixed} is missing: " + ("left as it is" if len(there) < 2 else f"aligned to {fixed_name}")
    reference = read_image(case.images[there[fixed_name][0]]) if there else None
    written = replace(options, target=folder)
    done = []
    for modality, channels in there.items():
        images = {channel: read_image(case.images[channel]) for channel in channels}
        transform = None
        if modality != fixed_name and reference is not None:
            try:
                found = register(images[channels[0]], reference, options.kind, backend_named(options.backend))
            except RuntimeError as error:
                raise RuntimeError(f"{modality} to {fixed_name}: {_reason(error)}") from error
            done.append(_quality(modality, fixed_name, found))
            transform = found.transform
            _write_transforms(written, case, modality, transform)
        for channel, image in images.items():
            path = image_file(written, case.split, case.name, channel)
            _place(image, case.images[channel], reference, transform, options.interpolation, path)
    if reference is not None:
        _equal_headers([image_file(written, case.split, case.name, channel)
                        for channels in there.values() for channel in channels])
    if case.label:
        label = os.path.join(folder, f"labels{case.split}", case.name + options.file_ending)
        os.makedirs(os.path.dirname(label), exist_ok=True)
        shutil.copyfile(case.label, label)
    return AlignedCase(case.split, case.name, note=note, modalities=done)


def _place(image: sitk.Image, original: str, reference: sitk.Image | None, transform: sitk.Transform | None,
           interpolation: str, path: str) -> None:
    """Write an image; the original file where nothing moves it."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    identity = sitk.Transform(image.GetDimension(), sitk.sitkIdentity)
    if reference is None or (transform is None and _on_one_grid(image, reference)):
        shutil.copyfile(original, path)
    else:
        moved = resampled(image, reference, transform or identity, interpolation)
        sitk.WriteImage(moved, path, useCompression=True)


def _equal_headers(files: Sequence[str]) -> None:
    """Write images anew whose headers, once written, differ in the last digits: nnU-Net wants equal ones."""
    def spacing(file: str) -> tuple[float, ...]:
        reader = sitk.ImageFileReader()
        reader.SetFileName(file)
        reader.ReadImageInformation()
        return tuple(reader.GetSpacing())

    if len({spacing(file) for file in files}) > 1:
        reference = sitk.ReadImage(files[0])
        for file in files:
            image = sitk.ReadImage(file)
            image.CopyInformation(reference)
            sitk.WriteImage(image, file, useCompression=True)


def _write_transforms(written: AlignmentOptions, case: SourceCase, modality: str, transform: sitk.Transform) -> None:
    for inverse, content in ((False, transform), (True, transform.GetInverse())):
        path = transform_file(written, case.split, case.name, modality, inverse)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        sitk.WriteTransform(content, path)


def _quality(modality: str, fixed: str, found: Registered) -> AlignedModality:
    values = {key: value for key, value in vars(found).items() if key != "transform"}
    return AlignedModality(modality=modality, fixed=fixed, **values)


def _on_one_grid(first: sitk.Image, second: sitk.Image) -> bool:
    return first.GetSize() == second.GetSize() and all(
        np.allclose(getattr(first, get)(), getattr(second, get)(), atol=_SAME_GRID)
        for get in ("GetSpacing", "GetOrigin", "GetDirection"))


def _range(image: sitk.Image) -> tuple[float, float]:
    voxels = sitk.GetArrayViewFromImage(image)
    return voxels.min(), voxels.max()


def _record_file(split: str, name: str, options: AlignmentOptions) -> str:
    return os.path.join(options.target, FOLDER, "cases", f"{split}_{name}.json")


def _states(case: SourceCase) -> dict[str, list[int]]:
    """The stamp of each file that is there: a link may lead nowhere, and reading it says so.

    By its place in the case too: files of several folders may have one name.
    """
    return {f"{place} {os.path.basename(file)}": file_stamp(file) for place, file in enumerate(case.files)
            if os.path.isfile(file)}


def _reason(error: BaseException) -> str:
    """What to tell of an error: of ours the message, of ITK's the last of several lines, of others the kind too."""
    if isinstance(error, RuntimeError):
        lines = [line for line in str(error).splitlines() if line.strip()]
        return " ".join((lines or ["unknown"])[-1].split())[:300]
    return one_line(error)
