"""``nnunetv2_semi subset``: from a fully labelled raw data set, new ones in which only a part is labelled."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Mapping, Sequence

from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id, find_candidate_datasets

from nnunetv2_semi import __version__
from nnunetv2_semi.benchmark.datasets.case_choice import Classes, choose_test_cases, labelling_order
from nnunetv2_semi.benchmark.datasets.raw_datasets import (
    LARGEST_ID,
    NewDataset,
    adapted_dataset_json,
    free_ids,
    write_datasets,
)
from nnunetv2_semi.benchmark.datasets.source_cases import Case, Source, class_names, classes_per_case, read_source
from nnunetv2_semi.data.raw_cases import UNLABELLED_FOLDER
from nnunetv2_semi.errors import UserError
from nnunetv2_semi.processes.commands import ended_by_sigterm

RECORD = "subset.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `nnunetv2_semi subset`."""
    parser.add_argument("-d", dest="dataset", metavar="ID", required=True, help="number or name of the raw data set")
    parser.add_argument(
        "--labeled", nargs="+", type=amount, required=True, metavar="N",
        help="labelled cases of each new data set: a number, or a percentage of the training cases such as 5%%; "
        "100%% makes one without unlabelled cases, for the upper bound",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the choice of cases (default: 0)")
    parser.add_argument(
        "--test", type=amount, metavar="N",
        help="number or percentage of the labelled cases that become test cases of all new data sets (default: "
        "imagesTs and labelsTs as they are)",
    )  # fmt: skip
    parser.add_argument(
        "--ids", nargs="+", type=int, metavar="ID", help="of the new data sets (default: the next free ones)"
    )


def run(args: argparse.Namespace) -> int:
    """Make the new data sets and print what is in them.

    Raises:
        UserError: something is wrong with the source or the call; then nothing was written.
    """
    source = read_source(args.dataset)
    test_count = 0 if args.test is None else count_of(args.test, len(source.labelled))
    if test_count >= len(source.labelled):
        raise UserError(f"--test {args.test} leaves none of {len(source.labelled)} labelled cases for training.")
    counts = labelled_counts(args.labeled, len(source.labelled) - test_count)
    ids = new_ids(source, len(counts), args.ids)

    classes = classes_per_case(source.dataset_json, source.labelled)
    if args.test is None:
        test, test_classes = source.test, classes_per_case(source.dataset_json, source.test) if source.test else {}
    else:
        chosen = choose_test_cases(classes, test_count, args.seed)
        test = {case: source.labelled[case] for case in chosen}
        test_classes = {case: classes.pop(case) for case in chosen}
    order = labelling_order(classes, args.seed)
    subsets = []
    for dataset_id, (fraction, count) in zip(ids, counts.items(), strict=True):
        options = {"labeled": fraction, "test": args.test, "seed": args.seed}
        labelled = {case: classes[case] for case in sorted(order[:count])}
        subsets.append(make_subset(source, dataset_id, options, labelled, sorted(order[count:]), test, test_classes))
    with ended_by_sigterm():
        write_datasets(os.path.dirname(source.folder), subsets)
    print_summary(subsets, ids)
    return 0


def amount(text: str) -> str:
    """Check the form of a number or percentage of cases, for argparse."""
    if not re.fullmatch(r"\d+|\d+(\.\d+)?%", text) or float(text.rstrip("%")) == 0:
        raise argparse.ArgumentTypeError(f"{text} is neither a number of cases, like 5, nor a percentage, like 5%")
    return text


def count_of(text: str, total: int) -> int:
    """Number of cases that an `amount` means; a percentage of `total` is rounded, to at least 1."""
    if not text.endswith("%"):
        return int(text)
    return max(1, math.floor(total * float(text[:-1]) / 100 + 0.5))


def labelled_counts(fractions: Sequence[str], total: int) -> dict[str, int]:
    """Number of labelled cases for each fraction of `total` training cases.

    Raises:
        UserError: more than there are, all without asking for 100%, or the same number twice.
    """
    counts: dict[str, int] = {}
    for fraction in fractions:
        count = count_of(fraction, total)
        is_all = fraction.endswith("%") and float(fraction[:-1]) == 100
        if count > total:
            raise UserError(f"--labeled {fraction}: there are {total} labelled cases for training.")
        if count == total and not is_all:
            raise UserError(
                f"--labeled {fraction} is all {total} labelled cases, so that none becomes unlabelled. Give less, or "
                f"100% for the upper bound."
            )
        same = [other for other in counts if counts[other] == count]
        if same:
            raise UserError(f"--labeled {same[0]} and {fraction} are both {count} of {total} cases: leave one out.")
        counts[fraction] = count
    return counts


def new_ids(source: Source, count: int, wanted: Sequence[int] | None) -> list[int]:
    """The wanted ids, or the next after the source's that no folder of nnU-Net has.

    Raises:
        UserError: a wanted id is taken or not allowed, there are not `count` different ones, or too few are free.
    """
    if wanted is None:
        own = convert_dataset_name_to_id(source.name)
        free = free_ids(own, count)
        if len(free) < count:
            raise UserError(f"There are not {count} free ids from {own + 1} to {LARGEST_ID}: give --ids.")
        return free
    if len(wanted) != count or len(set(wanted)) != count:
        raise UserError(f"--ids must name {count} different id(s), one for each of --labeled.")
    for number in wanted:
        if not 1 <= number <= LARGEST_ID:
            raise UserError(f"--ids {number}: ids are from 1 to {LARGEST_ID}.")
        taken = find_candidate_datasets(number)
        if len(taken):
            raise UserError(
                f"--ids {number} is taken by {taken[0]} (in nnUNet_raw, nnUNet_preprocessed or nnUNet_results): give "
                f"another id, or remove that data set from all three folders."
            )
    return list(wanted)


def make_subset(
    source: Source,
    dataset_id: int,
    options: Mapping[str, str | int | None],
    labelled: Classes,
    withheld: Sequence[str],
    test: Mapping[str, Case],
    test_classes: Classes,
) -> NewDataset:
    """What a new data set holds.

    Args:
        source: data set to take cases from.
        dataset_id: of the new data set.
        options: of the command, for the record; "labeled" is a part of the name.
        labelled: case name to classes in it.
        withheld: labelled cases of the source that become unlabelled ones.
        test: test cases, and `test_classes` the classes in them.
    """
    unlabelled = {case: source.labelled[case] for case in withheld} | source.unlabelled
    links: dict[str, str] = {}
    for split, cases in (("Tr", {case: source.labelled[case] for case in labelled}), ("Ts", test)):
        for case in cases.values():
            links |= case.files(f"images{split}", f"labels{split}")
    for case in unlabelled.values():
        links |= case.files(UNLABELLED_FOLDER)
    links = {link: os.path.realpath(original) for link, original in links.items()}
    names = class_names(source.dataset_json).values()
    cases_per_class = {
        part: {name: sum(name in found for found in classes.values()) for name in names}
        for part, classes in (("labelled", labelled), ("test", test_classes))
    }
    # Data sets of one group have the same test cases; so has the source itself, unless some were taken out of it.
    group = source.name
    if options["test"] is not None:
        group += f", {len(test)} test cases of seed {options['seed']}"
    record = {
        "version": __version__,
        "source": source.name,
        "group": group,
        "options": dict(options),
        "labelled": sorted(labelled),
        "unlabelled": sorted(unlabelled),
        "test": sorted(test),
        "cases_per_class": cases_per_class,
        "classes_without_case": {
            part: [name for name, number in numbers.items() if number == 0] for part, numbers in cases_per_class.items()
        },
        "links": links,
    }
    own_name = source.name.split("_", 1)[-1]
    name = f"Dataset{dataset_id:03d}_{own_name}_labeled{str(options['labeled']).replace('%', 'pct')}"
    return NewDataset(name, adapted_dataset_json(source.dataset_json, len(labelled)), RECORD, record, links)


def print_summary(subsets: Sequence[NewDataset], ids: Sequence[int]) -> None:
    """Print a table of the new data sets, and the next command."""
    rows: list[tuple[str, ...]] = [("data set", "labelled", "unlabelled", "test", "classes missing")]
    for subset in subsets:
        record = subset.record
        numbers = [str(len(record[part])) for part in ("labelled", "unlabelled", "test")]
        rows.append((subset.name, *numbers, ", ".join(record["classes_without_case"]["labelled"]) or "none"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    record = subsets[0].record
    if not record["test"]:
        print("There are no test cases: --test N makes some.")
    elif record["classes_without_case"]["test"]:
        print(f"No test case has {', '.join(record['classes_without_case']['test'])}.")
    print(f"\nNext: nnUNetv2_plan_and_preprocess -d {' '.join(map(str, ids))} -pl nnUNetPlannerSemi"
          " (and -fpe nnUNetFingerprintExtractorSemi where cases lack channels)")
