"""Rows of earlier code, taken for those of today's once a sample of them came out the same under it.

An edit that can change no number still changes the digest of the code, and a grid is hours of work. A sample says more
than a look at the diff, and less than the whole grid: its size is told.
"""

import math
from collections.abc import Sequence

from microlm.errors import UserError
from microlm.research.study.driver import Study, Task
from microlm.research.study.results import NUMBERS, OUTSIDE, Row, read_results, stamp_rows

EXACT = (*(column for column in NUMBERS if "val_bpb" in column or column.endswith("_nats")), *OUTSIDE)
"""What must be the same to the last digit: the held-out losses and their intervals, which carry the verdicts."""


class Recheck(Study):
    """A study of a few of the runs whose rows are of other code or settings; it writes down nothing of them."""

    sample = 2

    def stale(self) -> list[Task]:
        """Tasks whose rows are all there, of other code or settings."""
        there = {row["run"] for row in read_results(self.csv)}
        return [task for task in Study.remaining(self) if all(run.slug in there for run in task.runs)]

    def remaining(self) -> list[Task]:
        stale = self.stale()
        last = max(1, min(self.sample, len(stale)) - 1)
        return [stale[i * (len(stale) - 1) // last] for i in range(min(self.sample, len(stale)))]

    def _keep(self, fresh: Sequence[Row]) -> None:
        recorded = {row["run"]: row for row in read_results(self.csv)}
        for row in fresh:
            moved = [c for c in EXACT if not _same(row.get(c, math.nan), recorded[row["run"]][c])]
            if moved:
                told = ", ".join(f"{c} {recorded[row['run']][c]} -> {row.get(c)}" for c in moved[:3])
                raise UserError(
                    f"{self.csv}: {row['run']} comes out otherwise under this code ({told}); run: make study"
                )

    def accept(self, jobs: int) -> str:
        """Run the sample; where its losses are the recorded ones, every stale row is of today's code.

        Raises:
            UserError: a loss moved, or a run of the sample failed; the rows stand as they were.
        """
        stale, sample = self.stale(), self.remaining()
        if failed := self.run(jobs):
            raise UserError(f"{self.csv}: {', '.join(failed)} failed, see above; the rows stand as they were")
        stamp_rows(self.csv, {run.slug: (task.settings, self.code) for task in stale for run in task.runs})
        return f"{len(sample)} runs gave the recorded losses to the last digit; {len(stale)} runs are taken for done"


def _same(fresh: float, recorded: float) -> bool:
    return fresh == recorded or (math.isnan(fresh) and math.isnan(recorded))
