"""`nnunetv2_semi link`: makes the trainers visible where pip alone cannot; `nnunetv2_semi unlink` undoes it."""

from __future__ import annotations

import argparse

from nnunetv2_semi import installation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The commands take no arguments."""


def run(args: argparse.Namespace) -> int:
    """Link or unlink, and say what was done."""
    if args.command == "unlink":
        print("\n".join(installation.unlink()))
        return 0
    print("\n".join(installation.link()))
    print("nnU-Net now finds the trainers, the planner and the preprocessor. Check with: nnunetv2_semi doctor")
    return 0
