"""What one check found, and how it is printed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class Level(Enum):
    """How bad a finding is: PROBLEM means that training would fail."""

    OK = "OK"
    WARNING = "WARNING"
    PROBLEM = "PROBLEM"


@dataclass(frozen=True)
class Check:
    """One line of the report: what was found and, unless all is well, how to mend it."""

    level: Level
    finding: str
    remedy: str = ""

    def line(self) -> str:
        """The finding as one line of text."""
        finding = f"{self.level.value:<8} {self.finding}"
        return f"{finding} -> {self.remedy}" if self.remedy else finding


def ok(finding: str) -> Check:
    """A check that passed."""
    return Check(Level.OK, finding)


def warning(finding: str, remedy: str = "") -> Check:
    """Something worth knowing that does not stop training."""
    return Check(Level.WARNING, finding, remedy)


def problem(finding: str, remedy: str = "") -> Check:
    """Something that makes training fail; without a remedy where the finding is a message that has one."""
    return Check(Level.PROBLEM, finding, remedy)


def verdict(checks: Iterable[Check]) -> str:
    """The last line of the report."""
    levels = [check.level for check in checks]
    problems, warnings = levels.count(Level.PROBLEM), levels.count(Level.WARNING)
    with_warnings = f" ({warnings} warning{'s' if warnings > 1 else ''} above)" if warnings else ""
    if problems:
        found = "1 problem" if problems == 1 else f"{problems} problems"
        return f"Verdict: {found} found; training would fail until mended{with_warnings}."
    return f"Verdict: ready for training{with_warnings}."
