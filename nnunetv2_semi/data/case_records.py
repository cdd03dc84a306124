"""When a preprocessed unlabelled case counts as done."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_semi.data.atomic_files import read_json_object, write_json_whole
from nnunetv2_semi.data.cached_reading import file_stamp
from nnunetv2_semi.data.case_channels import PRESENT_CHANNELS
from nnunetv2_semi.data.file_contents import FileContent

_RECORD_VERSION = 2
_RECORDS_FOLDER = "records"

# what a preprocessed image depends on; patch_size, for one, only shapes the chunks of the file
_CONFIGURATION_KEYS = (
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
    "resampling_fn_seg",
    "resampling_fn_seg_kwargs",
    "preprocessor_name",
)


def plans_digest(plans_manager: PlansManager, configuration_manager: ConfigurationManager) -> str:
    """Digest (hexadecimal) of those parts of the plans that a preprocessed image depends on."""
    parts = {key: configuration_manager.configuration.get(key) for key in _CONFIGURATION_KEYS}
    parts["transpose_forward"] = plans_manager.transpose_forward
    parts["image_reader_writer"] = plans_manager.plans["image_reader_writer"]
    parts["intensities"] = plans_manager.foreground_intensity_properties_per_channel
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


class CaseRecords:
    """One small file per finished case, written last, in a sub-folder of the folder of preprocessed cases.

    nnU-Net infers the kind of a data set from the file endings in its folder; hence the sub-folder.
    """

    def __init__(self, folder: str, digest_of_plans: str) -> None:
        self.folder = folder
        self._records = os.path.join(folder, _RECORDS_FOLDER)
        self._digest_of_plans = digest_of_plans

    def cases(self) -> list[str]:
        """Names of all cases with a record, current or not, in alphabetical order."""
        if not os.path.isdir(self._records):
            return []
        names = os.listdir(self._records)
        return sorted(name[: -len(".json")] for name in names if name.endswith(".json") and not name.startswith("."))

    def is_done(
        self, case: str, contents: Sequence[FileContent] | None = None, present: Sequence[int] | None = None
    ) -> bool:
        """Whether the case was finished for these plans and its files are still there.

        Args:
            case: its name.
            contents: of its raw channel files, in order; None where there is no raw data to compare with.
            present: the channels that it has, in ascending order; None for all.
        """
        record = read_json_object(self._path(case))
        if record is None or record.get("version") != _RECORD_VERSION or record["plans"] != self._digest_of_plans:
            return False
        if contents is not None and (
            record["contents"] != [_as_json(content) for content in contents]
            or record.get(PRESENT_CHANNELS) != (None if present is None else list(present))
        ):
            return False
        for name, size in record["outputs"].items():
            path = os.path.join(self.folder, name)
            if not os.path.isfile(path) or os.path.getsize(path) != size:
                return False
        return True

    def write(
        self,
        case: str,
        raw_files: Sequence[str],
        contents: Sequence[FileContent],
        outputs: Mapping[str, int],
        present: Sequence[int] | None = None,
    ) -> None:
        """Declare the case done.

        Args:
            case: its name.
            raw_files: its channel files, in order.
            contents: of these.
            outputs: size in bytes of each of its files in the folder.
            present: the channels that it has, in ascending order; None for all.
        """
        record: dict[str, object] = {
            "version": _RECORD_VERSION,
            "plans": self._digest_of_plans,
            "raw": {os.path.basename(file): file_stamp(file) for file in raw_files},
            "contents": [_as_json(content) for content in contents],
            "outputs": dict(outputs),
        }
        if present is not None:
            record[PRESENT_CHANNELS] = list(present)
        write_json_whole(self._path(case), record)

    def forget(self, case: str) -> None:
        """Remove the record of a case, so that it no longer counts as done."""
        with contextlib.suppress(FileNotFoundError):
            os.remove(self._path(case))

    def _path(self, case: str) -> str:
        return os.path.join(self._records, case + ".json")


def _as_json(content: FileContent) -> dict:
    """What a preprocessed image depends on: its voxels and spacing, not where in the room they lie."""
    return json.loads(json.dumps({"digest": content.digest, "constant": content.constant, "shape": content.shape,
                                  "spacing": content.spacing}))
