"""Damage to image files that readers do not report: ITK reads a truncated NIfTI file as if its end were zeros."""

from __future__ import annotations

import gzip
import math
import os
from typing import cast

import nibabel
from nibabel.arrayproxy import ArrayProxy

_CHUNK_BYTES = 1 << 20


def check_file_complete(path: str) -> None:
    """Refuse a file that is cut off or whose compressed stream is damaged. Reads `.gz` files to their end.

    Raises:
        FileNotFoundError: a link that leads nowhere, or no file.
        OSError, EOFError, zlib.error: damaged or truncated compressed stream, or (OSError) fewer bytes than the header
            of a NIfTI file announces.
        nibabel.filebasedimages.ImageFileError: a NIfTI file without a valid header.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"a link to {os.readlink(path)}, which is not there" if os.path.islink(path) else "there is no such file"
        )
    size = _decompressed_size(path) if path.endswith(".gz") else os.path.getsize(path)
    if not path.endswith((".nii", ".nii.gz")):
        return
    # the voxels are not read: the proxy knows where and how large they are
    voxels = cast(ArrayProxy, cast(nibabel.Nifti1Image, nibabel.load(path)).dataobj)
    expected = voxels.offset + math.prod(voxels.shape) * voxels.dtype.itemsize
    if size < expected:
        raise OSError(f"the file is cut off: {size} bytes of {expected}")


def _decompressed_size(path: str) -> int:
    size = 0
    with gzip.open(path) as stream:
        try:
            while chunk := stream.read(_CHUNK_BYTES):
                size += len(chunk)
        except EOFError as error:
            raise EOFError(f"the file is truncated ({error})") from error
    return size
