"""A report as sections of text, tables and pictures, written as Markdown or as one HTML page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup, escape


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column, or the first ``headers`` of them, name the row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    headers: int = 1


@dataclass(frozen=True)
class Picture:
    """An image within the page.

    uri: ``data:...``. alternative: what it shows, for who cannot see it. width: at most, in the height of the text.
    """

    uri: str
    caption: str
    alternative: str
    width: int = 23


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it, in this order. Level 2 or 3."""

    heading: str
    paragraphs: Sequence[str] = ()
    points: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    level: int = 2


def as_html(title: str, sections: Sequence[Section]) -> str:
    """One page that needs no other file. ``**`` in paragraphs and points sets bold."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["bold"] = _bold
    return environment.get_template("report.html.j2").render(title=title, sections=sections)


def as_markdown(title: str, sections: Sequence[Section]) -> str:
    """The same without pictures."""
    lines = [f"# {title}", ""]
    for section in sections:
        if section.pictures and not (section.points or section.tables):
            continue
        lines += ["#" * section.level + f" {section.heading}", ""]
        lines += [f"- {point}" for point in section.points] + ([""] if section.points else [])
        for paragraph in section.paragraphs:
            lines += [paragraph, ""]
        for table in section.tables:
            lines += [f"{table.title}:", "", *_markdown_rows(table), ""]
            lines += [table.note, ""] if table.note else []
    return "\n".join(lines)


def _bold(text: str) -> Markup:
    """Escaped HTML with ``**`` as bold."""
    return Markup(re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", str(escape(text))))


def _markdown_rows(table: Table) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(table.columns), "|" + "---|" * len(table.columns), *(line(row) for row in table.rows)]
