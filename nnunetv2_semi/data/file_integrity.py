"""Damage to image files that readers do not report: ITK reads a truncated NIfTI file as if its end were zeros."""

from __future__ import annotations

import gzip
import math
import os

from nibabel.filebasedimages import ImageFileError
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

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
    header = _header(path, compressed=path.endswith(".gz") and not misnamed)
    expected = header.get_data_offset() + math.prod(header.get_data_shape()) * header.get_data_dtype().itemsize
    if size < expected:
        raise OSError(f"the file is cut off: {size} bytes of {expected}")


def _is_plain_nifti(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(4) in _STARTS_OF_NIFTI


def _header(path: str, compressed: bool) -> Nifti1Header:
    """Of a NIfTI file of either version; its orientation, of which readers tolerate more than nibabel, is not read."""
    start = b""
    with gzip.open(path) if compressed else open(path, "rb") as file:
        # one piece at a time: what lies behind the compressed stream is no mistake
        while len(start) < Nifti2Header.sizeof_hdr and (piece := file.read1(Nifti2Header.sizeof_hdr - len(start))):
            start += piece
    try:
        kind = Nifti1Header if start[:4] in _STARTS_OF_NIFTI else Nifti2Header
        return kind(start[: kind.sizeof_hdr])
    except (HeaderDataError, WrapStructError) as error:
        raise ImageFileError(f"no valid NIfTI header: {error}") from error


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
