"""Whether an image file was written to its end: SimpleITK fills what a shortened NIfTI lacks with zeros, in silence."""

from __future__ import annotations

import gzip
import math
import os
import zlib

import nibabel
from nibabel.arrayproxy import ArrayProxy
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

_CHUNK_BYTES = 1 << 20


def check_file_complete(path: str) -> None:
    """Check that a NIfTI or gzip file holds everything its header promises; other files are left to their reader.

    Raises:
        ValueError: the file is empty, shortened or damaged; the message says which, without the path.
    """
    if os.path.getsize(path) == 0:
        raise ValueError("the file is empty")
    name = path.lower()
    size = _decompressed_size(path) if name.endswith(".gz") else os.path.getsize(path)
    if name.endswith((".nii", ".nii.gz")):
        promised = _promised_nifti_size(path)
        if size < promised:
            raise ValueError(f"the file is truncated: {size} bytes of image data and header, {promised} expected")


def _decompressed_size(path: str) -> int:
    size = 0
    try:
        with gzip.open(path, "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                size += len(chunk)
    except EOFError as error:
        raise ValueError("the file is truncated: its compressed data end too early") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        if size == 0 and not _has_gzip_signature(path):
            # Some tools write plain NIfTI under a .nii.gz name, which readers accept.
            return os.path.getsize(path)
        raise ValueError(f"the compressed data are damaged: {error}") from error
    return size


def _has_gzip_signature(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _promised_nifti_size(path: str) -> int:
    """Bytes of header and voxels, from the header; 0 where nibabel cannot tell."""
    try:
        voxels = getattr(nibabel.load(path), "dataobj", None)
    except (ImageFileError, HeaderDataError):
        return 0
    if not isinstance(voxels, ArrayProxy):
        return 0
    return int(voxels.offset) + math.prod(voxels.shape) * int(voxels.dtype.itemsize)
