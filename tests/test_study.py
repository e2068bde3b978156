"""The study: a grid that is valid before anything runs, work shared once, a record that survives, no word too many."""

import itertools
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from dvc.utils.hydra import apply_overrides
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML
from scipy import stats

from microlm.errors import UserError
from microlm.study.analysis import arm_results, estimate, holm, ladder_results
from microlm.study.driver import Progress, Study, Task, next_task, tasks_of
from microlm.study.grid import GRID, Grid, Run, read_grid, read_yaml, rendered, resolve
from microlm.study.pipeline import Pipeline
from microlm.study.report import report_text, rows_of, write_report
from microlm.study.results import COLUMNS, LABELS, add_rows, read_results
from microlm.study.workspace import FOLDER, prepare
from tests.clones import ROOT, Clone
from tests.tiny_teacher import write_tiny_teacher

PARAMS = read_yaml(ROOT / "params.yaml")
WHEELS = ROOT / ".resume" / "wheels"
SOAK = pytest.mark.skipif(not os.environ.get("MICROLM_SOAK"), reason="minutes: set MICROLM_SOAK=1, or make soak")


def committed(name: str = "pruned", scale: str = "study") -> Grid:
    return read_grid(name, scale, PARAMS, ROOT / GRID)


def written(folder: Path, grid: dict[str, Any]) -> Path:
    path = folder / "grid.yaml"
    with open(path, "w") as file:
        YAML(typ="safe").dump(grid, file)
    return path


# --- the grid ---------------------------------------------------------------------------------------------------------


@given(
    cases=st.dictionaries(st.sampled_from("abcd"), st.sampled_from(["fkl", "rkl", "jsd"]), min_size=1),
    alphas=st.lists(st.sampled_from([0.1, 0.25, 0.5, 1.0]), min_size=1, unique=True),
    starts=st.lists(st.sampled_from(["control", "scratch"]), min_size=1, unique=True),
    seeds=st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True),
)
def test_group_is_cases_times_each_times_seeds(
    tmp_path_factory: pytest.TempPathFactory, cases: dict, alphas: list, starts: list, seeds: list
) -> None:
    body = {"cases": {name: {"objective": o} for name, o in cases.items()}, "each": {"alpha": alphas, "init": starts}}
    path = written(tmp_path_factory.mktemp("grid"), {"seeds": seeds, "grids": {"g": ["x"]}, "groups": {"x": body}})
    grid = read_grid("g", "study", PARAMS, path)
    made = {(run.label, run.settings["alpha"], run.settings["init"], run.settings["seed"]) for run in grid.runs}
    assert made == {(c, a, i, s) for c in cases for a in alphas for i in starts for s in seeds}
    assert len(grid.runs) == len(made) == len({run.slug for run in grid.runs})
    assert all(run.settings["objective"] == cases[run.label] for run in grid.runs)
    assert all(run.settings["scale"] == "study" and run.settings["seed"] == run.seed for run in grid.runs)
    assert len(grid.unique()) == len({tuple(run.overrides) for run in grid.runs})


@pytest.mark.parametrize("scale", ["study", "gpt2-124m"])
def test_every_point_of_the_committed_grid_is_a_configuration(scale: str) -> None:
    grid = committed("full", scale)
    assert {run.slug for run in grid.runs} > {run.slug for run in committed("pruned", scale).runs}
    tasks = tasks_of(grid, PARAMS, Pipeline(ROOT, scale))
    assert {run.slug for task in tasks for run in task.runs} == {run.slug for run in grid.runs}
    for task in tasks:
        values = task.runs[0].settings
        assert (task.config.scale, task.config.seed) == (scale, values["seed"])
        assert all(getattr(task.config, key) == value for key, value in values.items() if "." not in key)
        assert re.fullmatch(r"[A-Za-z0-9.-]+", task.name)


def test_committed_grid_holds_what_the_study_promises() -> None:
    runs = committed().runs
    by_group = {group: [run for run in runs if run.group == group] for group in ("arms", "alpha", "ladder")}
    for start in ("control", "scratch"):
        labels = {run.label for run in by_group["arms"] if run.settings["init"] == start}
        assert labels == {"fkl", "rkl", "jsd", "skew", "notebook", "minillm", "selection"}
    assert {run.settings["objective"] for run in by_group["alpha"]} >= {"fkl", "rkl"}
    for group, points in by_group.items():
        for run in points:
            same = [other for other in points if other.slug.rsplit("-", 1)[0] == run.slug.rsplit("-", 1)[0]]
            assert len({other.seed for other in same}) >= 3, (group, run.slug)


def test_ladder_goes_from_the_notebook_to_reverse_kl_and_each_rung_keeps_the_rest() -> None:
    rungs = [run for run in committed().runs if run.group == "ladder" and run.seed == 1]
    described = read_yaml(ROOT / GRID)["groups"]["ladder"]["ladder"]
    assert [run.label for run in rungs] == list(described)
    assert rungs[0].settings["objective"] == "notebook" and rungs[-1].settings["objective"] == "rkl"
    for before, after in itertools.pairwise(rungs):
        a, b = resolve(before, PARAMS, "study")[0], resolve(after, PARAMS, "study")[0]
        flat = [pd.json_normalize(whole).fillna("").iloc[0].astype(str) for whole in (a, b)]
        changed = {key for key in flat[0].index if flat[0][key] != flat[1][key]}
        assert changed and {key.split(".")[-1] for key in changed} <= {k.split(".")[-1] for k in described[after.label]}


@given(
    st.one_of(
        st.booleans(),
        st.none(),
        st.integers(-(10**12), 10**12),
        st.floats(allow_nan=False, allow_infinity=False, width=32),
        st.sampled_from(["rkl", "gpt2-124m", "/a/b.json", "two words", "a=b", "x,y", "it's", "1e5", "true", "null"]),
        st.lists(st.floats(0.5, 4.0), min_size=1, max_size=3),
    )
)
@settings(deadline=None)
def test_overrides_reach_params_as_they_were_meant(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.mktemp("params") / "params.yaml"
    path.write_text("key: old\n")
    apply_overrides(path, [f"key={rendered(value)}"])
    assert YAML(typ="safe", pure=True).load(path.read_text()) == {"key": value}


BAD_GRIDS = [
    ({"grids": {"pruned": ["x"]}, "groups": {}}, "groups.x: is not there"),
    (
        {"groups": {"x": {"cases": {"a": {"alhpa": 0.5}}}}},
        "x.a: alhpa: is not a key of params.yaml; did you mean alpha?",
    ),
    ({"groups": {"x": {"cases": {"a": {"continuation.epoch": 2}}}}}, "did you mean continuation.epochs?"),
    ({"groups": {"x": {"cases": {}, "ladder": {}}}}, "needs either `cases` or `ladder`"),
    ({"groups": {"x": {"cases": {"a": {}}, "eech": {}}}}, "groups.x.eech: unknown"),
    ({"seeds": [], "groups": {"x": {"cases": {"a": {}}}}}, "seeds: must be a list"),
    ({"grids": {"other": ["x"]}, "groups": {"x": {"cases": {"a": {}}}}}, "'pruned' is not a grid; choose one of other"),
]


@pytest.mark.parametrize(("changed", "told"), BAD_GRIDS)
def test_bad_grid_is_refused_in_one_line(tmp_path: Path, changed: dict[str, Any], told: str) -> None:
    path = written(tmp_path, {"seeds": [1], "grids": {"pruned": ["x"]}} | changed)
    with pytest.raises(UserError) as refused:
        read_grid("pruned", "study", PARAMS, path)
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_every_point_that_is_no_configuration_is_named(tmp_path: Path) -> None:
    cases = {"low": {"alpha": -1.0}, "good": {"alpha": 0.5}, "high": {"alpha": 2.0}}
    raw = {"seeds": [1], "grids": {"pruned": ["x"]}, "groups": {"x": {"cases": cases}}}
    grid = read_grid("pruned", "study", PARAMS, written(tmp_path, raw))
    with pytest.raises(UserError) as refused:
        tasks_of(grid, PARAMS, Pipeline(ROOT, "study"))
    lines = str(refused.value).splitlines()
    assert sorted(re.findall(r"x-(\w+)-s1: alpha", line) for line in lines) == [["high"], ["low"]]


# --- work that runs share ---------------------------------------------------------------------------------------------


def keys(pipeline: Pipeline, **changed: Any) -> dict[str, str]:
    run = Run("g", "l", "slug", 1, {"scale": "study", "seed": 1} | changed)
    return pipeline.keys(resolve(run, PARAMS, "study")[0])


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"alpha": 0.123}, {"distill", "evaluate@student"}),
        ({"init": "scratch"}, {"distill", "continue", "evaluate@student", "evaluate@continued"}),
        (
            {"seed": 2},
            {"pretrain", "select", "distill", "continue"}
            | {f"evaluate@{m}" for m in ("control", "continued", "student")},
        ),
        ({"scales.study.probe.windows": 7}, set()),
    ],
)
def test_runs_share_the_stages_whose_parameters_they_share(changed: dict[str, Any], expected: set[str]) -> None:
    pipeline = Pipeline(ROOT, "study")
    before, after = keys(pipeline), keys(pipeline, **changed)
    assert {stage for stage in before if before[stage] != after[stage]} == expected
    assert "teacher" in before and "probe" not in before


def test_code_is_what_decides_a_number(tmp_path: Path) -> None:
    clone = Clone(tmp_path)
    before = Pipeline(tmp_path, "study").code()
    for harmless in ("README.md", "microlm/study/report.py", "stages/compare.py", "microlm/report/figures.py"):
        (clone.directory / harmless).write_text((clone.directory / harmless).read_text() + "\n")
    with open(clone.directory / "dvc.yaml", "a") as file:
        file.write("# a comment\n")
    assert Pipeline(tmp_path, "study").code() == before
    for file in ("microlm/objective/divergences.py", "stages/pretrain.py"):
        (clone.directory / file).write_text((clone.directory / file).read_text() + "\n")
        assert {name for name, value in Pipeline(tmp_path, "study").code().items() if before[name] != value} >= {file}


@given(st.lists(st.sets(st.integers(0, 6), min_size=1, max_size=4), min_size=1, max_size=12), st.randoms())
def test_no_two_runs_in_flight_do_the_same_work(works: list[set[int]], luck: random.Random) -> None:
    tasks = [Task(f"t{i}", [], None, "", {str(key): f"{key}" for key in work}) for i, work in enumerate(works)]
    progress = Progress(list(tasks))
    while progress.waiting or progress.flying:
        while len(progress.flying) < 3 and (task := next_task(progress)):
            progress.waiting.remove(task)
            progress.flying[task.name] = task
        flying = list(progress.flying.values())
        assert flying, "work is left and nothing may run"
        new = [key for task in flying for key in set(task.keys.values()) - progress.made]
        assert len(new) == len(set(new))
        ended = luck.choice(flying)
        del progress.flying[ended.name]
        progress.made |= set(ended.keys.values())


# --- the record -------------------------------------------------------------------------------------------------------


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
        (lambda text: text.removesuffix("1.0\n") + "one\n", "line 3: teacher_elapsed_s: 'one' is no number"),
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
    code = (
        "import sys; from pathlib import Path; from tests.test_study import *\n"
        "for number, run in enumerate(committed().runs[:20] * 100): add_rows(Path(sys.argv[1]), [row(run, number / 7)])"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT)
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


def test_done_is_what_has_a_row_of_today_s_code_and_settings(tmp_path: Path) -> None:
    clone = Clone(tmp_path)
    grid = committed()
    study = Study(tmp_path, grid, PARAMS)
    assert study.todo() == study.tasks
    first, second, third = study.tasks[:3]
    for task, code in ((first, study.code), (second, "older"), (third, study.code)):
        add_rows(study.csv, [row(run, 0.1, settings=task.settings, code=code) for run in task.runs])
    assert [task.name for task in study.tasks if task not in study.todo()] == [first.name, third.name]

    loop = clone.directory / "microlm/training/loop.py"
    loop.write_text(loop.read_text() + "\n")
    assert Study(tmp_path, grid, PARAMS).todo() == study.tasks


# --- the report -------------------------------------------------------------------------------------------------------


def synthetic(values: dict[tuple[str, str], list[float]]) -> tuple[Grid, pd.DataFrame]:
    """A grid of (group, label) -> a difference for each seed, and its rows."""
    points = [
        (Run(group, label, f"{group}-{label}-s{seed}", seed, {"init": "control", "seed": seed}), difference)
        for (group, label), each in values.items()
        for seed, difference in enumerate(each, start=1)
    ]
    grid = Grid("g", "study", {group: "" for group, _ in values}, [run for run, _ in points], {})
    return grid, pd.DataFrame([row(run, difference) for run, difference in points], columns=COLUMNS)


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
        ("arms", "unsure"): [-0.30, 0.20, 0.15],
    }
    grid, rows = synthetic(values)
    text = report_text(rows, grid, "study/study.png")
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
    assert "Written by hand" in report_text(rows, grid, "f", "What I make of it.")
    partial = report_text(rows.iloc[:-2], grid, "f")
    assert "2 of 9 points are not here yet" in partial and "All of it is here" not in partial
    assert {r.arm: r.verdict for r in arm_results(rows)} == {
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
    text = report_text(rows, grid, "f")
    rungs = ladder_results(rows, [label for _, label in values])
    expected = 2 * (np.array(values["ladder", "cure"]) - np.array(values["ladder", "second"]))
    assert rungs[2].change.mean == pytest.approx(expected.mean())
    assert rungs[0].change is None
    assert "At rung `notebook` the student is worse than the control it starts from" in text
    assert "the fall is first no longer shown at rung `cure`" in text
    assert "The largest fall in the mean is at rung `cure`" in text

    grid, rows = synthetic({key: [-abs(x) for x in each] for key, each in values.items()})
    assert "there is no fall here to explain" in report_text(rows, grid, "f")


def test_cost_and_selection_are_paired_on_the_seed() -> None:
    grid, rows = synthetic({("arms", a): [0.1, 0.2, 0.3] for a in ("fkl", "selection")} | {("flop", "more"): [0.0] * 3})
    rows.loc[rows["label"] == "selection", "windows"] = "difference"
    rows.loc[rows["group"] == "flop", "windows"] = "any"
    rows.loc[rows["group"] == "flop", "continued_val_bpb"] = [1.0, 1.1, 1.3]
    rows.loc[rows["label"] == "selection", "continued_val_bpb"] = [1.40, 1.41, 1.42]
    text = report_text(rows, grid, "f")
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
    assert len(rows_of(grid, tmp_path / "study" / "results.csv")) == 60
    assert b"nan" not in first
    with pytest.raises(UserError, match="holds no run"):
        write_report(tmp_path / "empty", grid)


# --- through real DVC -------------------------------------------------------------------------------------------------


def test_uncommitted_code_is_refused_and_the_working_tree_is_left_alone(tmp_path: Path) -> None:
    clone = Clone(tmp_path)
    there = prepare(tmp_path, "study")
    assert there == tmp_path / FOLDER / "repository" and clone.git("status", "--porcelain") == ""
    edited = clone.directory / "microlm/training/loop.py"
    edited.write_text(content := edited.read_text() + "# an edit\n")
    with pytest.raises(UserError, match=r"microlm/training/loop\.py: changed since the last commit") as refused:
        prepare(tmp_path, "study")
    assert "\n" not in str(refused.value)
    assert edited.read_text() == content
    clone.commit("the edit")
    assert (prepare(tmp_path, "study") / "microlm/training/loop.py").read_text() == content


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--grid", "nope"], "'nope' is not a grid; choose one of"),
        (["--scale", "nope"], "'nope' is not a scale; choose one of"),
        (["--jobs", "4096"], "they would share"),
        (["--jobs", "0"], "must be at least 1"),
        (["--what"], "unrecognized arguments: --what"),
    ],
)
def test_bad_command_is_refused_in_one_line(tmp_path: Path, arguments: list[str], told: str) -> None:
    clone = Clone(tmp_path)
    ended = clone.run(sys.executable, "-m", "stages.study", *arguments, status=1)
    assert ended.stderr.startswith("error: ") and told in ended.stderr and len(ended.stderr.splitlines()) == 1
    assert not (tmp_path / FOLDER).exists()


@SOAK
def test_study_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    clone = Clone(tmp_path)
    text = (tmp_path / "params.yaml").read_text()
    write_tiny_teacher(tmp_path / "data" / "tiny-teacher", wheels=WHEELS)
    # runs happen in temporary copies, which hold no file that Git ignores
    text = text.replace("model: data/tiny-teacher", f"model: {tmp_path}/data/tiny-teacher")
    (tmp_path / "params.yaml").write_text(re.sub(r"(float32, compile: off, threads): \S+", r"\1: 1}", text))
    (tmp_path / ".resume").mkdir()
    (tmp_path / ".resume" / "wheels").symlink_to(WHEELS)
    body = {"cases": {"fkl": {"objective": "fkl"}, "rkl": {"objective": "rkl"}}, "each": {"alpha": [0.5]}}
    written(tmp_path / "study", {"seeds": [1], "grids": {"pruned": ["arms"]}, "groups": {"arms": body}})
    clone.commit("a grid of two runs")
    commit, csv = clone.git("rev-parse", "HEAD"), tmp_path / "study" / "results-smoke.csv"
    command = [sys.executable, "-m", "stages.study", "--scale", "smoke", "--jobs", "1"]

    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    while not csv.exists():
        assert process.poll() is None, "the study ended before its first row"
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 130
    assert 1 <= len(read_results(csv)) <= 2
    running = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True).stdout
    assert running == ""

    first = csv.read_text().splitlines()[1]
    assert "study: STUDY-smoke.md" in clone.run(*command).stdout
    assert first in csv.read_text().splitlines() and len(read_results(csv)) == 2
    assert "0 of them to do" in clone.run(*command).stdout
    assert clone.git("rev-parse", "HEAD") == commit
    changed = {line[3:] for line in clone.git("status", "--porcelain").splitlines()}
    assert changed == {"STUDY-smoke.md", "study/results-smoke.csv", "study/study-smoke.png"}
