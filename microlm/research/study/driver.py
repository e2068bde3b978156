"""Run a grid to its end: queue what is not done, in an order that makes shared work once, and collect what ended."""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from microlm.config import Config
from microlm.errors import UserError
from microlm.files import sha256_json
from microlm.research.study.grid import Grid, Run, resolve
from microlm.research.study.pipeline import Pipeline
from microlm.research.study.queue import DvcQueue
from microlm.research.study.results import Row, add_rows, is_done, read_metrics, read_results, results_path, row_of
from microlm.research.study.workspace import FOLDER, prepare
from microlm.runtime.terminal import duration

POLL_S = 1.0
LOG_LINES = 12
Say = Callable[[str], None]


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
    done: int = 0
    began: float = field(default_factory=time.monotonic)
    first_end: float | None = None
    flying: dict[str, Task] = field(default_factory=dict)
    made: set[str] = field(default_factory=set)
    broken: dict[str, str] = field(default_factory=dict)  # digest of work -> run in which it failed
    failed: list[str] = field(default_factory=list)


def tasks_of(grid: Grid, params: Mapping[str, Any], pipeline: Pipeline) -> list[Task]:
    """One task for each different run of the grid, in its order. UserError with a line for each that is no
    configuration."""
    tasks, wrong = [], []
    for digest, runs in grid.unique().items():
        try:
            whole, config = resolve(runs[0], params, grid.scale)
        except UserError as error:
            wrong.append(str(error))
            continue
        name = f"{runs[0].slug}-{digest}"
        tasks.append(Task(name, runs, config, sha256_json(whole)[:12], pipeline.keys(whole)))
    if wrong:
        raise UserError("\n".join(wrong))
    return tasks


def next_task(progress: Progress) -> Task | None:
    """The first waiting task that no task in flight works for: two that train the same would both pay for it."""
    busy = {key for task in progress.flying.values() for key in task.keys.values()} - progress.made
    return next((task for task in progress.waiting if busy.isdisjoint(task.keys.values())), None)


class Study:
    """One call of `make study`."""

    def __init__(self, root: Path, grid: Grid, params: Mapping[str, Any], say: Say = print) -> None:
        self.root, self.scale, self.say = root, grid.scale, say
        pipeline = Pipeline(root, grid.scale)
        self.code = sha256_json(pipeline.code())[:12]
        self.tasks = tasks_of(grid, params, pipeline)
        self.csv = results_path(grid, root)
        self.runs, self.jobs = len(grid.runs), 1

    def remaining(self) -> list[Task]:
        """Tasks of which at least one row is missing or of other code or settings."""
        rows = {row["run"]: row for row in read_results(self.csv)}

        def done(task: Task) -> bool:
            return all(run.slug in rows and is_done(rows[run.slug], task.settings, self.code) for run in task.runs)

        return [task for task in self.tasks if not done(task)]

    def run(self, jobs: int) -> list[str]:
        """Run what is to do; returns the names of the runs that failed, whose logs have been shown."""
        self.jobs = jobs
        waiting = self.remaining()
        # `made` begins empty: that a row is there does not say that its stages' outputs are in this machine's cache
        progress = Progress(waiting, len(self.tasks) - len(waiting))
        self.say(f"study: {len(self.tasks)} runs for {self.runs} points of the grid, {len(waiting)} of them to do")
        if not waiting:
            return []
        folder = self.root / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"{folder}: another study is running here; wait for it or stop it") from None
        try:
            self._run_locked(progress)
        finally:
            lock.release()
        return progress.failed

    def _run_locked(self, progress: Progress) -> None:
        queue = DvcQueue((self.root / FOLDER / "repository").absolute(), self.jobs)
        if (queue.directory / ".git").is_dir():
            queue.clear()  # what a killed study left running
        prepare(self.root, self.scale)
        try:
            self._collect_earlier(queue, progress)
            at_start = progress.done
            while progress.waiting or progress.flying:
                self._fill(queue, progress)
                self._collect(queue, progress, at_start)
                time.sleep(POLL_S)
        except KeyboardInterrupt:
            self.say("study: stopping; what was under way goes on from its last step when you run this again")
            raise
        finally:
            queue.clear()

    def _collect_earlier(self, queue: DvcQueue, progress: Progress) -> None:
        """Runs that ended on this very commit after the driver of an earlier study was gone."""
        there = queue.finished()
        for task in [task for task in progress.waiting if task.name in there]:
            progress.waiting.remove(task)
            self._record(queue, task, there[task.name], progress)

    def _fill(self, queue: DvcQueue, progress: Progress) -> None:
        # one more than can run, so that a worker never waits for the next to be queued
        while len(progress.flying) <= queue.jobs and (task := next_task(progress)):
            progress.waiting.remove(task)
            if culprit := next((progress.broken[key] for key in task.keys.values() if key in progress.broken), None):
                progress.failed.append(task.name)
                self.say(f"study: {task.name} needs what failed in {culprit}; left out")
                continue
            queue.add(task.name, task.runs[0].overrides)
            progress.flying[task.name] = task
        if progress.flying and not queue.keep_working(len(progress.flying)):
            self._settle(queue, progress)

    def _settle(self, queue: DvcQueue, progress: Progress) -> None:
        """No worker, nothing queued: what is neither finished nor failed by now was lost, e.g. while it was set up."""
        ended = queue.finished().keys() | queue.failed()
        for task in [task for name, task in progress.flying.items() if name not in ended]:
            self._fail(queue, task, progress)

    def _collect(self, queue: DvcQueue, progress: Progress, at_start: int) -> None:
        there, failed = queue.finished(), queue.failed()
        for name, task in list(progress.flying.items()):
            if name in there:
                del progress.flying[name]
                self._record(queue, task, there[name], progress)
                self._tell(task, progress, at_start)
            elif name in failed:
                self._fail(queue, task, progress)

    def _record(self, queue: DvcQueue, task: Task, commit: str, progress: Progress) -> None:
        metrics = read_metrics(queue.directory, commit)
        try:
            fresh = [row_of(run, task.config, metrics, task.settings, self.code) for run in task.runs]
        except KeyError as error:
            raise UserError(f"metrics of {task.name} lack {error}; bring the code and the study together") from None
        self._keep(fresh)
        self.last = fresh[0]
        progress.made |= set(task.keys.values())
        progress.done += 1

    def _keep(self, fresh: Sequence[Row]) -> None:
        add_rows(self.csv, fresh)

    def _fail(self, queue: DvcQueue, task: Task, progress: Progress) -> None:
        del progress.flying[task.name]
        log = queue.log(task.name)
        stage = re.search(r"failed to reproduce '([^']+)'", log)
        if stage and stage[1] in task.keys:
            progress.broken[task.keys[stage[1]]] = task.name
        progress.failed.append(task.name)
        told = [line for line in log.splitlines() if line.strip()][-LOG_LINES:]
        self.say("\n".join([f"study: {task.name} failed:", *(f"    {line}" for line in told)]))

    def _tell(self, task: Task, progress: Progress, at_start: int) -> None:
        now, fresh = time.monotonic(), progress.done - at_start
        left = len(progress.waiting) + len(progress.flying)
        # the first run makes what all share, and runs side by side end together: neither foretells anything
        progress.first_end = progress.first_end or now
        to_go = f"{left} runs to go"
        if fresh > 2 * self.jobs:
            to_go = f"about {duration((now - progress.first_end) / (fresh - 1) * left)} to go"
        difference = self.last["student_minus_continued_val_bpb"]
        self.say(
            f"study: {progress.done}/{len(self.tasks)} {task.runs[0].slug}: student - continued {difference:+.4f} bits "
            f"per byte; {duration(now - progress.began)} so far, {to_go}"
        )
