"""What the study asks of Git and DVC: which code decides its numbers, which runs share work, a clone and a queue in it.

DVC's queue stashes and resets the working tree with every run it takes, so never the user's. The clone stands at the
commit that was HEAD when the study began, whatever is edited meanwhile, and shares the repository's DVC cache, so that
what one has trained the other need not.

What ended is read from Git, where DVC puts it, so that looking costs milliseconds: a reference for each success, a
stash entry for each failure.
"""

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import networkx as nx
import psutil
from dvc.parsing import DataResolver
from dvc.repo import Repo

from microlm.errors import UserError
from microlm.evaluation import SCORED_MODELS
from microlm.files import sha256_file, sha256_json
from microlm.research.study.grid import read_yaml
from microlm.runtime.resume import code_files

FOLDER = Path(".resume/study")
CLONE = FOLDER / "repository"
FAILED = "refs/exps/celery/failed"
GRACE_S = 30.0  # a training that is asked to end finishes its step and saves first
TARGET = "compare"
MADE = ("outs", "metrics", "plots")
NAMED = ("deps", "params", *MADE)
# `check` differs between all runs but computes nothing; what `compare` draws from the scores is not a training's doing
_NOT_WORK = {"check", TARGET}


class Pipeline:
    """The stages that `compare` stands on, each after those that it needs."""

    def __init__(self, root: Path, scale: str) -> None:
        self.root = root
        with Repo(str(root), config={"core": {"no_scm": True}}) as repo:  # dvc.yaml as it lies there, in Git or not
            resolver = DataResolver(repo, "", read_yaml(root / "dvc.yaml"))
            resolver.context["scale"] = scale  # not the one that params.yaml chooses
            every = {name: _definition(body) for name, body in resolver.resolve()["stages"].items()}
        makers = {out: name for name, stage in every.items() for kind in MADE for out in stage[kind]}
        self._graph = nx.DiGraph()  # from who makes a dependency, or a folder around it, to who needs it
        for name, stage in every.items():
            around = {place for dep in stage["deps"] for place in (dep, *map(str, Path(dep).parents))}
            self._graph.add_edges_from((makers[place], name) for place in sorted(around & makers.keys()))
        needed = nx.ancestors(self._graph, TARGET) - _NOT_WORK
        self.stages = {name: every[name] for name in nx.topological_sort(self._graph) if name in needed}

    def code(self) -> dict[str, str]:
        """Digest by file of all that decides the numbers besides parameters: source files, and stages of dvc.yaml."""
        files = {file for stage in self.stages.values() for file in code_files(self.root, stage["deps"])}
        digests = {str(file.relative_to(self.root)): sha256_file(file) for file in sorted(files) if file.is_file()}
        return digests | {"dvc.yaml": sha256_json(self.stages)}

    def keys(self, params: Mapping[str, Any]) -> dict[str, str]:
        """For each stage a digest of all parameters that it or a stage before it reads: equal keys, equal work."""
        keys: dict[str, str] = {}
        for name, stage in self.stages.items():
            read = {key: _value(params, key) for key in stage["params"]}
            above = {parent: keys[parent] for parent in self._graph.predecessors(name) if parent in keys}
            keys[name] = f"{name}:{sha256_json([read, above])[:16]}"
        return keys


def _definition(body: Mapping[str, Any]) -> dict[str, Any]:
    """What a stage runs, reads and makes, without what DVC does with it (`data/parts: {push: false}`)."""
    entries = {key: [[entry] if isinstance(entry, str) else entry for entry in body.get(key, [])] for key in NAMED}
    return {key: sorted(itertools.chain(*names)) for key, names in entries.items()} | {"cmd": body["cmd"]}


def _value(params: Mapping[str, Any], key: str) -> Any:
    node: Any = params
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def run(directory: Path, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """A command in a folder; RuntimeError with what it printed if it fails and `check` is set."""
    kept = {name: value for name, value in os.environ.items() if name not in ("DVC_ROOT", "PYTHONPATH")}
    # this interpreter's programs first, so that `dvc` and the stages' `python` are its own
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    # into files: queue workers inherit their starter's output, and a pipe is only at its end when all of them are gone
    with tempfile.TemporaryFile("w+", errors="replace") as out, tempfile.TemporaryFile("w+", errors="replace") as err:
        streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err}
        ended = subprocess.run(command, cwd=directory, env=kept | {"PATH": path}, **streams)
        for file in (out, err):
            file.seek(0)
        ended.stdout, ended.stderr = out.read(), err.read()
    if check and ended.returncode:
        told = (ended.stderr or ended.stdout).strip()
        raise RuntimeError(f"{' '.join(command)} ended with {ended.returncode}: {told}")
    return ended


def git(directory: Path, *arguments: str) -> str:
    return run(directory, "git", *arguments).stdout.strip()


def dvc(directory: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return run(directory, sys.executable, "-m", "dvc", *arguments, check=check)


def commit_of(root: Path, file: Path) -> str:
    """The commit that last changed `file`. UserError where there is none."""
    if not (found := git(root, "log", "-1", "--format=%H", "--", str(file.absolute()))):
        raise UserError(f"{file}: is in no commit, so the code that made it is not known; run: make study")
    return found


def prepare(root: Path, scale: str, commit: str = "HEAD") -> Path:
    """The clone at a commit of the repository `root`, empty of data. No run may be under way in it.

    Raises:
        UserError: `root` is no Git repository or has a name that DVC's queue cannot take, or it is to be HEAD and code
            that decides a number is not committed.
    """
    clone = (root / CLONE).absolute()
    if not str(clone).isascii():
        raise UserError(
            f"{root.absolute()}: DVC's queue fails below a folder whose name is not ASCII; move the repository"
        )
    try:
        head = git(root, "rev-parse", commit)
    except RuntimeError:
        raise UserError(f"{root}: is no Git repository with a commit; the study runs committed code only") from None
    if not (clone / ".git").is_dir():
        user = ("--config", "user.name=study", "--config", "user.email=study@localhost")
        git(root, "clone", "--quiet", "--no-checkout", *user, str(root.absolute()), str(clone))
    git(clone, "fetch", "--quiet", str(root.absolute()), commit)
    git(clone, "checkout", "--quiet", "--force", "-B", "study", head)
    git(clone, "clean", "--quiet", "--force", "-d")
    if (clone / "dvc.lock").exists():
        # It describes another scale: where DVC takes a stage from its run cache, it looks up the lock's old data/parts,
        # which a fresh clone has not. Without a lock DVC still finds what the run cache holds. Always the same commit
        # on top of `head`, or what an earlier study ran would not be found again.
        git(clone, "rm", "--quiet", "dvc.lock")
        date = git(clone, "show", "--no-patch", "--format=%cI", head)
        dated = ("env", f"GIT_AUTHOR_DATE={date}", f"GIT_COMMITTER_DATE={date}")
        run(clone, *dated, "git", "commit", "--quiet", "--no-verify", "--message", "study: without dvc.lock")
    cache = dvc(root, "cache", "dir").stdout.strip()
    dvc(clone, "cache", "dir", "--local", str((root / cache).resolve()))
    wheels, shared = clone / ".resume" / "wheels", (root / ".resume" / "wheels").absolute()
    for folder in (wheels.parent, shared):
        folder.mkdir(parents=True, exist_ok=True)
    if not wheels.is_symlink():
        wheels.symlink_to(shared)
    if commit == "HEAD":
        _refuse_uncommitted(root, clone, scale)
    return clone


def _refuse_uncommitted(root: Path, clone: Path, scale: str) -> None:
    here, there = (
        Pipeline(place, scale).code() | {"params.yaml": read_yaml(place / "params.yaml")} for place in (root, clone)
    )
    changed = sorted(file for file in here.keys() | there.keys() if here.get(file) != there.get(file))
    if changed:
        raise UserError(
            f"{', '.join(changed)}: changed since the last commit, and the study runs committed code only; "
            "commit the change, or put it aside with: git stash"
        )


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
            if attempt == 3 or "lock" not in ended.stderr.lower():  # which a worker that collects results holds briefly
                reason = " ".join(ended.stderr.split())
                raise UserError(f"{self.directory}: DVC did not queue {name}: {reason}; mend that, then run this again")
            time.sleep(2)

    def keep_working(self, waiting: int) -> bool:
        """See to it that workers run for `waiting` runs; False if there are none and DVC has nothing queued for any."""
        wanted = min(self.jobs, waiting)
        if len(self._workers()) >= wanted:
            return True
        started = dvc(self.directory, "queue", "start", "--jobs", str(wanted)).stdout
        return "No experiment tasks in the queue" not in started or bool(self._workers())

    def finished(self) -> dict[str, str]:
        """Commit of each experiment on the clone's HEAD that succeeded, by name."""
        head = git(self.directory, "rev-parse", "HEAD")
        named = "--format=%(refname:lstrip=4) %(objectname)"
        listed = git(self.directory, "for-each-ref", named, f"refs/exps/{head[:2]}/{head[2:]}")
        return dict(line.split() for line in listed.splitlines())

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

    def metrics(self, commit: str) -> dict[str, dict[str, Any]]:
        """What an experiment's commit holds under metrics/, by file stem; evaluations as `evaluation/<model>`."""
        names = ["summary", *SCORED_MODELS, *(f"evaluation/{model}" for model in SCORED_MODELS)]
        return {name: json.loads(git(self.directory, "show", f"{commit}:metrics/{name}.json")) for name in names}

    def clear(self) -> None:
        """End every process of the queue, forget what was queued or failed; a training keeps what it saved."""
        left = self._processes()
        for end in (psutil.Process.terminate, psutil.Process.kill):
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    end(process)
            _, left = psutil.wait_procs(left, timeout=GRACE_S)
        shutil.rmtree(self.temporary, ignore_errors=True)
        references = git(self.directory, "for-each-ref", "--format=%(refname)", "refs/exps/celery", "refs/exps/exec")
        for reference in references.splitlines():
            git(self.directory, "update-ref", "-d", reference)

    def _workers(self) -> list[psutil.Process]:
        return [process for process in self._processes() if "queue-worker" in process.info["cmdline"]]

    def _processes(self) -> list[psutil.Process]:
        """Workers in the clone, and all that run in its temporary copies."""
        alive = (process for process in psutil.process_iter(["cwd", "cmdline"]) if all(process.info.values()))
        return [  # a zombie has neither
            process
            for process in alive
            if Path(place := process.info["cwd"]).is_relative_to(self.temporary)
            or (Path(place) == self.directory and "queue-worker" in process.info["cmdline"])
        ]
