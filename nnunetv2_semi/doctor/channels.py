"""Checks of which channels, and so which modalities, the cases have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from nnunetv2_semi.data.case_channels import channel_names, channels_and_mistakes, lacking_finding
from nnunetv2_semi.data.dataset_settings import modalities_or_channels
from nnunetv2_semi.data.file_contents import FileContent
from nnunetv2_semi.doctor.checks import Check, ok, problem, warning
from nnunetv2_semi.errors import UserError, shown
from nnunetv2_semi.planning.fingerprint import check_statistics

_IN_PART = " (in part)"
_REMEDIES = {
    "labelled": "add files that were forgotten; else plan with -fpe nnUNetFingerprintExtractorSemi -pl "
    "nnUNetPlannerSemi and without --verify_dataset_integrity: nnU-Net's own extractor and check want all channels",
    "unlabelled": "add files that were forgotten; else plan with -pl nnUNetPlannerSemi: its preprocessor fills in",
    "test": "add files that were forgotten; else plan with -pl nnUNetPlannerSemi: prediction uses what is there",
}


def check_channels(
    groups: Mapping[str, Mapping[str, Sequence[str]]], contents: Mapping[str, FileContent], dataset_json: dict
) -> Iterator[Check]:
    """Which modalities the cases have, which cases lack channels, and files that hold other channels than they should.

    Args:
        groups: "labelled", "unlabelled" and "test"; each with case name to image files.
        contents: of the files that can be read. Cases with others are left out.
        dataset_json: content of dataset.json.
    """
    found = {}
    for kind, cases in groups.items():
        readable = {case: files for case, files in cases.items() if all(file in contents for file in files)}
        channels_read = {case: sum(contents[file].shape[0] for file in files) for case, files in readable.items()}
        found[kind], mistakes = channels_and_mistakes(readable, channels_read, dataset_json)
        if mistakes:
            wrong = f"{len(mistakes)} {kind} cases have wrong channels: {' '.join(mistakes.values())}"
            yield warning(wrong) if kind == "test" else problem(wrong)
    modalities = _modalities(dataset_json)
    for kind, channels in found.items():
        if len(modalities) > 1 and channels:
            yield ok(f"{kind} cases: {_modality_counts(channels, modalities)}")
    for kind, channels in found.items():
        finding = lacking_finding(channels, dataset_json, kind)
        if finding is not None:
            yield warning(finding, _REMEDIES[kind])
    if found.get("labelled"):
        yield from _check_statistics(found["labelled"], dataset_json)


def _modalities(dataset_json: dict) -> dict[str, list[int]]:
    try:
        return modalities_or_channels(dataset_json)
    except UserError:  # reported where the settings are checked
        return {name: [index] for index, name in channel_names(dataset_json).items()}


def _modality_counts(channels: Mapping[str, Sequence[int]], modalities: Mapping[str, Sequence[int]]) -> str:
    """Such as "CT 5, MR 5, CT+MR 0": how many cases have which modalities and no others."""
    counts = Counter(_modality_names(present, modalities) for present in channels.values())
    singles = [(name,) for name in modalities] if len(modalities) == 2 else []
    # a place of its own for each, since the order of a set is another one in every run
    places = [*modalities, *(name + _IN_PART for name in modalities)]
    order = sorted({*singles, *counts, tuple(modalities)},
                   key=lambda names: (len(names), [places.index(name) for name in names]))
    return ", ".join(f"{'+'.join(names) or 'none'} {counts[names]}" for names in order)


def _modality_names(present: Sequence[int], modalities: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
    names = []
    for name, own in modalities.items():
        there = set(own) & set(present)
        if there:
            names.append(name if len(there) == len(own) else name + _IN_PART)
    return tuple(names)


def _check_statistics(channels: Mapping[str, Sequence[int]], dataset_json: dict) -> Iterator[Check]:
    labelled = {channel for present in channels.values() for channel in present}
    try:
        check_statistics(labelled, dataset_json)
    except UserError as error:
        yield problem(str(error))
        return
    without = [name for index, name in channel_names(dataset_json).items() if index not in labelled]
    if without:
        yield warning(
            f"no labelled case has {shown(without)}",
            "label cases that have it, if it is to be segmented by itself",
        )
