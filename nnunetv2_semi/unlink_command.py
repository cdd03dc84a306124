"""`nnunetv2_semi unlink`: removes what `nnunetv2_semi link` made."""

from __future__ import annotations

import argparse

from nnunetv2_semi.installation import unlink


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command takes no arguments."""


def run(args: argparse.Namespace) -> int:
    """Unlink, and say what was done."""
    print("\n".join(unlink()))
    return 0
