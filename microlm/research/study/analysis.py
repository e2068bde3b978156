"""What results.csv says: means over seeds with their intervals, tests, and differences paired on the seed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from microlm.evaluation.results.statistics import CONFIDENCE

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
    def below(self) -> bool:
        return self.high < 0

    @property
    def above(self) -> bool:
        return self.low > 0

    def __str__(self) -> str:
        span = "one seed" if math.isnan(self.low) else f"{self.low:+.4f}, {self.high:+.4f}"
        return f"{self.mean:+.4f} [{span}]"


def estimate(values: Sequence[float]) -> Estimate:
    """Over one value for each seed (Student 1908)."""
    x = np.asarray(values, dtype=float)
    if len(x) < 2:
        return Estimate(float(x.mean()), math.nan, math.nan, math.nan, len(x))
    error = stats.sem(x)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(x) - 1) * error
    # equal values have no spread to test against: a mean of 0 is then certain, any other impossible
    p = float(x.mean() == 0) if error == 0 else 2 * stats.t.sf(abs(x.mean()) / error, len(x) - 1)
    return Estimate(float(x.mean()), float(x.mean() - half), float(x.mean() + half), float(p), len(x))


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p-values that bound the chance of any false finding among them (Holm 1979). NaN stays, uncounted."""
    adjusted = [math.nan] * len(p)
    ranked = sorted((value, place) for place, value in enumerate(p) if not math.isnan(value))
    largest = 0.0
    for rank, (value, place) in enumerate(ranked):
        largest = max(largest, min(1.0, value * (len(ranked) - rank)))
        adjusted[place] = largest
    return adjusted


@dataclass(frozen=True)
class ArmResult:
    """One arm from one start: student minus the `continued` of its own run, in bits per byte."""

    arm: str
    init: str
    student: float
    continued: float
    difference: Estimate
    within: tuple[float, float]  # mean ends of the runs' own intervals, over windows of text
    each: list[float]
    adjusted_p: float
    # of the runs that were scored on text of another kind: the difference there, and that on HellaSwag's true endings
    outside: Estimate | None
    endings: Estimate | None

    @property
    def verdict(self) -> str:
        if math.isnan(self.adjusted_p):
            return "untested"
        if self.adjusted_p < SIGNIFICANT:
            return "better" if self.difference.mean < 0 else "worse"
        return "not told apart"


def arm_results(rows: pd.DataFrame) -> list[ArmResult]:
    """The arms of the rows in their order, each start apart; Holm over all of them."""
    groups = list(rows.groupby(["label", "init"], sort=False))
    estimates = [estimate(part[AGAINST_CONTINUED]) for _, part in groups]
    adjusted = holm([found.p for found in estimates])
    results = []
    for ((arm, init), part), found, p in zip(groups, estimates, adjusted):
        scored = part[part[OUTSIDE].notna()]
        endings = scored["student_gold_bpb"] - scored["continued_gold_bpb"]
        results.append(
            ArmResult(
                arm,
                init,
                part["student_val_bpb"].mean(),
                part["continued_val_bpb"].mean(),
                found,
                (part[f"{AGAINST_CONTINUED}_low"].mean(), part[f"{AGAINST_CONTINUED}_high"].mean()),
                part[AGAINST_CONTINUED].tolist(),
                p,
                None if scored.empty else estimate(scored[OUTSIDE]),
                None if scored.empty else estimate(endings),
            )
        )
    return results


@dataclass(frozen=True)
class Rung:
    label: str
    against_continued: Estimate
    against_control: Estimate
    change: Estimate | None  # of student minus control from the rung before, paired on the seed


def ladder_results(rows: pd.DataFrame, labels: Sequence[str]) -> list[Rung]:
    """The rungs that have rows, in the order of `labels`."""
    rungs: list[Rung] = []
    before: pd.Series | None = None
    for label in labels:
        part = rows[rows["label"] == label]
        if part.empty:
            continue
        here = part.set_index("seed")[AGAINST_CONTROL]
        steps = (here - before).dropna() if before is not None else pd.Series(dtype=float)
        change = estimate(steps) if len(steps) else None
        rungs.append(Rung(label, estimate(part[AGAINST_CONTINUED]), estimate(here), change))
        before = here
    return rungs


def paired(a: pd.DataFrame, a_column: str, b: pd.DataFrame, b_column: str) -> Estimate | None:
    """a's column minus b's, row by row of the same seed; None without a common seed.

    Several rows of one seed count once, by their mean: runs that differ in the student alone share a `continued`.
    """
    means = [table.groupby("seed")[column].mean() for table, column in ((a, a_column), (b, b_column))]
    difference = (means[0] - means[1]).dropna()
    return estimate(difference) if len(difference) else None
