"""Run a grid to its end: queue what is not done, in an order that makes shared work once, and collect what ended."""

import functools
import operator
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout
from tqdm import tqdm

from microlm.config import Config
from microlm.errors import UserError, keeping
from microlm.files import sha256_json
from microlm.research.study.grid import Grid, Run, resolve
from microlm.research.study.repository import CLONE, FOLDER, DvcQueue, Pipeline, commit_of, prepare
from microlm.research.study.results import MEASURED, NUMBERS, OPTIONAL, OUTSIDE, Row, add_rows, read_results
from microlm.runtime.terminal import progress_bar

POLL_S = 1.0
LOG_LINES = 12
EXACT = [*(column for column in NUMBERS if "val_bpb" in column or column.endswith("_nats")), *OUTSIDE]
"""What a sample must give to the last digit: the held-out losses and their intervals, which carry the verdicts."""


@dataclass(frozen=True)
class Task:
    """A run as the queue sees it; `runs` are the points of the grid that it stands for."""

    name: str
    runs: Sequence[Run]
    config: Config
    settings: str
    keys: Mapping[str, str]  # stage -> digest of its work


@dataclass
class Progress:
    waiting: list[Task]
    flying: dict[str, Task] = field(default_factory=dict)
    # begins empty: that a row is there does not say that its stages' outputs are in this machine's cache
    made: set[str] = field(default_factory=set)
    broken: dict[str, str] = field(default_factory=dict)  # digest of work -> run in which it failed
    failed: list[str] = field(default_factory=list)

    def next_task(self) -> Task | None:
        """The first waiting task that no task in flight works for: two that train the same would both pay for it."""
        busy = {key for task in self.flying.values() for key in task.keys.values()} - self.made
        return next((task for task in self.waiting if busy.isdisjoint(task.keys.values())), None)


def tasks_of(grid: Grid, params: Mapping[str, Any], pipeline: Pipeline) -> list[Task]:
    """One task for each different run of the grid, in its order. UserError with a line for each that is no
    configuration."""
    tasks, wrong = [], []
    for digest, runs in grid.unique().items():
        try:
            whole, config = resolve(runs[0], params, grid.scale, grid.file)
        except UserError as error:
            wrong.append(str(error))
            continue
        name = f"{runs[0].slug}-{digest}"
        tasks.append(Task(name, runs, config, sha256_json(whole)[:12], pipeline.keys(whole)))
    if wrong:
        raise UserError("\n".join(wrong))
    return tasks


class Study:
    """One call of `make study`."""

    def __init__(self, root: Path, grid: Grid, params: Mapping[str, Any]) -> None:
        self.root, self.grid = root, grid
        pipeline = Pipeline(root, grid.scale)
        self.code = code_of(pipeline)
        self.tasks = tasks_of(grid, params, pipeline)
        self.csv = root / grid.results

    def remaining(self) -> list[Task]:
        """Tasks of which at least one row is missing or of other code or settings."""
        done = {(row["run"], row["settings"], row["code"]) for row in read_results(self.csv)}
        return [t for t in self.tasks if not done.issuperset((run.slug, t.settings, self.code) for run in t.runs)]

    def stale(self) -> list[Task]:
        """Tasks whose rows are all there, of other code or settings."""
        there = {row["run"] for row in read_results(self.csv)}
        return [task for task in self.remaining() if all(run.slug in there for run in task.runs)]

    def accept(self, jobs: int) -> str:
        """Take rows of earlier code for those of today's once a sample of them, run again, gives the recorded losses.

        An edit that can change no number still changes the digest of the code, and a grid is hours of work. A sample
        says more than a look at the diff, and less than the whole grid: its size is told. Machines differ in the last
        digits, so where the recorded losses do not come out, the code that recorded them runs the sample here too.

        Raises:
            UserError: today's code gives another loss, or a run of the sample failed; the rows stand as they were.
        """
        stale = self.stale()
        sample = stale[:: max(1, len(stale) - 1)]  # the first and the last
        fresh, told = self._again(sample, jobs), "gave the recorded losses to the last digit"
        if moved := differences(read_results(self.csv), fresh):
            commit = commit_of(self.root, self.csv)
            print(
                f"study: not the recorded losses: {', '.join(moved[:3])}; does the code of {commit[:7]} give them here?"
            )
            if changed := differences(self._again(sample, jobs, commit), fresh):
                cause = f"{', '.join(changed[:3])} from the code of {commit[:7]} to this one, on this machine"
                raise UserError(f"{self.csv}: {cause}; run: make study")
            told = f"gave what the code of {commit[:7]} gives here to the last digit, though not what was recorded"
        stamps = {run.slug: {"settings": task.settings, "code": self.code} for task in stale for run in task.runs}
        add_rows(self.csv, [row | stamps[row["run"]] for row in read_results(self.csv) if row["run"] in stamps])
        return f"{len(sample)} runs {told}; {len(stale)} runs are taken for done"

    def _again(self, sample: Sequence[Task], jobs: int, commit: str = "HEAD") -> list[Row]:
        rows: list[Row] = []
        if failed := self.run(sample, jobs, commit, rows.extend):
            raise UserError(f"{self.csv}: {', '.join(failed)} failed, see above; the rows stand as they were")
        return rows

    def run(
        self,
        waiting: Sequence[Task],
        jobs: int,
        commit: str = "HEAD",
        keep: Callable[[list[Row]], None] | None = None,
    ) -> list[str]:
        """Run tasks, `jobs` at once; returns the names of those that failed, whose logs have been shown.

        Args:
            commit: whose code runs them.
            keep: told the rows of each in place of recording them.
        """
        self.progress, self.commit = Progress(list(waiting)), commit
        self.keep = keep or functools.partial(add_rows, self.csv)
        self.queue = DvcQueue((self.root / CLONE).absolute(), jobs)
        points, folder = len(self.grid.runs), self.root / FOLDER
        print(f"study: {len(self.tasks)} runs for {points} points of the grid, {len(waiting)} of them to do")
        if waiting:
            try:
                with FileLock(folder / "lock", timeout=0):
                    self._run_locked()
            except Timeout:
                raise UserError(f"{folder}: another study is running here; wait for it or stop it") from None
        return self.progress.failed

    def _run_locked(self) -> None:
        queue, progress = self.queue, self.progress
        if (queue.directory / ".git").is_dir():
            queue.clear()  # what a killed study left running
        clone = prepare(self.root, self.grid.scale, self.commit)
        if self.commit != "HEAD":
            self.refuse_other_code(clone)
        ended = queue.finished()  # on this very commit, after the driver of an earlier study was gone
        progress.flying = {task.name: task for task in progress.waiting if task.name in ended}
        progress.waiting = [task for task in progress.waiting if task.name not in ended]
        done = len(self.tasks) - len(progress.waiting) - len(progress.flying)
        told = "what was under way goes on from its last step"
        try:
            with keeping(lambda: told), progress_bar(len(self.tasks), done, " runs", "study") as self.bar:
                while progress.waiting or progress.flying:
                    self._fill()
                    self._collect()
                    time.sleep(POLL_S)
        finally:
            queue.clear()

    def refuse_other_code(self, clone: Path) -> None:
        """UserError where the rows of what is to run were not made by the code that `clone` holds."""
        runs = {run.slug for task in self.progress.waiting for run in task.runs}
        code = code_of(Pipeline(clone, self.grid.scale))
        if {row["code"] for row in read_results(self.csv) if row["run"] in runs} != {code}:
            told = f"the commit that last changed it, {self.commit[:7]}, has other code than its rows"
            raise UserError(f"{self.csv}: {told}, so what moved them is not known; run: make study")

    def _fill(self) -> None:
        progress = self.progress
        # one more than can run, so that a worker never waits for the next to be queued
        while len(progress.flying) <= self.queue.jobs and (task := progress.next_task()):
            progress.waiting.remove(task)
            if culprit := next((progress.broken[key] for key in task.keys.values() if key in progress.broken), None):
                progress.failed.append(task.name)
                tqdm.write(f"study: {task.name} needs what failed in {culprit}; left out")
                continue
            self.queue.add(task.name, task.runs[0].overrides)
            progress.flying[task.name] = task

    def _collect(self) -> None:
        at_work = self.queue.keep_working(len(self.progress.flying))
        finished, failed = self.queue.finished(), self.queue.failed()
        for name, task in list(self.progress.flying.items()):
            if name in finished:
                self._record(task, finished[name])
            elif name in failed or not at_work:  # or lost, e.g. while it was set up
                self._tell_failure(task)

    def _record(self, task: Task, commit: str) -> None:
        metrics = self.queue.metrics(commit)
        try:
            fresh = [row_of(run, task, metrics, self.code) for run in task.runs]
        except KeyError as error:
            raise UserError(f"metrics of {task.name} lack {error}; bring the code and the study together") from None
        self.keep(fresh)
        del self.progress.flying[task.name]
        self.progress.made |= set(task.keys.values())
        self.bar.update()
        difference = fresh[0]["student_minus_continued_val_bpb"]
        tqdm.write(f"study: {task.runs[0].slug}: student - continued {difference:+.4f} bits per byte")

    def _tell_failure(self, task: Task) -> None:
        del self.progress.flying[task.name]
        log = self.queue.log(task.name)
        stage = re.search(r"failed to reproduce '([^']+)'", log)
        if stage and stage[1] in task.keys:
            self.progress.broken[task.keys[stage[1]]] = task.name
        self.progress.failed.append(task.name)
        told = [line for line in log.splitlines() if line.strip()][-LOG_LINES:]
        tqdm.write("\n".join([f"study: {task.name} failed:", *(f"    {line}" for line in told)]))


def code_of(pipeline: Pipeline) -> str:
    """Digest, as rows have it."""
    return sha256_json(pipeline.code())[:12]


def differences(recorded: Iterable[Row], fresh: Iterable[Row]) -> list[str]:
    """Where a loss of a fresh row is not the recorded one of its run."""
    before, moved = {row["run"]: row for row in recorded}, []
    for row in fresh:
        old, new = (pd.Series(cells).reindex(EXACT).astype(float) for cells in (before[row["run"]], row))
        moved += [f"{row['run']}: {column} {a} -> {b}" for column, a, b in old.compare(new).itertuples()]
    return moved


def row_of(run: Run, task: Task, metrics: Mapping[str, Any], code: str) -> Row:
    """The row of a finished run, of `DvcQueue.metrics`. KeyError if these lack an entry."""
    return {
        "run": run.slug,
        "group": run.group,
        "label": run.label,
        "windows": task.config.at.continuation.windows,
        "overrides": " ".join(run.overrides),
        "settings": task.settings,
        "code": code,
        **{name: getattr(task.config, name) for name in ("scale", "init", "objective", "alpha", "seed")},
        **{column: _number(metrics, place) for column, place in MEASURED.items()},
        **{column: _number(metrics, place) for column, place in OPTIONAL.items() if _has(metrics, place)},
    }


def _number(metrics: Mapping[str, Any], place: Sequence[str]) -> float:
    return round(functools.reduce(operator.getitem, place, metrics), 6)


def _has(metrics: Mapping[str, Any], place: Sequence[str]) -> bool:
    *path, last = place
    return last in functools.reduce(lambda block, key: block.get(key, {}), path, metrics)
