"""dataset.json as nnU-Net wants it: all of its rules in one place, each mistake with what it should say.

https://github.com/MIC-DKFZ/nnUNet/blob/master/documentation/dataset_format.md
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES, recursive_find_reader_writer_by_name
from nnunetv2.paths import nnUNet_preprocessed

from nnunetv2_semi.data.atomic_files import read_json_object
from nnunetv2_semi.errors import UserError, shown

_CHANNELS_EXAMPLE = '"channel_names": {"0": "T1", "1": "T2"}'
_LABELS_EXAMPLE = '"labels": {"background": 0, "organ": 1}'
_READER_KEY = "overwrite_image_reader_writer"


def read_dataset_json(path: str) -> dict:
    """Content of a dataset.json without mistakes.

    Raises:
        UserError: the file is absent, no JSON object, or has mistakes (all in one message).
    """
    content = read_json_object(path)
    if content is None:
        raise UserError(f"{path} is missing or is not a JSON object. nnU-Net needs it, as its dataset format says.")
    check_dataset_json(content, path)
    return content


def check_dataset_json(content: dict, path: str) -> None:
    """Refuse a dataset.json with mistakes.

    Raises:
        UserError: names all of them. `path` is the file named.
    """
    mistakes = dataset_json_mistakes(content)
    if mistakes:
        raise UserError(f"{path} is not as nnU-Net needs it: {'; '.join(mistakes)}. Correct the file (and its copies "
                        f"in nnUNet_raw and nnUNet_preprocessed).")


def preprocessed_dataset_json(dataset_name: str) -> str:
    """Path of the dataset.json that nnU-Net trains with."""
    return os.path.join(nnUNet_preprocessed, dataset_name, "dataset.json")


def dataset_json_mistakes(content: dict) -> list[str]:
    """What is wrong in the content of a dataset.json, each with what it should say."""
    return [*_channel_mistakes(content), *_label_mistakes(content), *_file_mistakes(content)]


def _channel_mistakes(content: dict) -> Iterator[str]:
    if "modality" in content:
        if "channel_names" in content:
            yield '"modality" is the old name of "channel_names", which is there too: remove "modality"'
        else:
            yield '"modality" is the old name of "channel_names": rename it'
    names = content.get("channel_names", content.get("modality"))
    if names is None:
        yield f'"channel_names" is missing: it names each channel by its number, such as {_CHANNELS_EXAMPLE}'
    elif isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        yield f'"channel_names" is a list: it should be {_numbered(names)}'
    elif not isinstance(names, dict) or not names:
        yield f'"channel_names" is {_json(names)}: it should name each channel by its number, such as ' \
              f"{_CHANNELS_EXAMPLE}"
    elif not any(_is_number(key) for key in names) and all(_is_number(value) for value in names.values()):
        yield f'"channel_names" has names and numbers swapped: it should be {_numbered(_in_order(names))}'
    elif not all(_is_number(key) for key in names):
        yield f'"channel_names" is {_json(names)}: its keys should be the numbers of the channels, from "0"'
    elif list(names) != [str(number) for number in range(len(names))]:
        in_order = [names[key] for key in sorted(names, key=int)]
        yield f'"channel_names" has the keys {_quoted(names)}: channels are numbered from "0" without a gap and ' \
              f"listed in this order, such as {_numbered(in_order)}; images are named with the same numbers"
    elif wrong := [key for key, name in names.items() if not isinstance(name, str) or not name]:
        yield f'"channel_names" has no name for channel {_quoted(wrong)}: each name should be a text, such as "T1"'


def _label_mistakes(content: dict) -> Iterator[str]:
    labels = content.get("labels")
    if labels is None:
        yield f'"labels" is missing: it gives each name its value in the label files, such as {_LABELS_EXAMPLE}'
        return
    if isinstance(labels, list) and labels and all(isinstance(name, str) for name in labels):
        yield f'"labels" is a list: it should be {_valued(labels)}'
        return
    if not isinstance(labels, dict) or not labels:
        yield f'"labels" is {_json(labels)}: it should give each name its value, such as {_LABELS_EXAMPLE}'
        return
    if all(_is_number(name) for name in labels) and all(isinstance(value, str) for value in labels.values()):
        in_order = [labels[key] for key in sorted(labels, key=int)]
        yield f'"labels" has names and values swapped, as in nnU-Net\'s first version: it should be {_valued(in_order)}'
        return
    wrong = [name for name, value in labels.items() if not _is_label(value, may_be_region=name not in _SINGLE)]
    if wrong:
        yield f'"labels" has no whole number, or list of them for a region, as value of {_quoted(wrong)} ' \
              f"({', '.join(_json(labels[name]) for name in wrong)}): {_LABELS_EXAMPLE} is right"
        return
    yield from _background_mistakes(labels)
    yield from _value_mistakes(labels)
    yield from _region_mistakes(labels, content.get("regions_class_order"))


_SINGLE = ("background", "ignore")  # labels that cannot be regions


def _background_mistakes(labels: dict) -> Iterator[str]:
    if "background" in labels:
        if labels["background"] != 0:
            yield f'"background" is {labels["background"]} in "labels": it should be 0, here and in the label files'
        return
    zero = next((name for name, value in labels.items() if value == 0), None)
    if zero is None:
        yield '"labels" has no "background": add "background": 0'
    else:
        yield f'"labels" has no "background": rename {_quoted([zero])}, which is 0, to "background"'


def _value_mistakes(labels: dict) -> Iterator[str]:
    values = {name: set(value) if isinstance(value, list) else {value} for name, value in labels.items()}
    ignore = labels.get("ignore")
    known = sorted({0}.union(*(own for name, own in values.items() if name != "ignore")))
    if known[0] < 0:
        yield f'"labels" has the value {known[0]}: values are 0 or greater'
    elif known != list(range(len(known))):
        missing = sorted(set(range(known[-1])) - set(known))
        yield f'"labels" has the values {shown(known, 10)}, but not {shown(missing, 10)}: number them 0 to ' \
              f"{len(known) - 1} without a gap, here and in the label files"
    elif ignore is not None and ignore != known[-1] + 1:
        yield f'"ignore" is {ignore} in "labels": it should be the highest value, {known[-1] + 1}, here and in the ' \
              f"label files"
    if len(known) < 2:
        yield f'"labels" names nothing but background: add what is to be segmented, such as {_LABELS_EXAMPLE}'
    single = [name for name, value in labels.items() if not isinstance(value, list)]
    if len(single) == len(labels):
        for value in sorted(set(labels.values())):
            if len(names := [name for name in single if labels[name] == value]) > 1:
                yield f'"labels" gives {_quoted(names)} the same value {value}: each needs a value of its own'


def _region_mistakes(labels: dict, order: object) -> Iterator[str]:
    if not any(isinstance(value, list) and len(value) > 1 for value in labels.values()):
        return
    regions = [(name, set(value) if isinstance(value, list) else {value}) for name, value in labels.items()
               if name != "ignore" and value not in (0, [0])]
    known = sorted(set().union(*(own for _, own in regions)))
    # The value that a region is written as: that of its voxels which no later, smaller region covers.
    own = [sorted(values - set().union(*(later for _, later in regions[index + 1:])))
           for index, (_, values) in enumerate(regions)]
    example = [values[0] for values in own] if all(len(values) == 1 for values in own) else known[: len(regions)]
    rule = f'it should be a list with the value that each of {_quoted(name for name, _ in regions)} is written as, ' \
           f"in this order, such as {example}"
    if order is None:
        yield f'"labels" has regions, but "regions_class_order" is missing: {rule}'
    elif not isinstance(order, list) or len(order) != len(regions) or not all(
            type(value) is int and value in known for value in order):
        yield f'"regions_class_order" is {_json(order)}: {rule}'


def _file_mistakes(content: dict) -> Iterator[str]:
    ending = content.get("file_ending")
    reader = content.get(_READER_KEY, "None")
    endings = sorted({ending for reader in LIST_OF_IO_CLASSES for ending in reader.supported_file_endings})
    own_reader = reader != "None" and _is_reader(reader)
    if reader != "None" and not own_reader:
        yield f'"{_READER_KEY}" is {_json(reader)}, which nnU-Net does not find: remove it, or name one of ' \
              f"{', '.join(reader.__name__ for reader in LIST_OF_IO_CLASSES)}"
    if not isinstance(ending, str) or not ending:
        yield '"file_ending" is missing: it should be that of the images, such as ".nii.gz"' if ending is None else \
            f'"file_ending" is {_json(ending)}: it should be that of the images, such as ".nii.gz"'
    elif not ending.startswith("."):
        yield f'"file_ending" is "{ending}": it should begin with a dot, ".{ending}"'
    elif not own_reader and ending.lower() not in endings:
        yield f'"file_ending" is "{ending}", which nnU-Net cannot read: it should be one of {", ".join(endings)}'
    number = content.get("numTraining")
    if type(number) is not int or number < 0:
        was = "is missing" if number is None else f"is {_json(number)}"
        yield f'"numTraining" {was}: it should be the number of labelled cases, such as 20'
    if "dataset" in content:
        yield from _listed_case_mistakes(content["dataset"])


def _listed_case_mistakes(cases: object) -> Iterator[str]:
    form = '{"CASE": {"images": ["PATH"], "label": "PATH"}}'
    if not isinstance(cases, dict) or not cases:
        yield f'"dataset" should list the labelled cases, as {form}'
        return
    wrong = [case for case, entry in cases.items() if not (
        isinstance(entry, dict) and isinstance(entry.get("label"), str) and isinstance(entry.get("images"), list)
        and entry["images"] and all(isinstance(image, str) for image in entry["images"]))]
    if wrong:
        yield f'"dataset" has no images or no label of {_quoted(wrong[:20])}: each case should be as {form}'


def _is_reader(name: object) -> bool:
    try:
        return isinstance(name, str) and bool(recursive_find_reader_writer_by_name(name))
    except RuntimeError:
        return False


def _is_label(value: object, may_be_region: bool) -> bool:
    if isinstance(value, list):
        return may_be_region and bool(value) and all(type(part) is int for part in value)
    return type(value) is int


def _is_number(value: object) -> bool:
    return type(value) is int or (isinstance(value, str) and value.isascii() and value.isdigit())


def _in_order(numbers: Mapping[str, object]) -> list[str]:
    return sorted(numbers, key=lambda name: int(str(numbers[name])))


def _numbered(names: Sequence[object]) -> str:
    return _json({str(number): name for number, name in enumerate(names)})


def _valued(names: Sequence[str]) -> str:
    return _json({"background" if value == 0 else name: value for value, name in enumerate(names)})


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _quoted(names: Iterable[object]) -> str:
    return ", ".join(f'"{name}"' for name in names)
