"""What results.csv says: means over seeds with their intervals, tests, and differences paired on the seed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from microlm.evaluation.results.statistics import CONFIDENCE, holm

SIGNIFICANT = 1 - CONFIDENCE
AGAINST_CONTINUED, AGAINST_CONTROL = "student_minus_continued_val_bpb", "student_minus_control_val_bpb"
OUTSIDE = "student_minus_continued_ood_bpb"


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
        scored = self.rows[self.rows[OUTSIDE].notna()]
        endings = scored["student_gold_bpb"] - scored["continued_gold_bpb"]
        return {"outside": estimate(scored[OUTSIDE]), "true endings": estimate(endings)}


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
