"""Shapes and spacings of unlabelled cases, as nnU-Net's fingerprint has them of labelled ones."""

from __future__ import annotations

from functools import partial

from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero

from nnunetv2_semi.data.raw_cases import UNLABELLED_FOLDER, list_unlabelled_cases, naming_rule
from nnunetv2_semi.errors import UserError, one_line
from nnunetv2_semi.processes.pool import results_in_parallel


def unlabelled_geometry(
    raw_dataset_folder: str, dataset_json: dict, reader_name: str, *, num_processes: int
) -> tuple[list[list[int]], list[list[float]]]:
    """Shape after cropping to the non-zero region (voxels) and spacing (mm) of each unlabelled case, in name order.

    Of a case that lacks channels, those that it has count.

    Args:
        raw_dataset_folder: holds `imagesUn/`.
        dataset_json: content of dataset.json.
        reader_name: nnU-Net's reader.
        num_processes: of the reading.

    Raises:
        UserError: there are no unlabelled cases, or some cannot be read (all in one message).
    """
    cases = list_unlabelled_cases(raw_dataset_folder, dataset_json)
    if not cases:
        raise UserError(
            f'"plan_with_unlabelled" is set in dataset.json, but there are no unlabelled cases. Put images into '
            f"{raw_dataset_folder}/{UNLABELLED_FOLDER}, named {naming_rule(dataset_json)}, or remove the setting."
        )
    found = {}
    unreadable = []
    for (case, _), (shape, spacing, reason) in results_in_parallel(
        partial(_geometry, reader_name=reader_name),
        list(cases.items()),
        num_processes=num_processes,
        description="Reading unlabelled cases for the plan",
    ):
        if reason:
            unreadable.append(f"{case} ({reason})")
        else:
            found[case] = (shape, spacing)
    if unreadable:
        raise UserError(
            f"{len(unreadable)} unlabelled case(s) in {raw_dataset_folder}/{UNLABELLED_FOLDER} cannot be read: "
            f"{'; '.join(sorted(unreadable))}. Replace or remove them."
        )
    return [found[case][0] for case in cases], [found[case][1] for case in cases]


def _geometry(task: tuple[str, list[str]], reader_name: str) -> tuple[list[int], list[float], str]:
    _, files = task
    try:
        image, properties = recursive_find_reader_writer_by_name(reader_name)().read_images(files)
    except MemoryError:
        raise
    except Exception as error:  # readers raise whatever their libraries do
        return [], [], one_line(error)
    cropped, _, _ = crop_to_nonzero(image)
    return [int(size) for size in cropped.shape[1:]], [float(size) for size in properties["spacing"]], ""
