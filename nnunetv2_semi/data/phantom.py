"""A made-up abdomen, written as a complete nnU-Net raw data set with labelled and unlabelled cases.

It serves the demo, the tests and the documentation: nothing to download, any number of cases, 2D or 3D, one to four
modalities. `phantom_anatomy` has what is in the images.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunetv2_semi.data.atomic_files import whole_folder
from nnunetv2_semi.data.phantom_anatomy import (
    CT_MODALITIES,
    INTENSITY_SCALE,
    LABELS,
    MODALITIES,
    make_phantom_case,
    smooth_field,
)
from nnunetv2_semi.errors import UserError

IGNORE_LABEL = len(LABELS) + 1
SMALLEST_SIDE = 12


def make_phantom_dataset(
    raw_folder: Path,
    dataset_id: int = 1,
    name: str = "Phantom",
    *,
    labelled: int,
    unlabelled: int,
    test: int,
    shape: tuple[int, ...] = (40, 48, 40),
    channels: int = 2,
    regions: bool = False,
    ignore_label: bool = False,
    unpaired: bool = False,
    ct: bool = False,
    spacing: tuple[float, ...] | None = None,
    seed: int = 0,
    file_ending: str = ".nii.gz",
) -> Path:
    """Write a raw data set: ``imagesTr``, ``labelsTr``, ``imagesUn``, ``imagesTs``, ``labelsTs``, ``dataset.json``.

    Cases are numbered on through labelled, unlabelled and test ones; the image of case k depends on ``seed``, k,
    ``shape``, ``channels`` and ``ct`` alone. The folder appears only when it is complete.

    Args:
        raw_folder: Folder that holds raw data sets (``nnUNet_raw``); made if it does not exist.
        dataset_id: 1 to 999.
        name: Name of the data set, without the ``DatasetXXX_``.
        labelled: Number of cases with a label map, at least 1.
        unlabelled: Number of cases in ``imagesUn``; with 0 the folder is left out.
        test: Number of cases in ``imagesTs`` and ``labelsTs``; with 0 the folders are left out.
        shape: Two or three sides in voxels, each at least 12, in array order (z, y, x).
        channels: 1 to 4, the first ones of ``MODALITIES``, one file each.
        regions: Declare the overlapping regions liver (with its lesion), kidney, spine and lesion in place of labels.
        ignore_label: Label only a part of each structure in ``labelsTr``; the other voxels carry ``IGNORE_LABEL``.
        unpaired: Each case has one channel alone: case k has channel k modulo ``channels``.
        ct: The first channel is a CT in place of T1.
        spacing: Voxel size in mm, in the order of ``shape``; 2 mm by default. A .png file does not store it.
        seed: Of the random numbers.
        file_ending: ``.nii.gz`` or another SimpleITK format nnU-Net reads, or ``.png`` for 2D.

    Returns:
        The folder of the data set.

    Raises:
        UserError: The folder exists already.
        ValueError: An argument is out of its range.
    """
    _check_arguments(dataset_id, labelled, unlabelled, test, shape, channels, spacing, file_ending)
    folder = raw_folder / f"Dataset{dataset_id:03d}_{name}"
    if folder.exists():
        raise UserError(f"The phantom is not written: {folder} exists already. Remove it or choose another folder.")
    voxel_size = (2.0,) * len(shape) if spacing is None else spacing
    with whole_folder(folder) as unfinished:
        partial, case_number = Path(unfinished), 0
        for split, count in (("Tr", labelled), ("Un", unlabelled), ("Ts", test)):
            for _ in range(count):
                case = make_phantom_case(case_number, shape, channels, seed, ct)
                case_name = f"case_{case_number:04d}"
                for channel, image in enumerate(case.images):
                    if unpaired and channel != case_number % channels:
                        continue
                    target = partial / f"images{split}" / f"{case_name}_{channel:04d}{file_ending}"
                    _write_image(image, target, voxel_size)
                if split != "Un":
                    segmentation = case.segmentation
                    if ignore_label and split == "Tr":
                        segmentation = _partly_labelled(segmentation, np.random.default_rng((seed, case_number, 1)))
                    _write_image(segmentation, partial / f"labels{split}" / f"{case_name}{file_ending}", voxel_size)
                case_number += 1
        description = _dataset_json(labelled, (CT_MODALITIES if ct else MODALITIES)[:channels], regions, ignore_label,
                                    file_ending)
        (partial / "dataset.json").write_text(json.dumps(description, indent=4), encoding="utf-8")
    return folder


def _partly_labelled(segmentation: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Label map in which half of every class, in blobs as an annotator would leave them, is set to ignore."""
    field = smooth_field(rng, segmentation.shape, 1.0, nodes=6)
    result = segmentation.copy()
    for label in np.unique(segmentation):
        voxels = segmentation == label
        result[voxels & (field < np.median(field[voxels]))] = IGNORE_LABEL
    return result


def _dataset_json(
    labelled: int, names: Sequence[str], regions: bool, ignore_label: bool, file_ending: str
) -> dict[str, object]:
    labels: dict[str, int | list[int]] = {"background": 0, **LABELS}
    description: dict[str, object] = {
        "channel_names": {str(channel): name for channel, name in enumerate(names)},
        "labels": labels,
        "numTraining": labelled,
        "file_ending": file_ending,
    }
    if regions:
        labels["liver"] = [LABELS["liver"], LABELS["lesion"]]
        description["regions_class_order"] = list(LABELS.values())
    if ignore_label:
        labels["ignore"] = IGNORE_LABEL
    if len(names) == 2:
        description["semi"] = {"modalities": {names[0]: [0], names[1]: [1]}}
    return description


def _write_image(image: np.ndarray, file: Path, spacing: tuple[float, ...]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".png" and image.dtype != np.uint8:
        image = np.clip(image * (255 / (2 * INTENSITY_SCALE)), 0, 255).astype(np.uint8)
    volume = sitk.GetImageFromArray(image)
    volume.SetSpacing(spacing[::-1])
    sitk.WriteImage(volume, str(file), useCompression=True)


def _check_arguments(
    dataset_id: int,
    labelled: int,
    unlabelled: int,
    test: int,
    shape: tuple[int, ...],
    channels: int,
    spacing: tuple[float, ...] | None,
    file_ending: str,
) -> None:
    if not 1 <= dataset_id <= 999:
        raise ValueError(f"dataset_id must be 1 to 999, got {dataset_id}")
    if labelled < 1 or unlabelled < 0 or test < 0:
        raise ValueError(f"need labelled >= 1, unlabelled >= 0, test >= 0; got {labelled}, {unlabelled}, {test}")
    if len(shape) not in (2, 3) or min(shape) < SMALLEST_SIDE:
        raise ValueError(f"shape must be two or three sides of at least {SMALLEST_SIDE} voxels, got {shape}")
    if not 1 <= channels <= len(MODALITIES):
        raise ValueError(f"channels must be 1 to {len(MODALITIES)}, got {channels}")
    if spacing is not None and (len(spacing) != len(shape) or min(spacing) <= 0):
        raise ValueError(f"spacing must be {len(shape)} positive numbers, got {spacing}")
    if file_ending == ".png" and len(shape) != 2:
        raise ValueError("a .png file holds 2D images only: pass a shape of two sides")
