"""`nnunetv2_semi doctor`: says in plain words what would make training fail, and how to mend it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from nnunetv2_semi.doctor.checks import Check, Level, problem, verdict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `nnunetv2_semi doctor`."""
    parser.add_argument(
        "-d", dest="dataset", metavar="ID", help="number or name of a raw data set: check it too, decoding every file"
    )


def run(args: argparse.Namespace) -> int:
    """Print one line per check and a verdict; 1 if training would fail, else 0."""
    done = []
    for check in _checks(args.dataset):
        print(check.line(), flush=True)
        done.append(check)
    print(verdict(done))
    return int(any(check.level is Level.PROBLEM for check in done))


def _checks(dataset: str | None) -> Iterator[Check]:
    from nnunetv2_semi.doctor.environment import check_environment

    yield from check_environment()
    if dataset is None:
        return
    try:
        from nnunetv2_semi.doctor.dataset import check_dataset
    except Exception as error:  # a broken nnU-Net or torch raises whatever its libraries raise
        yield problem(f"the data set was not checked, nnU-Net cannot be imported: {error}", "mend the problems above")
        return
    yield from check_dataset(dataset)
