"""The study: a grid that is valid before anything runs, work shared once, a record that survives, no word too many."""

import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from dvc.utils.hydra import apply_overrides
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from microlm.errors import UserError
from microlm.research.study.driver import Progress, Study, Task, tasks_of
from microlm.research.study.grid import GRID, Grid, Run, read_grid, read_yaml, rendered, resolve
from microlm.research.study.repository import FOLDER, Pipeline, git, prepare, run
from microlm.research.study.results import add_rows, read_results
from tests.research.test_study_report import row
from tests.support.clones import ROOT, Clone
from tests.support.forked_python import forked_python
from tests.support.soak import LONG
from tests.support.tiny_teacher import write_tiny_teacher

PARAMS = read_yaml(ROOT / "params.yaml")
WHEELS = ROOT / ".resume" / "wheels"


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
@settings(deadline=None)
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


@pytest.mark.parametrize("path", sorted({*(ROOT / "study").glob("*.yaml")} - {ROOT / GRID}), ids=lambda path: path.stem)
def test_every_later_study_is_a_configuration_at_its_own_scale(path: Path) -> None:
    grid = read_grid(None, None, PARAMS, path)
    assert grid.runs and tasks_of(grid, PARAMS, Pipeline(ROOT, grid.scale))


def test_studies_and_scales_never_share_a_record() -> None:
    first, other = committed(), replace(committed(), study="start", own_scale="laptop", scale="laptop")
    grids = [first, replace(first, scale="gpt2-124m"), other, replace(other, scale="gpt2-124m")]
    names = [grid.results.name for grid in grids]
    assert names == ["results.csv", "results-gpt2-124m.csv", "results-start.csv", "results-start-gpt2-124m.csv"]
    assert len({grid.report for grid in grids}) == 4 and first.report == Path("STUDY.md")
    assert other.notes != first.notes


def test_committed_grid_holds_what_the_study_promises() -> None:
    grid = committed()
    where = {run.slug: grid.sections.get(run.group, run.group) for run in grid.runs}
    by_group = {name: [run for run in grid.runs if where[run.slug] == name] for name in ("arms", "alpha", "ladder")}
    everywhere = {"fkl", "rkl", "jsd", "skew", "notebook", "selection"}
    for start, expected in (("control", {*everywhere, "minillm"}), ("scratch", everywhere)):
        assert {run.label for run in by_group["arms"] if run.settings["init"] == start} >= expected
    assert {run.settings["objective"] for run in by_group["alpha"]} >= {"fkl", "rkl"}
    for group, points in by_group.items():
        for point in points:
            same = [other for other in points if other.slug.rsplit("-", 1)[0] == point.slug.rsplit("-", 1)[0]]
            assert len({other.seed for other in same}) >= 3, (group, point.slug)


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
        st.fixed_dictionaries({"tasks": st.just(["piqa", "copa"]), "items": st.one_of(st.none(), st.integers(1, 9))}),
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


@pytest.mark.parametrize("study", ["grid", "start"])
def test_every_point_that_is_no_configuration_is_named_with_its_file(tmp_path: Path, study: str) -> None:
    cases = {"low": {"alpha": -1.0}, "good": {"alpha": 0.5}, "high": {"alpha": 2.0}}
    raw = {"seeds": [1], "grids": {"pruned": ["x"]}, "groups": {"x": {"cases": cases}}}
    grid = read_grid("pruned", "study", PARAMS, written(tmp_path, raw).rename(tmp_path / f"{study}.yaml"))
    with pytest.raises(UserError) as refused:
        tasks_of(grid, PARAMS, Pipeline(ROOT, "study"))
    lines = str(refused.value).splitlines()
    told = [re.match(rf"study/{study}.yaml: x-(\w+)-s1: alpha", line) for line in lines]
    assert sorted(found[1] for found in told if found) == ["high", "low"] and all(told)


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
            {"start", "pretrain", "select", "distill", "continue"}
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
    for harmless in (
        "README.md",
        "microlm/research/study/report.py",
        "stages/compare.py",
        "microlm/report/curve_figures.py",
    ):
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
        while len(progress.flying) < 3 and (task := progress.next_task()):
            progress.waiting.remove(task)
            progress.flying[task.name] = task
        flying = list(progress.flying.values())
        assert flying, "work is left and nothing may run"
        new = [key for task in flying for key in set(task.keys.values()) - progress.made]
        assert len(new) == len(set(new))
        ended = luck.choice(flying)
        del progress.flying[ended.name]
        progress.made |= set(ended.keys.values())


# --- what is done -----------------------------------------------------------------------------------------------------


def test_done_is_what_has_a_row_of_today_s_code_and_settings(tmp_path: Path) -> None:
    clone = Clone(tmp_path)
    grid = committed()
    study = Study(tmp_path, grid, PARAMS)
    study.csv.unlink(missing_ok=True)  # the committed study's
    assert study.remaining() == study.tasks
    first, second, third = study.tasks[:3]
    for task, code in ((first, study.code), (second, "older"), (third, study.code)):
        add_rows(study.csv, [row(run, 0.1, settings=task.settings, code=code) for run in task.runs])
    assert [task.name for task in study.tasks if task not in study.remaining()] == [first.name, third.name]

    loop = clone.directory / "microlm/training/loop.py"
    loop.write_text(loop.read_text() + "\n")
    assert Study(tmp_path, grid, PARAMS).remaining() == study.tasks


# --- through real DVC -------------------------------------------------------------------------------------------------


def test_uncommitted_code_is_refused_and_the_working_tree_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(forked_python()))  # what runs DVC
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
    # without dvc.lock, and the same commit each time, or what ended meanwhile would not be found again
    commits = {git(prepare(tmp_path, "study"), "rev-parse", "HEAD") for _ in range(2)}
    assert len(commits) == 1 and not (there / "dvc.lock").exists() and (tmp_path / "dvc.lock").exists()
    assert (prepare(tmp_path, "study") / "microlm/training/loop.py").read_text() == content


def test_without_git_runs_are_listed_and_none_is_made(tmp_path: Path) -> None:
    clone = Clone(tmp_path, forked_python())
    shutil.rmtree(tmp_path / ".git")
    command = (clone.python, "-m", "stages.study", "--scale", "smoke", "--jobs", "1")
    assert "objective=rkl" in clone.run(*command, "--list").stdout
    assert "is no Git repository with a commit" in clone.run(*command, status=1).stderr


def test_a_command_ends_with_its_process_not_with_what_that_left_running(tmp_path: Path) -> None:
    left = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)"
    pid = int(run(tmp_path, sys.executable, "-c", left).stdout)
    os.kill(pid, signal.SIGKILL)  # ProcessLookupError if `run` had waited for it


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    return Clone(tmp_path_factory.mktemp("refusing"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--study", "nope"], "there is no such file in study/; choose of grid, start"),
        (["--grid", "nope"], "'nope' is not a grid; choose one of"),
        (["--scale", "nope"], "'nope' is not a scale; choose one of"),
        (["--jobs", "4096"], "they would share"),
        (["--jobs", "0"], "must be at least 1"),
        (["--what"], "unrecognized arguments: --what"),
    ],
)
def test_bad_command_is_refused_in_one_line(refusing: Clone, arguments: list[str], told: str) -> None:
    ended = refusing.run(sys.executable, "-m", "stages.study", *arguments, status=1)
    assert ended.stderr.startswith("error: ") and told in ended.stderr and len(ended.stderr.splitlines()) == 1
    assert not (refusing.directory / FOLDER).exists()


@LONG
def test_study_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    clone = Clone(tmp_path)
    text = (tmp_path / "params.yaml").read_text()
    write_tiny_teacher(tmp_path / "data" / "tiny-teacher", wheels=WHEELS)
    # runs happen in temporary copies, which hold no file that Git ignores
    text = text.replace("model: data/tiny-teacher", f"model: {tmp_path}/data/tiny-teacher")
    (tmp_path / "params.yaml").write_text(re.sub(r"(float32, compile: off, threads): \S+", r"\1: 1}", text))
    WHEELS.mkdir(parents=True, exist_ok=True)
    (tmp_path / ".resume").mkdir()
    (tmp_path / ".resume" / "wheels").symlink_to(WHEELS)
    body = {"cases": {"fkl": {"objective": "fkl"}, "rkl": {"objective": "rkl"}}, "each": {"alpha": [0.5]}}
    written(tmp_path / "study", {"seeds": [1], "grids": {"pruned": ["arms"]}, "groups": {"arms": body}})
    clone.commit("a grid of two runs")
    commit, csv = clone.git("rev-parse", "HEAD"), tmp_path / "study" / "results-smoke.csv"
    command = [sys.executable, "-m", "stages.study", "--scale", "smoke", "--jobs", "1"]

    process = subprocess.Popen(command, cwd=tmp_path)
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
    rows = csv.read_text()
    csv.write_text(re.sub(r",[0-9a-f]{12},[0-9a-f]{12},", ",older,older,", rows))
    assert "2 runs gave the recorded losses" in clone.run(*command, "--accept").stdout
    assert csv.read_text() == rows
    assert clone.git("rev-parse", "HEAD") == commit

    # rows of a machine that gave other losses: the code of their commit is asked on this one
    elsewhere = pd.read_csv(csv)
    elsewhere["control_nats"] += 0.001
    elsewhere.assign(settings="older").to_csv(csv, index=False)
    clone.git("add", "study/results-smoke.csv")
    clone.git("commit", "--quiet", "--message", "rows of another machine")
    assert f"code of {clone.git('rev-parse', 'HEAD')[:7]} gives here" in clone.run(*command, "--accept").stdout
    assert "0 of them to do" in clone.run(*command).stdout
    commit = clone.git("rev-parse", "HEAD")
    csv.write_text(rows)
    changed = {line[3:] for line in clone.git("status", "--porcelain").splitlines()}
    assert changed == {"STUDY-smoke.md", "study/results-smoke.csv", "study/study-smoke.png"}
