"""Folders that take long to make: made once for all processes of a run of pytest, and gone when it ends."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

_WHERE, FIRST = "MICROLM_TESTS_SHARED", "MICROLM_TESTS_FIRST"  # the folder of all, and the number of that process
if _WHERE not in os.environ:  # conftest.py imports this in pytest's first process, from which the others inherit it
    os.environ[_WHERE], os.environ[FIRST] = tempfile.mkdtemp(prefix="microlm-shared-"), str(os.getpid())
    atexit.register(shutil.rmtree, os.environ[_WHERE], ignore_errors=True)


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """The folder `name`, which the first process to ask fills with `make`. Whoever changes it takes a copy."""
    target = Path(os.environ[_WHERE], name)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            growing = target.with_suffix(".growing")
            shutil.rmtree(growing, ignore_errors=True)  # of a process that failed here
            growing.mkdir()
            make(growing)
            growing.rename(target)
    return target
