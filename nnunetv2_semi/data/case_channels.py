"""Which channels of its data set a case has.

Of raw cases the numbers in the names of the files tell, and what the files hold; of preprocessed ones their properties.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset

from nnunetv2_semi.data.dataset_settings import named_channels, num_channels
from nnunetv2_semi.data.raw_cases import channel_numbers, naming_rule
from nnunetv2_semi.errors import UserError, one_line, shown

PRESENT_CHANNELS = "present_channels"  # in the properties of a preprocessed case that lacks channels


def channel_names(dataset_json: dict) -> dict[int, str]:
    """Channel index to name, in ascending order; names that are there twice get their index."""
    names = named_channels(dataset_json)
    unique = len(set(names.values())) == len(names)
    return {
        index: str(name) if unique else f"{name} ({index})"
        for index, name in sorted((int(key), name) for key, name in names.items())
    }


def channels_of_case(files: Sequence[str], channels_read: int, dataset_json: dict) -> list[int]:
    """Index in `channel_names` of each channel that was read from one case's files, in the order of `files`.

    Where the files hold all channels, the names matter as little as to nnU-Net: one file may hold them all, and files
    listed in dataset.json may be called anything.

    Args:
        files: of one case.
        channels_read: in all of them together.
        dataset_json: content of dataset.json.

    Raises:
        UserError: no file; channels that are missing where no name tells which; more or fewer channels than files; a
            number that `channel_names` lacks, or one that is there twice.
    """
    expected = num_channels(dataset_json)
    numbers = channel_numbers(files, dataset_json["file_ending"])
    if channels_read == expected and (len(files) == 1 or numbers is None or "dataset" in dataset_json):
        return list(range(expected))
    named = f"{', '.join(files)} ({_count(channels_read, 'channel')} of {expected})"
    rule = naming_rule(dataset_json)
    if not files:
        raise UserError(f"A case has no image file. Name at least one of its channels {rule}.")
    if numbers is None:
        raise UserError(f"{named}: which channels are missing is not told by the names. Name the files {rule}.")
    if channels_read != len(files):
        raise UserError(
            f"{named}: {_count(len(files), 'file')} with {_count(channels_read, 'channel')}. A file holds either one "
            f"channel, named {rule}, or all {expected}."
        )
    beyond = sorted({number for number in numbers if number >= expected})
    if beyond:
        raise UserError(
            f"{named}: there is no channel {', '.join(map(str, beyond))}, channel_names in dataset.json has 0 to "
            f"{expected - 1}. Remove the file, or name it {rule}."
        )
    if len(set(numbers)) < len(numbers):
        raise UserError(f"{named}: a channel is there twice. Each file of a case is another channel, named {rule}.")
    return numbers


def channels_and_mistakes(
    cases: Mapping[str, Sequence[str]], channels_read: Mapping[str, int], dataset_json: dict
) -> tuple[dict[str, list[int]], dict[str, str]]:
    """`channels_of_cases` of the cases where all is well, and case name to what is wrong of the others."""
    channels, mistakes = {}, {}
    for case, files in cases.items():
        try:
            channels[case] = sorted(channels_of_case(files, channels_read[case], dataset_json))
        except UserError as error:
            mistakes[case] = str(error)
    return channels, mistakes


def channels_of_cases(
    cases: Mapping[str, Sequence[str]], channels_read: Mapping[str, int], dataset_json: dict
) -> dict[str, list[int]]:
    """`channels_of_case` of each case (name to files, and name to number of channels in them), in ascending order.

    Raises:
        UserError: as `channels_of_case`, for all cases in one message.
    """
    channels, mistakes = channels_and_mistakes(cases, channels_read, dataset_json)
    if mistakes:
        raise UserError(" ".join(f"Case {case}: {mistake}" for case, mistake in mistakes.items()))
    return channels


def channels_by_name(
    cases: Mapping[str, Sequence[str]], dataset_json: dict, reader: type[BaseReaderWriter]
) -> dict[str, list[int]]:
    """`channels_of_cases` without reading them, but for one image that tells whether files hold all channels.

    Raises:
        UserError: as `channels_of_case`, for all cases in one message; or that one image cannot be read.
    """
    expected = num_channels(dataset_json)
    single = next((files[0] for files in cases.values() if len(files) == 1), None)
    in_one_file = expected > 1 and single is not None and _channels_in(single, reader) == expected
    counts = {case: expected if in_one_file and len(files) == 1 else len(files) for case, files in cases.items()}
    return channels_of_cases(cases, counts, dataset_json)


def lacking_channels(channels: Mapping[str, Sequence[int]], dataset_json: dict) -> dict[str, list[int]]:
    """Those of `channels` (case name to the channels it has) that are fewer than the data set's."""
    expected = num_channels(dataset_json)
    return {case: list(present) for case, present in channels.items() if len(present) < expected}


def lacking_finding(channels: Mapping[str, Sequence[int]], dataset_json: dict, kind: str) -> str | None:
    """Which cases lack channels and how many have which; None where none does.

    Args:
        channels: case name to the channels it has, of all cases.
        dataset_json: content of dataset.json.
        kind: of the cases, such as "unlabelled".
    """
    lacking = lacking_channels(channels, dataset_json)
    if not lacking:
        return None
    names = channel_names(dataset_json)
    counts = Counter("+".join(names[index] for index in present) for present in lacking.values())
    present_only = ", ".join(f"{present} only: {count}" for present, count in counts.most_common())
    return (
        f"{len(lacking)} of {len(channels)} {kind} cases lack channels ({present_only}): {shown(sorted(lacking))}"
    )


def lacking_warning(channels: Mapping[str, Sequence[int]], dataset_json: dict, kind: str) -> str | None:
    """`lacking_finding` as a warning for who forgot a file."""
    finding = lacking_finding(channels, dataset_json, kind)
    return finding and f"WARNING: {finding}. What is there is used. If a file was forgotten, add it."


class CaseChannels:
    """Which channels each case of a preprocessed data set has, as its preprocessor recorded; read once per case."""

    def __init__(self, dataset: nnUNetBaseDataset) -> None:
        self._dataset = dataset
        self._absent: dict[str, set[int]] = {}

    def present(self, cases: Sequence[str], num_channels: int) -> torch.Tensor:
        """Which of ``num_channels`` channels each of ``cases`` has: bool (cases, channels)."""
        rows = [[channel not in self._absent_of(case) for channel in range(num_channels)] for case in cases]
        return torch.tensor(rows, dtype=torch.bool).reshape(len(cases), num_channels)

    def _absent_of(self, case: str) -> set[int]:
        """Of the image's channels; a cascade appends those of the stage before, which are always there."""
        if case not in self._absent:
            image, *_, properties = self._dataset.load_case(case)
            channels = range(image.shape[0])
            self._absent[case] = set(channels) - set(properties.get(PRESENT_CHANNELS, channels))
        return self._absent[case]


def _channels_in(file: str, reader: type[BaseReaderWriter]) -> int:
    try:
        return len(reader().read_images([file])[0])
    except MemoryError:
        raise
    except Exception as error:  # readers raise whatever their libraries do
        raise UserError(f"{file} cannot be read ({one_line(error)}). Replace the file, or remove its case.") from error


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
