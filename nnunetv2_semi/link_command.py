"""`nnunetv2_semi link`: makes the trainers visible where pip alone cannot."""

from __future__ import annotations

import argparse

from nnunetv2_semi.installation import link


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command takes no arguments."""


def run(args: argparse.Namespace) -> int:
    """Link, and say what was done."""
    print("\n".join(link()))
    print("nnU-Net now finds the trainers, the planner and the preprocessor. Check with: nnunetv2_semi doctor")
    return 0
