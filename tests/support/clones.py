"""A clone of the working tree, as a person gets it from `git clone` once the tree is committed, and commands in it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures"


class Clone:
    """A Git repository with the files of this one that Git does not ignore, committed; no data and no models.

    Args:
        python: what DVC and its stages run under, this interpreter if nothing else is named.
    """

    def __init__(self, directory: Path, python: Path = Path(sys.executable)) -> None:
        self.directory, self.python = directory, python
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():  # one deleted from the working tree is still listed
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, directory / name)
        self.git("init", "--quiet")
        self.git("config", "user.name", "test")
        self.git("config", "user.email", "test@example.org")
        self.commit("the working tree")

    def copied(self, target: Path) -> "Clone":
        """A copy with all that was made in it."""
        shutil.copytree(self.directory, target, symlinks=True)
        copy = object.__new__(Clone)
        copy.directory, copy.python = target, self.python
        copy.git("status")  # refreshes Git's index, which knows files by their times
        return copy

    def run(self, *command: str | Path, status: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Run a command in the clone; `status` None accepts any. What it printed is in the failure."""
        inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "DVC_ROOT")}
        path = os.pathsep.join(map(str, (self.python.parent, Path(sys.executable).parent, os.environ["PATH"])))
        ended = subprocess.run(
            command, cwd=self.directory, env={**inherited, "PATH": path}, capture_output=True, text=True
        )
        if status is not None and ended.returncode != status:
            told = f"{' '.join(map(str, command))} ended with {ended.returncode}\n{ended.stdout}\n{ended.stderr}"
            pytest.fail(told, pytrace=False)
        return ended

    def dvc(self, *arguments: str, status: int | None = 0) -> str:
        """Run DVC; returns what it printed, stdout before stderr."""
        ended = self.run(self.python, "-m", "dvc", *arguments, status=status)
        return ended.stdout + ended.stderr

    def dvc_json(self, *arguments: str) -> Any:
        """Run DVC and read the JSON on its stdout."""
        return json.loads(self.run(self.python, "-m", "dvc", *arguments).stdout)

    def git(self, *arguments: str) -> str:
        return self.run("git", *arguments).stdout

    def commit(self, message: str) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", message)
