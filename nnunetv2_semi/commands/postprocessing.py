"""`nnunetv2_semi postprocessing`: nnU-Net's postprocessing.pkl from labels alone, where there are too few for folds."""

from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from nnunetv2_semi.errors import UserError, one_line

if TYPE_CHECKING:
    import numpy as np

Value = int | tuple[int, ...]  # of a structure in dataset.json: a label, or the labels of a region
FILE = "semi_postprocessing.pkl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `nnunetv2_semi postprocessing`."""
    parser.add_argument("-d", required=True, metavar="DATASET", help="number or name of a raw data set")
    parser.add_argument("-o", type=Path, metavar="FILE", help=f"(default: {FILE} in the preprocessed data set)")


def run(args: argparse.Namespace) -> int:
    """Write the file, and say how it is applied.

    Raises:
        UserError: there is no such data set, its labels cannot be used, or no structure is left to be processed.
    """
    from nnunetv2.paths import nnUNet_preprocessed
    from nnunetv2.postprocessing.remove_connected_components import (
        remove_all_but_largest_component_from_segmentation,
    )

    from nnunetv2_semi.data.atomic_files import whole_file
    from nnunetv2_semi.data.dataset_json import read_dataset_json
    from nnunetv2_semi.data.raw_cases import raw_dataset_folder

    folder = raw_dataset_folder(args.d)
    dataset, connected = os.path.basename(folder), connected_structures(folder)
    if not connected:
        raise UserError(f"No structure of {dataset} is connected in every labelled case, so nothing can be removed.")
    values = structures(read_dataset_json(os.path.join(folder, "dataset.json"))).values()
    instead = {name: label_instead(value, values) for name, value in connected.items()}
    for name in [name for name, label in instead.items() if label is None]:
        print(f"{name} is left as predicted: what a removed island of it would belong to cannot be told.")
        del connected[name]
    if not connected:
        raise UserError("Nothing is left that can be removed.")
    functions = [remove_all_but_largest_component_from_segmentation] * len(connected)
    options = [{"labels_or_regions": value, "background_label": instead[name]} for name, value in connected.items()]
    file = args.o or Path(nnUNet_preprocessed, dataset, FILE)
    with whole_file(str(file)) as unfinished:
        Path(unfinished).write_bytes(pickle.dumps((functions, options)))
    print(f"Connected in every labelled case: {', '.join(connected)}. Of these the largest component will be kept.\n"
          f"nnUNetv2_apply_postprocessing -i PREDICTIONS -o POSTPROCESSED -pp_pkl_file {file}")  # fmt: skip
    return 0


def label_instead(value: Value, values: Iterable[Value]) -> int | None:
    """The label of what is left of the smallest of ``values`` around the region ``value``, without it.

    0 where none is around it; None where several labels are left, of one or of several as small.
    """
    own = set(_labels(value))
    around = [set(_labels(other)) for other in values if own < set(_labels(other))]
    smallest = min(map(len, around), default=0)
    left = set().union(*(other for other in around if len(other) == smallest)) - own if around else {0}
    return left.pop() if len(left) == 1 else None


def structures(dataset_json: dict) -> dict[str, Value]:
    """Foreground labels and regions by name."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in dataset_json["labels"].items()
            if name not in ("background", "ignore")}  # fmt: skip


def _labels(value: Value) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)


def connected_structures(raw_dataset_folder: str) -> dict[str, Value]:
    """Labels or regions, by name, that have one connected component in each labelled case that has them.

    Voxels that share a corner are connected, as in nnU-Net's postprocessing. A case with the ignore label may hide
    further components: it can tell of several, not of one.

    Raises:
        UserError: dataset.json has mistakes, there is no label, or one cannot be read.
    """
    from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

    from nnunetv2_semi.data.dataset_json import read_dataset_json
    from nnunetv2_semi.data.file_contents import name_of_reader
    from nnunetv2_semi.data.label_files import label_files
    from nnunetv2_semi.data.largest_component import always_connected

    dataset_json = read_dataset_json(os.path.join(raw_dataset_folder, "dataset.json"))
    files = list(label_files(raw_dataset_folder, dataset_json).values())
    if not files:
        raise UserError(f"There are no labelled cases in {raw_dataset_folder}.")
    reader = recursive_find_reader_writer_by_name(name_of_reader(dataset_json, files[0]))()
    values = structures(dataset_json)
    classes = {name: _labels(value) for name, value in values.items()}

    def read(file: str) -> np.ndarray:
        try:
            return reader.read_seg(file)[0][0]
        except Exception as error:  # readers raise whatever their libraries do
            raise UserError(f"{file} cannot be read: {one_line(error)}") from error

    connected = always_connected(map(read, files), classes, dataset_json["labels"].get("ignore"))
    return {name: values[name] for name in connected}
