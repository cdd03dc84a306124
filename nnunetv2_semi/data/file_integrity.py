"""Damage to image files that readers do not report: ITK reads a truncated NIfTI file as if its end were zeros."""

from __future__ import annotations

import gzip
import math
import os
from typing import cast

import nibabel
from nibabel.arrayproxy import ArrayProxy

_CHUNK_BYTES = 1 << 20
_STARTS_OF_NIFTI = (b"\x5c\x01\x00\x00", b"\x00\x00\x01\x5c")  # the size of its header, in either order of bytes


def check_file_complete(path: str) -> None:
    """Refuse a file that is cut off or whose compressed stream is damaged. Reads `.gz` files to their end.

    What readers put up with is no damage: a `.gz` file that is not compressed, or bytes behind the compressed stream.

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
    misnamed = path.endswith(".nii.gz") and _is_plain_nifti(path)
    size = _decompressed_size(path) if path.endswith(".gz") and not misnamed else os.path.getsize(path)
    if not path.endswith((".nii", ".nii.gz")):
        return
    # the voxels are not read: the proxy knows where and how large they are
    image = _misnamed(path) if misnamed else nibabel.load(path)
    voxels = cast(ArrayProxy, cast(nibabel.Nifti1Image, image).dataobj)
    expected = voxels.offset + math.prod(voxels.shape) * voxels.dtype.itemsize
    if size < expected:
        raise OSError(f"the file is cut off: {size} bytes of {expected}")


def _is_plain_nifti(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(4) in _STARTS_OF_NIFTI


def _misnamed(path: str) -> nibabel.Nifti1Image:
    """Of an uncompressed NIfTI file whose name says that it is compressed."""
    with open(path, "rb") as file:
        return nibabel.Nifti1Image.from_file_map({"image": nibabel.FileHolder(fileobj=file)})


def _decompressed_size(path: str) -> int:
    size = 0
    with gzip.open(path) as stream:
        try:
            while chunk := stream.read1(_CHUNK_BYTES):  # what is there before an error counts
                size += len(chunk)
        except EOFError as error:
            raise EOFError(f"the file is truncated ({error})") from error
        except gzip.BadGzipFile as error:
            if not size or "Not a gzipped file" not in str(error):  # what gzip says of bytes behind the stream
                raise
    return size
