"""The command `nnunetv2_semi`: what nnU-Net has no command for."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Protocol, cast

from nnunetv2_semi import __version__
from nnunetv2_semi.errors import UserError

# name: (module with add_arguments(parser) and run(args) -> exit status, help)
COMMANDS = {
    "align": ("nnunetv2_semi.commands.align", "align the modalities of each case, in a new data set"),
    "benchmark": ("nnunetv2_semi.benchmark.command", "run a study of several trainers, and report on it"),
    "demo": ("nnunetv2_semi.commands.demo", "make a phantom data set, train on it and compare, in minutes on a CPU"),
    "distill": (
        "nnunetv2_semi.benchmark.distillation.command",
        "train a plain nnU-Net to predict what trained models predict",
    ),
    "doctor": ("nnunetv2_semi.doctor", "check the installation and, with -d, a data set"),
    "export": ("nnunetv2_semi.commands.export", "write a model folder that runs without this package"),
    "link": ("nnunetv2_semi.commands.link", "make the trainers visible to an editable or separate nnU-Net"),
    "postprocessing": ("nnunetv2_semi.commands.postprocessing", "nnU-Net's postprocessing, chosen by labels alone"),
    "predict": ("nnunetv2_semi.commands.predict", "predict as nnUNetv2_predict does, without images that are damaged"),
    "selftrain": (
        "nnunetv2_semi.benchmark.self_training.command",
        "train, label unlabelled cases by prediction, train again",
    ),
    "settings": ("nnunetv2_semi.commands.settings", "show what can be set in a plans file"),
    "subset": ("nnunetv2_semi.benchmark.datasets.subset", "make data sets with fewer labels from a labelled one"),
    "unlink": ("nnunetv2_semi.commands.link", "undo link"),
}


class Command(Protocol):
    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; its exit status, 1 after a UserError, 2 for a wrong call."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="nnunetv2_semi", description="Semi-supervised training inside nnU-Net v2.")
    parser.add_argument("--version", action="version", version=f"nnunetv2_semi {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen: Command | None = None
    for name, (module_name, help_text) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=help_text, description=help_text[0].upper() + help_text[1:] + ".")
        # The other modules stay unimported: torch alone takes seconds.
        if arguments and arguments[0] == name:
            chosen = cast(Command, importlib.import_module(module_name))
            chosen.add_arguments(subparser)
    args, more = parser.parse_known_args(arguments)
    args.more = more
    if more and not getattr(args, "passes_on", False):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if chosen is None:
        parser.error(f"the subcommand must come first, as in: {parser.prog} {args.command} ...")
    try:
        return chosen.run(args)
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
