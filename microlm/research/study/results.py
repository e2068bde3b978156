"""study/results.csv: one row for each run of a group, the only record of a study, and what the rows say.

A row stands for its run as long as the settings it resolved to and the code it ran under are those of today.
"""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from microlm.errors import UserError
from microlm.evaluation import SCORED_MODELS
from microlm.evaluation.results.statistics import CONFIDENCE, holm
from microlm.files import atomic_file

LABELS = ("run", "group", "label", "scale", "init", "objective", "windows", "overrides", "settings", "code")
SCORES = ("val_bpb", "nats", "acc_norm", "gold_bpb")
COMPARED = ("val_bpb", "acc_norm")
PAIRS = ("student_minus_continued", "student_minus_control")
ENDS = ("", "_low", "_high")
# column -> where a run's metrics hold it
MEASURED = {
    "parameters": ("summary", "student", "parameters"),
    "tokens": ("summary", "student", "tokens"),
    **{f"{model}_{score}": ("summary", model, score) for model in SCORED_MODELS for score in SCORES},
    # in the place that the line above gives it
    **{f"{model}_nats": (f"evaluation/{model}", "validation", "nats") for model in SCORED_MODELS},
    **{f"{pair}_{score}{end}": ("summary", pair, score + end) for pair in PAIRS for score in COMPARED for end in ENDS},
    "teacher_tokens": ("summary", "teacher", "tokens_labelled"),
    "labelling_to_distilling_flops": ("summary", "teacher", "labelling_to_distilling_flops"),
    **{f"{model}_elapsed_s": (model, "elapsed_s") for model in ("student", "continued", "teacher")},
}
OUTSIDE = {
    **{f"{model}_ood_bpb": ("summary", model, "ood_bpb") for model in SCORED_MODELS},
    **{f"{pair}_ood_bpb{end}": ("summary", pair, f"ood_bpb{end}") for pair in PAIRS for end in ENDS},
}
"""Of runs that were scored on text of another kind."""
OPTIONAL = {
    **OUTSIDE,
    "start_fkl": ("student", "start_fkl"),
    "start_rkl": ("student", "start_rkl"),
    **{f"{model}_centred_mean": ("summary", model, "centred_mean") for model in SCORED_MODELS},
    **{
        f"student_minus_continued_{score}{end}": ("summary", "student_minus_continued", score + end)
        for score in ("gold_bpb", "centred_mean")
        for end in ENDS
    },
}
"""Last in a file, each only where some run has it; blank cells of a row without are NaN."""
NUMBERS = ("alpha", "seed", *MEASURED)
RECORDED = (*LABELS, *NUMBERS)
"""What every file has."""
COLUMNS = (*RECORDED, *OPTIONAL)
AGAINST_CONTINUED, AGAINST_CONTROL = "student_minus_continued_val_bpb", "student_minus_control_val_bpb"
SIGNIFICANT = 1 - CONFIDENCE

Row = dict[str, Any]


def read_results(path: Path) -> list[Row]:
    """The rows, numbers as numbers; none if there is no file yet. UserError naming the line if one is damaged."""
    try:
        lines = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"))))
    except FileNotFoundError:
        return []
    except UnicodeDecodeError as error:
        raise _damaged(path, f"not text: {error}") from None
    header = tuple(lines[0]) if lines else ()
    if header != (*RECORDED, *(column for column in OPTIONAL if column in header)):
        raise _damaged(path, "line 1: other columns than this version writes")
    rows = []
    for number, cells in enumerate(lines[1:], start=2):
        if len(cells) != len(lines[0]):
            raise _damaged(path, f"line {number}: {len(cells)} cells in place of {len(lines[0])}")
        row = dict.fromkeys(OPTIONAL, "") | dict(zip(lines[0], cells))
        for column in (*NUMBERS, *OPTIONAL):
            try:
                # as it was written, so that a row is written again as it was read
                number_of = int if row[column].lstrip("-").isdigit() else float
                row[column] = math.nan if column in OPTIONAL and not row[column] else number_of(row[column])
            except ValueError:
                raise _damaged(path, f"line {number}: {column}: {row[column]!r} is no number") from None
        rows.append(row)
    return rows


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} is damaged ({reason}); take it from Git again: git checkout {path}, or remove it: make study then "
        "collects again what DVC still has"
    )


def add_rows(path: Path, fresh: Sequence[Row]) -> None:
    """Write the file again with `fresh` in it; an older row of the same run goes."""
    by_run = {row["run"]: row for row in (*read_results(path), *fresh)}
    # a NaN is a blank cell
    rows = [{column: cell for column, cell in by_run[run].items() if cell == cell} for run in sorted(by_run)]
    columns = [*RECORDED, *(column for column in OPTIONAL if any(column in row for row in rows))]
    with atomic_file(path, "w") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % t interval, without one for a single seed; `p`: two-sided, of a mean of 0."""

    mean: float
    low: float
    high: float
    p: float
    seeds: int

    @property
    def sign(self) -> int:
        """Of all of the interval; 0 where it holds 0, and without one."""
        return int(self.low > 0) - int(self.high < 0)

    def __str__(self) -> str:
        span = "one seed" if math.isnan(self.low) else f"{self.low:+.4f}, {self.high:+.4f}"
        return f"{self.mean:+.4f} [{span}]"


def estimate(values: Sequence[float]) -> Estimate | None:
    """Over one value for each seed (Student 1908); None without any."""
    x = np.asarray(values, dtype=float)
    if len(x) < 2:
        return Estimate(float(x[0]), math.nan, math.nan, math.nan, 1) if len(x) else None
    error = stats.sem(x)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(x) - 1) * error
    # equal values have no spread to test against: a mean of 0 is then certain, any other impossible
    p = float(x.mean() == 0) if error == 0 else 2 * stats.t.sf(abs(x.mean()) / error, len(x) - 1)
    return Estimate(float(x.mean()), float(x.mean() - half), float(x.mean() + half), float(p), len(x))


def paired(a: pd.DataFrame, a_column: str, b: pd.DataFrame, b_column: str) -> Estimate | None:
    """a's column minus b's, row by row of the same seed; None without a common seed.

    Several rows of one seed count once, by their mean: runs that differ in the student alone share a `continued`.
    """
    return estimate((a.groupby("seed")[a_column].mean() - b.groupby("seed")[b_column].mean()).dropna())


@dataclass(frozen=True)
class ArmResult:
    """One arm from one start: student minus the `continued` of its own run, in bits per byte.

    `adjusted_p` bounds the chance of any false finding among the arms; it is NaN for a single seed.
    """

    arm: str
    init: str
    rows: pd.DataFrame
    difference: Estimate
    adjusted_p: float

    def __str__(self) -> str:
        return f"{self.arm} from {self.init}"

    @property
    def verdict(self) -> str:
        if math.isnan(self.adjusted_p):
            return "untested"
        if self.adjusted_p < SIGNIFICANT:
            return "better" if self.difference.mean < 0 else "worse"
        return "not told apart"

    @property
    def elsewhere(self) -> dict[str, Estimate | None]:
        """The difference on text of another kind and on HellaSwag's true endings, of the runs scored on the former."""
        scored = self.rows[self.rows["student_minus_continued_ood_bpb"].notna()]
        endings = scored["student_gold_bpb"] - scored["continued_gold_bpb"]
        return {"outside": estimate(scored["student_minus_continued_ood_bpb"]), "true endings": estimate(endings)}


def arm_results(rows: pd.DataFrame) -> list[ArmResult]:
    """The arms of the rows in their order, each start apart; Holm over all that have a test."""
    groups = list(rows.groupby(["label", "init"], sort=False))
    estimates = [estimate(part[AGAINST_CONTINUED]) for _, part in groups]
    p = np.array([found.p for found in estimates])
    tested = ~np.isnan(p)
    p[tested] = holm(p[tested])
    return [ArmResult(*names, part, found, float(q)) for (names, part), found, q in zip(groups, estimates, p)]


@dataclass(frozen=True)
class Rung:
    label: str
    against_continued: Estimate
    against_control: Estimate
    change: Estimate | None  # of student minus control from the rung before, paired on the seed


def ladder_results(rows: pd.DataFrame) -> list[Rung]:
    """The rungs that have rows, in their order."""
    rungs, before = [], rows.iloc[:0]
    for label, part in rows.groupby("label", sort=False):
        change = paired(part, AGAINST_CONTROL, before, AGAINST_CONTROL)
        rungs.append(Rung(label, estimate(part[AGAINST_CONTINUED]), estimate(part[AGAINST_CONTROL]), change))
        before = part
    return rungs
