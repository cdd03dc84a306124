"""The optional object "semi" in dataset.json."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from nnunetv2_semi.errors import UserError

_ALLOWED_KEYS = ("modalities", "domains", "plan_with_unlabelled", "plan_joined_passes", "plan_with_foundation")


@dataclass(frozen=True)
class DatasetSettings:
    """What dataset.json says for semi-supervised training.

    Attributes:
        modalities: name of each modality and the indices of its channels, in order; None where dataset.json names none.
        domains: name of each domain and the patterns (as in `fnmatch`) of its case names.
        plan_with_unlabelled: shapes and spacings of unlabelled cases enter the plan.
        plan_joined_passes: the plan has a smaller patch, so that the forward passes of a step fit the memory together.
        plan_with_foundation: pixels a side of the input of a foundation model that the plan leaves memory for.
    """

    modalities: dict[str, tuple[int, ...]] | None = None
    domains: dict[str, tuple[str, ...]] = field(default_factory=dict)
    plan_with_unlabelled: bool = False
    plan_joined_passes: bool = False
    plan_with_foundation: int | None = None


def named_channels(dataset_json: dict) -> dict[str, str]:
    """Channel number to name, as dataset.json has them; `modality` is nnU-Net's older name of `channel_names`."""
    return dataset_json.get("channel_names", dataset_json.get("modality", {}))


def num_channels(dataset_json: dict) -> int:
    """Number of image channels of a data set."""
    names = named_channels(dataset_json)
    if not names:
        raise UserError('dataset.json names no image channels. Add "channel_names", for example {"0": "T1"}.')
    return len(names)


def read_dataset_settings(dataset_json: dict, where: str = "dataset.json") -> DatasetSettings:
    """Check and return the object "semi" of `dataset_json`.

    Args:
        dataset_json: content of dataset.json.
        where: the file named in messages.

    Raises:
        UserError: an unknown key, a value of the wrong type, or a channel that does not exist or is named twice.
    """
    settings = dataset_json.get("semi")
    if settings is None:
        return DatasetSettings()
    if not isinstance(settings, dict):
        raise UserError(f'"semi" in {where} must be an object with the keys {_list(_ALLOWED_KEYS)}, not {settings!r}.')
    unknown = [key for key in settings if key not in _ALLOWED_KEYS]
    if unknown:
        raise UserError(f'"semi" in {where} has the unknown key {_list(unknown)}. Allowed: {_list(_ALLOWED_KEYS)}.')
    return DatasetSettings(
        modalities=checked_modalities(settings["modalities"], num_channels(dataset_json), where)
        if "modalities" in settings
        else None,
        domains=_domains(settings.get("domains", {}), where),
        plan_with_unlabelled=_true_or_false(settings, "plan_with_unlabelled", where),
        plan_joined_passes=_true_or_false(settings, "plan_joined_passes", where),
        plan_with_foundation=_pixels(settings.get("plan_with_foundation"), where),
    )


def is_of_domain(case: str, patterns: Iterable[str]) -> bool:
    """Whether the name of a case fits any of a domain's patterns."""
    return any(fnmatchcase(case, pattern) for pattern in patterns)


def _true_or_false(settings: dict, key: str, where: str) -> bool:
    value = settings.get(key, False)
    if not isinstance(value, bool):
        raise UserError(f'"{key}" in {where} must be true or false, not {value!r}.')
    return value


def _pixels(value: object, where: str) -> int | None:
    if value is not None and (type(value) is not int or value < 16 or value % 16):
        raise UserError(f'"plan_with_foundation" in {where} must be the input size of the foundation model in pixels, '
                        f"a multiple of 16 such as 512, not {value!r}.")
    return value


def checked_modalities(value: object, channel_count: int, where: str) -> dict[str, tuple[int, ...]]:
    """Channels of each modality, as ``where`` has them.

    Raises UserError for a channel that does not exist or has two modalities, and for names that share a folder.
    """
    expected = '"modalities" must name the channels of each modality, for example {"CT": [0], "MR": [1, 2]}'
    if not isinstance(value, dict) or not value:
        raise UserError(f"{expected}; {where} has {value!r}.")
    modalities: dict[str, tuple[int, ...]] = {}
    owner: dict[int, str] = {}
    for name, channels in value.items():
        is_list_of_int = isinstance(channels, list) and all(type(channel) is int for channel in channels)
        if not is_list_of_int or not channels:
            raise UserError(f"{expected}; {where} has {channels!r} for {name!r}.")
        for channel in channels:
            if not 0 <= channel < channel_count:
                raise UserError(
                    f'Modality {name!r} of "modalities" in {where} names channel {channel}, but the data set has the '
                    f"channels 0 to {channel_count - 1} (see channel_names)."
                )
            if channel in owner:
                raise UserError(
                    f'"modalities" in {where} names channel {channel} twice ({owner[channel]!r} and {name!r}). Each '
                    f"channel belongs to one modality."
                )
            owner[channel] = name
        modalities[name] = tuple(channels)
    folders: dict[str, str] = {}
    for name in modalities:
        other = folders.setdefault(folder_name(name).casefold(), name)
        if other != name:
            raise UserError(f'Modalities {other!r} and {name!r} of "modalities" in {where} would share the folder '
                            f"{folder_name(name)}. Rename one of them.")
    return modalities


def _domains(value: object, where: str) -> dict[str, tuple[str, ...]]:
    expected = '"domains" must give a pattern of case names for each domain, for example {"hospital_a": "A_*"}'
    if not isinstance(value, dict):
        raise UserError(f"{expected}; {where} has {value!r}.")
    domains: dict[str, tuple[str, ...]] = {}
    for name, patterns in value.items():
        pattern_list = [patterns] if isinstance(patterns, str) else patterns
        is_list_of_str = isinstance(pattern_list, list) and all(isinstance(item, str) for item in pattern_list)
        if not is_list_of_str or not pattern_list:
            raise UserError(f"{expected}; {where} has {patterns!r} for {name!r}.")
        domains[name] = tuple(pattern_list)
    return domains


def _list(names: object) -> str:
    return ", ".join(f'"{name}"' for name in names)  # type: ignore[attr-defined]


def modalities_or_channels(dataset_json: dict, where: str = "dataset.json") -> dict[str, list[int]]:
    """Modality name -> its channels: as dataset.json says, or each channel one modality named after the channel."""
    declared = read_dataset_settings(dataset_json, where).modalities
    if declared is not None:
        return {name: list(channels) for name, channels in declared.items()}
    names = named_channels(dataset_json)
    unique = len({folder_name(str(name)).casefold() for name in names.values()}) == len(names)
    return {str(name) if unique else f"{name}_{index}": [int(index)] for index, name in names.items()}


def folder_name(modality: str) -> str:
    """The name of a modality as that of a folder."""
    return re.sub(r"[^\w.-]+", "_", modality)
