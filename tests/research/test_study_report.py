"""The study's record and report: a CSV that survives, and a report that says what its rows say and no more."""

import json
import math
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from microlm.errors import UserError
from microlm.evaluation.results.statistics import holm
from microlm.research.study.grid import GRID, Grid, Run, read_grid, read_yaml
from microlm.research.study.report import report_text, rows_of, write_report
from microlm.research.study.results import (
    COLUMNS,
    LABELS,
    add_rows,
    arm_results,
    estimate,
    ladder_results,
    read_results,
)
from tests.support.clones import ROOT


def committed() -> Grid:
    return read_grid("pruned", "study", read_yaml(ROOT / "params.yaml"), ROOT / GRID)


def row(run: Run, difference: float, **changed: Any) -> dict[str, Any]:
    """A row of results.csv: the student is `difference` bits per byte from continued and twice that from control."""
    values: dict[str, Any] = {column: "x" if column in LABELS else 1.0 for column in COLUMNS}
    values |= {"run": run.slug, "group": run.group, "label": run.label, "seed": run.seed}
    values |= {"overrides": " ".join(run.overrides), "windows": "cached"}
    values |= {"init": run.settings.get("init", "control"), "alpha": run.settings.get("alpha", 0.5)}
    values |= {"continued_val_bpb": 1.5, "student_val_bpb": 1.5 + difference}
    for pair, times in (("continued", 1), ("control", 2)):
        name = f"student_minus_{pair}_val_bpb"
        values |= {name: times * difference, f"{name}_low": times * difference - 0.01}
        values |= {f"{name}_high": times * difference + 0.01}
    return values | changed


def test_rows_come_back_as_they_were_written_and_a_new_one_replaces_its_run(tmp_path: Path) -> None:
    path, runs = tmp_path / "results.csv", committed().runs[:4]
    for run, value in zip(runs, (0.1, -0.25, 1e-7, 3.0)):
        add_rows(path, [row(run, value)])
    before = path.read_bytes()
    add_rows(path, [row(runs[1], -0.25)])
    assert path.read_bytes() == before
    add_rows(path, [row(runs[1], 0.75, code="newer")])
    found = {entry["run"]: entry for entry in read_results(path)}
    assert [found[run.slug]["student_minus_continued_val_bpb"] for run in runs] == [0.1, 0.75, 1e-7, 3.0]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda text: text[: len(text) - 40], "line 3: "),
        (
            lambda text: text.removesuffix("1.0\n") + "one\n",
            "line 3: student_minus_continued_centred_mean_high: 'one' is no number",
        ),
        (lambda text: text.replace("run,", "ran,", 1), "line 1: other columns"),
        (lambda text: "", "line 1: other columns"),
    ],
)
def test_damaged_record_is_refused_and_stays(tmp_path: Path, damage: Any, told: str) -> None:
    path, runs = tmp_path / "results.csv", committed().runs
    add_rows(path, [row(runs[0], 0.1), row(runs[1], 0.2)])
    path.write_text(damaged := damage(path.read_text()))
    for attempt in (lambda: read_results(path), lambda: add_rows(path, [row(runs[2], 0.3)])):
        with pytest.raises(UserError) as refused:
            attempt()
        assert told in str(refused.value) and "\n" not in str(refused.value)
    assert path.read_text() == damaged


def test_record_of_a_killed_driver_is_whole(tmp_path: Path) -> None:
    path, n = tmp_path / "results.csv", 20
    rows = [row(run, number / 7) for number, run in enumerate(committed().runs[:n])]
    code = (
        "import json, sys; from pathlib import Path; from microlm.research.study.results import add_rows\n"
        "for row in json.loads(sys.argv[2]) * 1000: add_rows(Path(sys.argv[1]), [row])"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path), json.dumps(rows)], cwd=ROOT)
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(random.random())
    process.kill()
    process.wait()
    rows = read_results(path)
    assert 1 <= len(rows) <= n
    add_rows(path, [row(committed().runs[0], 0.5)])
    assert len(read_results(path)) in (len(rows), len(rows) + 1)


# --- the report -------------------------------------------------------------------------------------------------------


def synthetic(values: dict[tuple[str, str], list[float]]) -> tuple[Grid, pd.DataFrame]:
    """A grid of (group, label) -> a difference for each seed, and its rows."""
    points = [
        (Run(group, label, f"{group}-{label}-s{seed}", seed, {"init": "control", "seed": seed}), difference)
        for (group, label), each in values.items()
        for seed, difference in enumerate(each, start=1)
    ]
    sections = {"arms_again": "arms"}
    grid = Grid("g", "study", {group: "" for group, _ in values}, [run for run, _ in points], {}, sections)
    rows = pd.DataFrame([row(run, difference) for run, difference in points], columns=COLUMNS)
    return grid, rows.assign(section=rows["group"].replace(sections))


@given(st.lists(st.floats(-1, 1).map(lambda x: round(x, 6)), min_size=2, max_size=8))
def test_estimate_is_the_textbook_t_interval(values: list[float]) -> None:
    n, mean = len(values), math.fsum(values) / len(values)
    error = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1) / n)
    found = estimate(values)
    half = stats.t(n - 1).isf(0.025) * error
    assert (found.mean, found.low, found.high) == pytest.approx((mean, mean - half, mean + half), abs=1e-9)
    if error > 1e-6:
        assert found.p == pytest.approx(2 * stats.t(n - 1).sf(abs(mean) / error), abs=1e-6)


def test_three_seeds_are_4_30_standard_errors_wide() -> None:
    found = estimate([1.0, 2.0, 3.0])
    assert (found.high - found.mean) / (1 / math.sqrt(3)) == pytest.approx(4.303, abs=1e-3)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=10))
def test_holm_rejects_as_the_step_down_procedure_does(p: list[float]) -> None:
    for level in (0.01, 0.05, 0.3):
        ranked, rejected = sorted(range(len(p)), key=lambda i: p[i]), set()
        for rank, place in enumerate(ranked):
            if p[place] * (len(p) - rank) >= level:
                break
            rejected.add(place)
        assert {i for i, value in enumerate(holm(p)) if value < level} == rejected


def test_report_says_what_the_rows_say_and_no_more(tmp_path: Path) -> None:
    values = {
        ("arms", "down"): [-0.100, -0.101, -0.102],
        ("arms", "up"): [0.200, 0.201, 0.199],
        ("arms_again", "unsure"): [-0.30, 0.20, 0.15],
        ("forms", "form"): [0.01, 0.02, 0.03],
    }
    grid, rows = synthetic(values)
    text = report_text(rows, grid)
    for (_, label), each in values.items():
        mean, half = np.mean(each), stats.t(2).isf(0.025) * np.std(each, ddof=1) / math.sqrt(3)
        line = next(line for line in text.splitlines() if line.startswith(f"| {label} "))
        assert f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}]" in line
        assert f"[{mean - 0.01:+.4f}, {mean + 0.01:+.4f}]" in line
        assert f"{1.5 + mean:.4f}" in line
    assert "Better than the matched control, after the correction: down from control (-0.1010)." in text
    assert "Worse than the matched control, after the correction: up from control (+0.2000)." in text
    assert "Not told apart from the matched control, after the correction: unsure from control" in text
    assert "All of it is here." in text and "Reading of these results" not in text
    alone = report_text(rows[rows["seed"] == 1], grid)
    assert "One seed, hence no test: down from control (-0.1000), up from" in alone and "nan" not in alone
    assert "Written by hand" in report_text(rows, grid, "What I make of it.")
    arms = rows[rows["group"] != "forms"]
    partial = report_text(rows.iloc[:-2], grid)
    assert "2 of 12 points are not here yet" in partial and "All of it is here" not in partial
    assert {r.arm: r.verdict for r in arm_results(arms)} == {
        "down": "better",
        "up": "worse",
        "unsure": "not told apart",
    }


def test_report_finds_the_rung_that_ends_the_fall() -> None:
    values = {
        ("ladder", "notebook"): [0.30, 0.31, 0.32],
        ("ladder", "second"): [0.29, 0.31, 0.31],
        ("ladder", "cure"): [-0.05, -0.06, -0.04],
        ("ladder", "last"): [-0.05, -0.06, -0.05],
    }
    grid, rows = synthetic(values)
    text = report_text(rows, grid)
    rungs = ladder_results(rows)
    expected = 2 * (np.array(values["ladder", "cure"]) - np.array(values["ladder", "second"]))
    assert rungs[2].change.mean == pytest.approx(expected.mean())
    assert rungs[0].change is None
    assert "At rung `notebook` the student is worse than the control it starts from" in text
    assert "the fall is first no longer shown at rung `cure`" in text
    assert "The largest fall in the mean is at rung `cure`" in text

    grid, rows = synthetic({key: [-abs(x) for x in each] for key, each in values.items()})
    assert "there is no fall here to explain" in report_text(rows, grid)


def test_cost_and_selection_are_paired_on_the_seed() -> None:
    grid, rows = synthetic({("arms", a): [0.1, 0.2, 0.3] for a in ("fkl", "selection")} | {("flop", "more"): [0.0] * 3})
    rows.loc[rows["label"] == "selection", "windows"] = "difference"
    rows.loc[rows["group"] == "flop", "windows"] = "any"
    rows.loc[rows["group"] == "flop", "continued_val_bpb"] = [1.0, 1.1, 1.3]
    rows.loc[rows["label"] == "selection", "continued_val_bpb"] = [1.40, 1.41, 1.42]
    text = report_text(rows, grid)
    assert f"| fkl | control | {estimate([0.6, 0.6, 0.5])} |" in text
    assert f"| control | all cached | {estimate([-0.1, -0.09, -0.08])} |" in text


def test_report_of_the_real_grid_is_drawn_from_its_csv_alone(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    grid, luck = committed(), np.random.Generator(np.random.PCG64(0))
    for run in grid.runs[:60]:
        add_rows(tmp_path / "study" / "results.csv", [row(run, float(luck.normal(0, 0.01)))])
    (tmp_path / "study" / "results.csv").write_text((tmp_path / "study" / "results.csv").read_text())
    first = write_report(tmp_path, grid).read_bytes()
    figure = (tmp_path / "study" / "study.png").read_bytes()
    assert figure.startswith(b"\x89PNG")
    assert write_report(tmp_path, grid).read_bytes() == first
    assert (tmp_path / "study" / "study.png").read_bytes() == figure
    assert len(rows_of(grid, tmp_path)) == 60
    assert b"nan" not in first
    with pytest.raises(UserError, match="holds no run"):
        write_report(tmp_path / "empty", grid)
