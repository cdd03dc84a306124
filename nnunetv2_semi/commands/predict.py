"""`nnunetv2_semi predict`: nnUNetv2_predict, which leaves out images that cannot be read and predicts the others."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

from nnunetv2_semi.errors import UserError, one_line
from nnunetv2_semi.processes.commands import command_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `nnunetv2_semi predict`: nnU-Net's own."""
    # Any further option that begins with one of these letters would be taken for it: nnU-Net has none.
    parser.add_argument("-i", type=Path, required=True, metavar="FOLDER", help="images, named as in imagesTs")
    parser.epilog = "All other options are those of nnUNetv2_predict, and go to it as they are."
    parser.set_defaults(passes_on=True)


def run(args: argparse.Namespace) -> int:
    """Predict all cases whose images can be read. 1 if some cannot, else what nnUNetv2_predict returns.

    Raises:
        UserError: there is no such folder, or nothing in it can be predicted.
    """
    if not args.i.is_dir():
        raise UserError(f"{args.i} is not a folder.")
    images = [file for file in sorted(args.i.iterdir()) if _case_and_ending(file)]
    if not images:
        raise UserError(f"{args.i} holds no images named CASE_0000 with a file ending, as nnU-Net names them.")
    damaged = _damaged(images, _reader_of_model(args.more))
    left_out = {_case(file) for file in damaged}
    for file, reason in damaged.items():
        print(f"LEFT OUT: case {_case(file)}, since {file} cannot be read: {reason}")
    if left_out == {_case(file) for file in images}:
        raise UserError(f"No case in {args.i} can be predicted.")
    with tempfile.TemporaryDirectory() as readable:
        if left_out:
            for file in args.i.iterdir():
                if _case(file) not in left_out:
                    _link_or_copy(file, Path(readable, file.name))
        folder = readable if left_out else str(args.i)
        status = subprocess.call([command_path("nnUNetv2_predict"), "-i", folder, *args.more])
    if left_out:
        print(f"{len(left_out)} case(s) were left out: {', '.join(sorted(left_out))}. Replace their images and start "
              "again with --continue_prediction.")
    return status or int(bool(left_out))


def _link_or_copy(file: Path, target: Path) -> None:
    try:
        os.symlink(file.resolve(), target)
    except (OSError, NotImplementedError):  # Windows without developer mode
        shutil.copyfile(file, target)


def _case(file: Path) -> str:
    """Name of the case; a companion file of all channels, as TIFF files have, is named after it."""
    image = _case_and_ending(file)
    return image[0] if image else file.stem


def _case_and_ending(file: Path) -> tuple[str, str] | None:
    """Of an image CASE_0000 with a file ending of one of nnU-Net's readers; None of any other file."""
    image = _image_pattern().fullmatch(file.name)
    return (image[1], image[2].lower()) if image else None


@cache
def _image_pattern() -> re.Pattern[str]:
    from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES

    endings = {re.escape(ending) for reader in LIST_OF_IO_CLASSES for ending in reader.supported_file_endings}
    return re.compile(rf"(.+)_\d{{4}}({'|'.join(endings)})", re.IGNORECASE)


def _reader_of_model(options: Sequence[str]) -> str | None:
    """Name of the reader that nnUNetv2_predict will take with these options; None where they name no trained model."""
    from nnunetv2.utilities.file_path_utilities import get_output_folder

    from nnunetv2_semi.data.atomic_files import read_json_object

    given = dict(pairwise(options))
    try:
        folder = get_output_folder(given["-d"], given.get("-tr", "nnUNetTrainer"), given.get("-p", "nnUNetPlans"),
                                   given["-c"])
    except (KeyError, OSError, RuntimeError, TypeError, ValueError):  # nnUNetv2_predict will say what is wrong
        return None
    return (read_json_object(os.path.join(folder, "plans.json")) or {}).get("image_reader_writer")


def _damaged(files: list[Path], reader: str | None) -> dict[Path, str]:
    """The files that cannot be read to their end, or hold no numbers, with the reason."""
    from nnunetv2_semi.processes.pool import processes_to_read, results_in_parallel

    results = results_in_parallel(
        partial(_reason, reader), files, num_processes=processes_to_read(files), description="Reading images"
    )
    return {file: reason for file, reason in sorted(results) if reason}


def _reason(reader_of_model: str | None, file: Path) -> str:
    """Why that reader, or where it is not known none of nnU-Net's for this ending, can read the file; "" if it can."""
    from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES

    from nnunetv2_semi.data.file_contents import read_image

    _, ending = _case_and_ending(file) or ("", "")
    reasons = []
    readers = [reader for reader in LIST_OF_IO_CLASSES if ending in reader.supported_file_endings]
    for reader in [reader for reader in readers if reader.__name__ == reader_of_model] or readers:
        try:
            read_image(str(file), reader.__name__)
        except MemoryError:
            raise
        except Exception as error:  # readers raise whatever their libraries do
            reasons.append(one_line(error))
        else:
            return ""
    return reasons[0]
