"""``nnunetv2_semi align``: a new raw data set in which the modalities of each case lie on each other."""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import SimpleITK as sitk
from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets

from nnunetv2_semi import __version__
from nnunetv2_semi.commands.align_pictures import AlignmentPicture, save_sheet
from nnunetv2_semi.data.alignment_source import SPLITS, SourceCase, source_cases
from nnunetv2_semi.data.atomic_files import read_json_object, whole_file, write_json_whole
from nnunetv2_semi.data.case_alignment import (
    BACKENDS,
    FOLDER,
    AlignedCase,
    AlignedModality,
    AlignmentOptions,
    align_cases,
    backend_named,
    read_image,
    remove_case,
    resampled,
    transform_file,
)
from nnunetv2_semi.data.dataset_json import read_dataset_json
from nnunetv2_semi.data.dataset_settings import modalities_or_channels, named_channels
from nnunetv2_semi.data.raw_cases import raw_dataset_folder
from nnunetv2_semi.errors import UserError
from nnunetv2_semi.processes.commands import exit_status_of
from nnunetv2_semi.processes.pool import default_processes

SUFFIX = "Aligned"
LARGEST_ID = 999
# In dataset.json: what lists files, in nnU-Net's and in older forms.
_FILE_LISTS = ("dataset", "training", "test", "numTest")
_COLUMNS = ("split", "case", "modality", "fixed", "outcome", "mutual_information_before", "mutual_information_after",
            "mean_displacement_mm", "overlap", "start", "note")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `nnunetv2_semi align`."""
    parser.description = (
        "Make a new raw data set in which the modalities of each case lie on the grid of one of them. Labels belong to "
        "that one and stay as they are, and so does the original data set. Interrupted? Start it again: it continues."
    )
    parser.add_argument("-d", dest="dataset", metavar="ID", required=True, help="number or name of the raw data set")
    parser.add_argument("--fixed", metavar="MODALITY", help="the modality that stays, to which the others are aligned; "
                        "labels must have been drawn on it (default: the first one)")
    parser.add_argument("--transform", choices=("rigid", "affine"), default="rigid",
                        help="rigid: turn and shift; affine: also stretch and shear (default: %(default)s)")
    parser.add_argument("--backend", choices=BACKENDS, default=BACKENDS[0],
                        help='elastix needs pip install "nnunetv2-semi[elastix]" (default: %(default)s)')
    parser.add_argument("--interpolation", choices=("linear", "bspline"), default="linear",
                        help="for resampling (default: %(default)s)")
    parser.add_argument("--to-id", type=int, metavar="ID", help="of the new data set (default: the next free one)")
    parser.add_argument("-np", dest="num_processes", type=int, metavar="N", default=default_processes(),
                        help="cases at a time (default: %(default)s)")
    parser.add_argument("--pictures", type=int, metavar="N", default=8,
                        help="how many of the worst registrations are drawn (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Align, write the new data set, and tell of the quality; 1 if cases failed.

    Raises:
        UserError: something is wrong with the data set or the call.
    """
    return exit_status_of(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    source = raw_dataset_folder(args.dataset)
    path = os.path.join(source, "dataset.json")
    dataset_json = read_dataset_json(path)
    modalities = modalities_or_channels(dataset_json, path)
    fixed = args.fixed or next(iter(modalities))
    _check_call(modalities, fixed, dataset_json, path)
    backend_named(args.backend)
    cases = source_cases(source, dataset_json)
    if not cases:
        raise UserError(f"There are no cases in {source}.")
    target = _target_folder(source, args.to_id)
    options = AlignmentOptions(target, dataset_json["file_ending"], modalities, fixed, args.transform, args.backend,
                               args.interpolation)
    _begin(source, options)
    outcomes = align_cases(cases, options, args.num_processes)
    _remove_others(cases, options)
    write_table(outcomes, Path(target, FOLDER, "quality.csv"))
    sheet = Path(target, FOLDER, "worst_cases.png")
    drawn = _draw_worst(outcomes, cases, options, args.pictures, sheet)
    aligned = [outcome for outcome in outcomes if not outcome.failure]
    num_training = sum(outcome.split == "Tr" for outcome in aligned)
    write_json_whole(os.path.join(target, "dataset.json"), _new_dataset_json(dataset_json, source, options, outcomes))
    shutil.rmtree(os.path.join(target, FOLDER, "unfinished"), ignore_errors=True)
    _print_summary(outcomes, options)
    print(f"\n{target}: {len(aligned)} of {len(cases)} cases, {num_training} of them in imagesTr\n"
          f"  {FOLDER}/quality.csv: each registration")
    if drawn:
        print(f"  {FOLDER}/{sheet.name}: the worst ones")
    failed = [outcome for outcome in outcomes if outcome.failure]
    if failed:
        print(f"\n{len(failed)} case(s) FAILED and are left out of {os.path.basename(target)}:", file=sys.stderr)
        for outcome in failed:
            print(f"  images{outcome.split}/{outcome.name}: {outcome.failure}", file=sys.stderr)
        print("Mend or remove them, and start the same command again: it does these alone.", file=sys.stderr)
    return 1 if failed else 0


def write_table(outcomes: Sequence[AlignedCase], file: Path) -> None:
    """A row for each registration, and for each case without one."""
    with whole_file(file) as unfinished, open(unfinished, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(_COLUMNS)
        for case in outcomes:
            for found in case.modalities:
                outcome = "unmoved" if found.is_unmoved else "aligned"
                numbers = (found.information_before, found.information_after, found.displacement, found.overlap)
                writer.writerow([case.split, case.name, found.modality, found.fixed, outcome,
                                 *(f"{number:.4f}" for number in numbers), found.start, case.note])
            if not case.modalities:
                writer.writerow([case.split, case.name, "", "", "failed" if case.failure else "copied", "", "", "", "",
                                 "", case.failure or case.note])


def _check_call(modalities: dict[str, list[int]], fixed: str, dataset_json: dict, path: str) -> None:
    if len(modalities) < 2:
        raise UserError(f"{path} names one modality ({fixed}): there is nothing to align. Name the modalities under "
                        '"semi" (docs/your_data.md), or leave "modalities" out: each channel is then one.')
    if fixed not in modalities:
        raise UserError(f"--fixed {fixed}: the modalities of {path} are {', '.join(modalities)}.")
    named = {channel for channels in modalities.values() for channel in channels}
    others = [name for channel, name in named_channels(dataset_json).items() if int(channel) not in named]
    if others:
        raise UserError(f'No modality under "semi" in {path} has the channel {", ".join(others)}. Add it to one: the '
                        "channels of a modality are moved together.")
    if dataset_json["file_ending"].lower() in (".tif", ".tiff"):
        raise UserError("TIFF files do not say where their voxels are: convert them to .nii.gz, or to .png in 2D.")


def _target_folder(source: str, wanted: int | None) -> str:
    """Of the new data set: one that was begun, or of the wanted or the next free id."""
    raw, name = os.path.split(source)
    own_id, own_name = int(name[7:10]), name.split("_", 1)[-1]
    begun = sorted(folder for folder in os.listdir(raw) if folder.endswith(f"_{own_name}{SUFFIX}")
                   and os.path.isfile(_settings_file(os.path.join(raw, folder))))
    if wanted is None:
        if len(begun) > 1:
            raise UserError(f"There are several: {', '.join(begun)}. Name one with --to-id.")
        if begun:
            return os.path.join(raw, begun[0])
        free = (number for number in range(own_id + 1, LARGEST_ID + 1) if not len(find_candidate_datasets(number)))
        wanted = next(free, None)
        if wanted is None:
            raise UserError(f"No id from {own_id + 1} to {LARGEST_ID} is free: give --to-id.")
    if not 1 <= wanted <= LARGEST_ID:
        raise UserError(f"--to-id {wanted}: ids are from 1 to {LARGEST_ID}.")
    new = f"Dataset{wanted:03d}_{own_name}{SUFFIX}"
    taken = [folder for folder in find_candidate_datasets(wanted) if folder != new or new not in begun]
    if taken:
        raise UserError(f"--to-id {wanted} is taken by {taken[0]} (in nnUNet_raw, nnUNet_preprocessed or "
                        "nnUNet_results): give another id, or remove that data set.")
    return os.path.join(raw, new)


def _settings_file(target: str) -> str:
    return os.path.join(target, FOLDER, "settings.json")


def _begin(source: str, options: AlignmentOptions) -> None:
    """Write how cases are aligned, or refuse to go on in another way."""
    settings = {"source": os.path.basename(source)} | {key: value for key, value in asdict(options).items()
                                                       if key != "target"}
    before = read_json_object(_settings_file(options.target))
    if before is None:
        write_json_whole(_settings_file(options.target), settings | {"version": __version__})
        return
    different = [key for key in settings if settings[key] != before.get(key)]
    if different:
        what = ", ".join(f"{key} {before.get(key)}, not {settings[key]}" for key in different)
        raise UserError(f"{options.target} was begun with {what}. Give the same options, or another --to-id, or remove "
                        "the folder.")


def _remove_others(cases: Sequence[SourceCase], options: AlignmentOptions) -> None:
    """Remove cases that the original data set has no more."""
    wanted = {(case.split, case.name) for case in cases}
    for record in Path(options.target, FOLDER, "cases").glob("*.json"):
        split, name = record.stem.split("_", 1)
        if split in SPLITS and (split, name) not in wanted:
            remove_case(split, name, options)


def _new_dataset_json(source_json: dict, source: str, options: AlignmentOptions,
                      outcomes: Sequence[AlignedCase]) -> dict:
    kept = {key: value for key, value in source_json.items() if key not in _FILE_LISTS}
    note = {"source": os.path.basename(source), "fixed": options.fixed, "transform": options.kind,
            "backend": options.backend, "left_out": [f"images{outcome.split}/{outcome.name}" for outcome in outcomes
                                                     if outcome.failure]}
    training = sum(outcome.split == "Tr" and not outcome.failure for outcome in outcomes)
    return kept | {"numTraining": training, "alignment": note}


def _draw_worst(outcomes: Sequence[AlignedCase], cases: Sequence[SourceCase], options: AlignmentOptions, count: int,
                file: Path) -> bool:
    """Draw the registrations that ended with least mutual information; whether there was any."""
    by_name = {(case.split, case.name): case for case in cases}
    found = [(outcome, modality) for outcome in outcomes for modality in outcome.modalities if not outcome.failure]
    found = sorted(found, key=lambda pair: pair[1].information_after)[:max(count, 0)]
    file.unlink(missing_ok=True)
    if found:
        pictures = [_picture(by_name[outcome.split, outcome.name], modality, options) for outcome, modality in found]
        save_sheet(pictures, "Least mutual information after registration: fixed image grey, moved one tinted", file)
    return bool(found)


def _picture(case: SourceCase, found: AlignedModality, options: AlignmentOptions) -> AlignmentPicture:
    def first(modality: str) -> sitk.Image:
        channel = next(channel for channel in options.modalities[modality] if channel in case.images)
        return read_image(case.images[channel])

    fixed, moving = first(found.fixed), first(found.modality)
    transform = sitk.ReadTransform(transform_file(options, case.split, case.name, found.modality))
    unmoved = sitk.Transform(fixed.GetDimension(), sitk.sitkIdentity)
    before, after = (resampled(moving, fixed, move, "linear") for move in (unmoved, transform))
    captions = (f"before: {found.information_before:.2f} nats",
                f"after: {found.information_after:.2f}, {found.displacement:.1f} mm")
    return AlignmentPicture(f"{case.name}\n{found.modality} to {found.fixed}", fixed, before, after, captions)


def _print_summary(outcomes: Sequence[AlignedCase], options: AlignmentOptions) -> None:
    rows = [("modality", "cases", "mutual information: before", "after", "displacement (mm): median", "largest")]
    for name in options.modalities:
        found = [modality for outcome in outcomes for modality in outcome.modalities
                 if modality.modality == name and not outcome.failure]
        if found:
            moved = [modality.displacement for modality in found]
            rows.append((name, str(len(found)), f"{statistics.median(m.information_before for m in found):.3f}",
                         f"{statistics.median(m.information_after for m in found):.3f}",
                         f"{statistics.median(moved):.2f}", f"{max(moved):.2f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for outcome in outcomes:
        if outcome.note and not outcome.failure:
            print(f"images{outcome.split}/{outcome.name}: {outcome.note}")
