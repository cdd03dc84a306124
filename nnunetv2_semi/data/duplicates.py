"""Which cases hold the same image, whatever their files are called."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from nnunetv2_semi.data.file_contents import FileContent
from nnunetv2_semi.data.thumbnails import look_alikes
from nnunetv2_semi.errors import shown

LOOK_ALIKE = "seem to show the same scan, flipped, turned, resampled, padded or rescaled in intensity"


@dataclass(frozen=True)
class Duplicate:
    """Two cases that share the voxels of a channel: files `file` and `other_file` are the same image."""

    case: str
    file: str
    other_case: str
    other_file: str


def find_duplicates(
    unlabelled: Mapping[str, Iterable[str]],
    contents: Mapping[str, FileContent],
    labelled: Mapping[str, Iterable[str]] | None = None,
) -> list[Duplicate]:
    """Pairs of cases that share the content of any channel under another name; one entry per pair of cases.

    Args:
        unlabelled: case name to its image files.
        contents: content by file; files that are absent from it are not compared.
        labelled: case name to its image files. If given, each unlabelled case is compared with these; if not,
            unlabelled cases are compared with each other.

    Constant images (a filler for a channel that was not taken) are not the same image.
    """
    first_with_digest: dict[str, tuple[str, str]] = {}
    if labelled is not None:
        for case, files in labelled.items():
            for file in files:
                if file in contents and not contents[file].constant:
                    first_with_digest.setdefault(contents[file].digest, (case, file))
    duplicates: dict[tuple[str, str], Duplicate] = {}
    for case, files in unlabelled.items():
        for file in files:
            if file not in contents or contents[file].constant:
                continue
            if labelled is None:
                other_case, other_file = first_with_digest.setdefault(contents[file].digest, (case, file))
                found = other_case != case
            else:
                other_case, other_file = first_with_digest.get(contents[file].digest, ("", ""))
                found = bool(other_file)
            if found:
                duplicates.setdefault((case, other_case), Duplicate(case, file, other_case, other_file))
    return list(duplicates.values())


def find_look_alikes(
    cases: Mapping[str, Iterable[str]],
    contents: Mapping[str, FileContent],
    others: Mapping[str, Iterable[str]] | None = None,
) -> list[Duplicate]:
    """Pairs of cases whose first images that are not constant show the same scan, though their voxels differ.

    Found are copies that were flipped, turned by right angles, padded, cropped by their empty margin, resampled, saved
    as another type of number or rescaled linearly in intensity. Not found are copies that were cropped further, turned
    by other angles, deformed, inverted or windowed, other scans of the same patient, and single slices of a volume.

    Args:
        cases: case name to its image files.
        contents: content by file; files that are absent from it are not compared.
        others: likewise, of the cases to compare with. If not given, `cases` are compared with each other.
    """
    here = list(_first_images(cases, contents).items())
    there = here if others is None else list(_first_images(others, contents).items())
    thumbnails = [[contents[file].thumbnail for _, file in images] for images in (here, there)]
    found = []
    for i, j in look_alikes(*thumbnails):
        (case, file), (other_case, other_file) = here[i], there[j]
        if (others is not None or j < i) and contents[file].digest != contents[other_file].digest:
            found.append(Duplicate(case, file, other_case, other_file))
    return found


def shown_pairs(pairs: Sequence[Duplicate]) -> str:
    """The first 20 pairs, with the folder of the second file."""
    return shown([f"{os.path.basename(pair.file)} = {os.path.join(*pair.other_file.split(os.sep)[-2:])}"
                  for pair in pairs])


def _first_images(cases: Mapping[str, Iterable[str]], contents: Mapping[str, FileContent]) -> dict[str, str]:
    first: dict[str, str] = {}
    for case, files in cases.items():
        usable = [file for file in files if file in contents and contents[file].thumbnail]
        if usable:
            first[case] = usable[0]
    return first
