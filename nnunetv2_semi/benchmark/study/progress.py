"""The progress bar of a study."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import TracebackType

from tqdm import tqdm

from nnunetv2_semi.benchmark.study.jobs import Job


class StudyBar:
    """Epochs of all trainings, with the remaining time, and how many trainings are done, run and failed.

    num_epochs: of each job, by its name.
    """

    def __init__(self, jobs: Sequence[Job], num_epochs: Mapping[str, int]) -> None:
        self.jobs, self.num_epochs = jobs, num_epochs
        self._finished = {job.name for job in jobs if job.state == "finished"}
        total = sum(num_epochs[job.name] for job in jobs)
        self._is_terminal, self._text = sys.stderr.isatty(), ""
        self.bar = tqdm(total=total, initial=self._epochs(), unit="epoch", smoothing=0.05, dynamic_ncols=True)

    def __enter__(self) -> StudyBar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.bar.close()

    def look(self) -> None:
        """Show how far the trainings are now."""
        states = {job.name: job.state for job in self.jobs if job.name not in self._finished}
        self._finished |= {name for name, state in states.items() if state == "finished"}
        counts = {state: list(states.values()).count(state) for state in ("running", "failed")}
        shown = [f"{len(self._finished)} of {len(self.jobs)} finished", f"{counts['running']} running"]
        shown += [f"{counts['failed']} FAILED"] if counts["failed"] else []
        text = ", ".join(shown)
        changed, self._text = text != self._text, text
        self.bar.set_postfix_str(text, refresh=False)
        new = self._epochs() - self.bar.n
        if new > 0:  # epochs done again after a kill are not progress, and tqdm does not go back
            self.bar.update(new)
        if changed or self._is_terminal:  # the clock ticks on a terminal, and does not fill a file with lines
            self.bar.refresh()

    def _epochs(self) -> int:
        return sum(self.num_epochs[job.name] if job.name in self._finished else
                   job.epochs_done(self.num_epochs[job.name]) for job in self.jobs)
