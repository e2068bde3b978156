"""The study's own clone: DVC's queue stashes and resets the working tree with every run it takes, so never the user's.

The clone stands at the commit that was HEAD when the study began, whatever is edited meanwhile, and shares the
repository's DVC cache, so that what one has trained the other need not.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ruamel.yaml import YAML

from microlm.errors import UserError
from microlm.research.study.pipeline import Pipeline

FOLDER = Path(".resume/study")


def environment() -> dict[str, str]:
    """With this interpreter's programs first on PATH, so that `dvc` and the stages' `python` are its own."""
    kept = {name: value for name, value in os.environ.items() if name not in ("DVC_ROOT", "PYTHONPATH")}
    return kept | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}


def run(directory: Path, *command: str, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command in a folder; RuntimeError with what it printed if it fails and `check` is set.

    Args:
        variables: more of the environment.
    """
    # into files: queue workers inherit their starter's output, and a pipe is only at its end when all of them are gone
    with tempfile.TemporaryFile("w+", errors="replace") as out, tempfile.TemporaryFile("w+", errors="replace") as err:
        status = subprocess.run(
            command, cwd=directory, env=environment() | variables, stdin=subprocess.DEVNULL, stdout=out, stderr=err
        ).returncode
        out.seek(0)
        err.seek(0)
        ended = subprocess.CompletedProcess(command, status, out.read(), err.read())
    if check and ended.returncode:
        raise RuntimeError(
            f"{' '.join(command)} ended with {ended.returncode}: {(ended.stderr or ended.stdout).strip()}"
        )
    return ended


def git(directory: Path, *arguments: str) -> str:
    return run(directory, "git", *arguments).stdout.strip()


def dvc(directory: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return run(directory, sys.executable, "-m", "dvc", *arguments, check=check)


def prepare(root: Path, scale: str) -> Path:
    """The clone at HEAD of the repository `root`, empty of data. No run may be under way in it.

    Raises:
        UserError: `root` is no Git repository, or code that decides a number is not committed.
    """
    clone = (root / FOLDER / "repository").absolute()
    try:
        head = git(root, "rev-parse", "HEAD")
    except RuntimeError:
        raise UserError(f"{root}: is no Git repository with a commit; the study runs committed code only") from None
    if not (clone / ".git").is_dir():
        clone.parent.mkdir(parents=True, exist_ok=True)
        git(root, "clone", "--quiet", "--no-checkout", str(root.absolute()), str(clone))
        for key, value in (("user.name", "study"), ("user.email", "study@localhost")):
            git(clone, "config", key, value)
    git(clone, "fetch", "--quiet", str(root.absolute()), "HEAD")
    git(clone, "checkout", "--quiet", "--force", "-B", "study", head)
    git(clone, "clean", "--quiet", "--force", "-d")
    _drop_lock(clone, head)
    cache = dvc(root, "cache", "dir").stdout.strip()
    dvc(clone, "cache", "dir", "--local", str((root / cache).resolve()))
    (clone / ".resume").mkdir(exist_ok=True)
    wheels, shared = clone / ".resume" / "wheels", (root / ".resume" / "wheels").absolute()
    shared.mkdir(parents=True, exist_ok=True)
    if not wheels.is_symlink():
        wheels.symlink_to(shared)
    _refuse_uncommitted(root, clone, scale)
    return clone


def _drop_lock(clone: Path, head: str) -> None:
    """Commit the removal of dvc.lock, always as the same commit on top of `head`.

    It describes another scale: where DVC takes a stage from its run cache, it looks up the lock's old data/parts, which
    a fresh clone has not. Without a lock DVC still finds what the run cache holds.
    """
    if not (clone / "dvc.lock").exists():
        return
    git(clone, "rm", "--quiet", "dvc.lock")
    date = git(clone, "show", "--no-patch", "--format=%cI", head)
    dates = {"GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date}
    run(clone, "git", "commit", "--quiet", "--no-verify", "--message", "study: without dvc.lock", **dates)


def _refuse_uncommitted(root: Path, clone: Path, scale: str) -> None:
    here, there = (Pipeline(place, scale).code() for place in (root, clone))
    changed = sorted(file for file in here.keys() | there.keys() if here.get(file) != there.get(file))
    if _params(root) != _params(clone):
        changed.append("params.yaml")
    if changed:
        raise UserError(
            f"{', '.join(changed)}: changed since the last commit, and the study runs committed code only; "
            "commit the change, or put it aside with: git stash"
        )


def _params(root: Path) -> Mapping[str, object]:
    return YAML(typ="safe", pure=True).load((root / "params.yaml").read_text(encoding="utf-8"))
