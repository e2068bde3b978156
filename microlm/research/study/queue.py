"""The DVC queue of the study's clone: add runs, keep workers alive, see what ended, stop everything.

What ended is read from Git, where DVC puts it, so that looking costs milliseconds: a reference for each success, a
stash entry for each failure.
"""

import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from microlm.errors import UserError
from microlm.research.study.pipeline import TARGET
from microlm.research.study.workspace import dvc, git, run

FAILED = "refs/exps/celery/failed"
GRACE_S = 30.0  # a training that is asked to end finishes its step and saves first


class DvcQueue:
    """The queue in the repository `directory`, of which this process is the only user."""

    def __init__(self, directory: Path, jobs: int) -> None:
        self.directory, self.jobs = directory, jobs
        self.temporary = directory / ".dvc" / "tmp"

    def add(self, name: str, overrides: Sequence[str]) -> None:
        """Queue an experiment. UserError with DVC's words if it refuses."""
        options = [part for override in overrides for part in ("-S", override)]
        for attempt in (1, 2, 3):
            ended = dvc(self.directory, "exp", "run", "--queue", "--name", name, *options, TARGET, check=False)
            if ended.returncode == 0:
                return
            if (
                attempt == 3 or "lock" not in ended.stderr.lower()
            ):  # a worker that collects its results holds it briefly
                reason = " ".join(ended.stderr.split())
                raise UserError(f"{self.directory}: DVC did not queue {name}: {reason}; mend that, then run this again")
            time.sleep(2)

    def keep_working(self, waiting: int) -> bool:
        """See to it that workers run for `waiting` runs; False if there are none and DVC has nothing queued for any."""
        wanted = min(self.jobs, waiting)
        if len(list(self._workers())) >= wanted:
            return True
        started = dvc(self.directory, "queue", "start", "--jobs", str(wanted)).stdout
        return "No experiment tasks in the queue" not in started or any(True for _ in self._workers())

    def finished(self) -> dict[str, str]:
        """Commit of each experiment on the clone's HEAD that succeeded, by name."""
        head = git(self.directory, "rev-parse", "HEAD")
        listed = git(
            self.directory, "for-each-ref", "--format=%(refname) %(objectname)", f"refs/exps/{head[:2]}/{head[2:]}"
        )
        pairs = (line.split() for line in listed.splitlines())
        return {reference.rsplit("/", 1)[1]: commit for reference, commit in pairs}

    def failed(self) -> set[str]:
        """Names of the experiments whose stages failed since the last `clear`."""
        listed = run(self.directory, "git", "log", "--walk-reflogs", "--format=%gs", FAILED, "--", check=False)
        return {line.rsplit(":", 1)[1] for line in listed.stdout.splitlines() if ":" in line}

    def log(self, name: str) -> str:
        """All that an experiment printed; the workers' own log where it did not come to that."""
        told = dvc(self.directory, "queue", "logs", name, check=False)
        if told.returncode == 0:
            return told.stdout
        logs = sorted((self.temporary / "exps" / "celery").glob("*.out"))
        return "\n".join(path.read_text(errors="replace") for path in logs)

    def clear(self) -> None:
        """End every process of the queue, forget what was queued or failed; a training keeps what it saved."""
        self._end(list(self._processes()))
        shutil.rmtree(self.temporary, ignore_errors=True)
        references = git(self.directory, "for-each-ref", "--format=%(refname)", "refs/exps/celery", "refs/exps/exec")
        for reference in references.splitlines():
            git(self.directory, "update-ref", "-d", reference)

    def _workers(self) -> Iterator[psutil.Process]:
        return (process for process in self._processes() if "queue-worker" in process.info["cmdline"])

    def _processes(self) -> Iterator[psutil.Process]:
        """Workers in the clone, and all that run in its temporary copies."""
        for process in psutil.process_iter(["cwd", "cmdline", "status"]):
            info = process.info
            if not info["cwd"] or not info["cmdline"] or info["status"] == psutil.STATUS_ZOMBIE:
                continue
            place = Path(info["cwd"])
            is_worker = place == self.directory and "queue-worker" in info["cmdline"]
            if is_worker or place.is_relative_to(self.temporary):
                yield process

    @staticmethod
    def _end(processes: Sequence[psutil.Process]) -> None:
        for process in processes:
            try:
                process.terminate()
            except psutil.NoSuchProcess:
                continue
        _, left = psutil.wait_procs(processes, timeout=GRACE_S)
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(left, timeout=GRACE_S)


def metrics_of(directory: Path, commit: str, path: str) -> bytes:
    """A file of an experiment's commit. RuntimeError if it has none such."""
    ended = subprocess.run(["git", "show", f"{commit}:{path}"], cwd=directory, capture_output=True)
    if ended.returncode:
        raise RuntimeError(f"git show {commit}:{path}: {ended.stderr.decode(errors='replace').strip()}")
    return ended.stdout
