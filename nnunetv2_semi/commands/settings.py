"""`nnunetv2_semi settings`: what can be set in a plans file, for each trainer."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from nnunetv2_semi.data.atomic_files import whole_file
from nnunetv2_semi.errors import UserError
from nnunetv2_semi.methods.settings import Settings, paper_value, settings_for_plan, type_name, value_range
from nnunetv2_semi.trainer_classes import method_class, trainer_names

if TYPE_CHECKING:
    from nnunetv2_semi.methods.base import Method

_BLOCK = re.compile(r"(<!-- settings: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``nnunetv2_semi settings``."""
    parser.add_argument("trainer", nargs="?", metavar="TRAINER",
                        help="as for -tr, or its part after nnUNetTrainerSemi, such as Mix, or its section's name "
                             "(default: what all have)")
    parser.add_argument("--json", action="store_true", help='the defaults, as the object "semi" of a plans file')
    parser.add_argument("--write", type=Path, metavar="PAGE", help="renew the tables of a Markdown page")


def run(args: argparse.Namespace) -> int:
    """Print a table, or JSON, or renew the tables of a page.

    Raises:
        UserError: there is no such trainer.
    """
    if args.write is not None:
        renewed = page_with_tables(args.write.read_text(encoding="utf-8"))
        with whole_file(args.write) as unfinished:
            Path(unfinished).write_text(renewed, encoding="utf-8")
        return 0
    method = None if args.trainer is None else method_of(args.trainer)
    settings = Settings if method is None else method.Settings
    if args.json:
        print(json.dumps(settings_for_plan(settings(), method.name if method else ""), indent=4))
        return 0
    rows = list(_rows(settings, beside=method is not None))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]).rstrip())
    if method is not None:
        print("\nand what all trainers have: nnunetv2_semi settings")
    return 0


def method_of(trainer: str) -> type[Method]:
    """The method of a trainer, named as for -tr, by what follows nnUNetTrainerSemi, or as its section is.

    Raises:
        UserError: There is none of that name.
    """
    named = trainer if trainer.startswith("nnUNetTrainer") else f"nnUNetTrainerSemi{trainer}"
    with contextlib.suppress(UserError):  # nnU-Net finds no trainer of that name
        if (method := method_class(named)) is not None:
            return method
    ours = [method for name in trainer_names() if (method := method_class(name)) is not None]
    for method in ours:
        if method.name == trainer:
            return method
    raise UserError(f"{trainer} is no trainer with settings of its own. Ours are "
                    f"{', '.join(sorted(method.name for method in ours))}; or give a name as for -tr.")


def page_with_tables(page: str) -> str:
    """``page`` with the table of each block that begins with ``<!-- settings: NAME -->`` made anew."""
    def table(match: re.Match) -> str:
        name = match.group(2)
        rows = _rows(Settings, beside=False) if name == "all" else _rows(method_of(name).Settings, beside=True)
        return match.group(1) + _markdown(rows) + match.group(3)
    return _BLOCK.sub(table, page)


def _rows(settings: type[Settings], beside: bool) -> Iterable[list[str]]:
    """Name, default, the paper's value where it differs, range, meaning, after a heading.

    beside: leave out those that are as in all trainers.
    """
    yield ["setting", "default", "paper", "range", "meaning"]
    for name, field in settings.model_fields.items():
        common = Settings.model_fields.get(name) if beside else None
        if common is not None and common.default == field.default:
            continue
        paper = paper_value(field)
        yield [name, json.dumps(field.default), "" if paper is ... else json.dumps(paper), _range(settings, name),
               field.description or ""]


def _range(settings: type[Settings], name: str) -> str:
    """What a field may be: its bounds, the values to choose from, or its type."""
    field, hint = settings.model_fields[name], type_name(settings, name)
    return value_range(field) or ", ".join(re.findall(r"'(\w+)'", hint)) or hint.removesuffix(" | None")


def _markdown(rows: Iterable[list[str]]) -> str:
    heading, *others = rows
    with_paper = any(row[2] for row in others)
    lines = [heading, ["---"] * 5]
    for name, default, paper, allowed, meaning in others:
        lines.append([f"`{name}`", f"`{default}`", f"`{paper}`" if paper else "", allowed, meaning])
    kept = [[cell for column, cell in enumerate(line) if column != 2 or with_paper] for line in lines]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in kept)
