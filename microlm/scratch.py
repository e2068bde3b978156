"""Where an interrupted stage leaves what it has done: `.resume/<stage>-<digest of its inputs>/` under the DVC root.

DVC deletes a stage's outputs before it runs the stage, and a temporary workspace after it; this folder is neither. A
changed parameter, input or line of code that matters gives another digest, and so never resumes the old state.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from filelock import FileLock, Timeout

from microlm.errors import UserError
from microlm.files import sha256_file, sha256_json


def scratch_root() -> Path:
    # inside `dvc exp run --temp` DVC_ROOT is the parent repository, which outlives the temporary one
    return Path(os.environ.get("DVC_ROOT", ".")) / ".resume"


def code_digest(*modules: ModuleType) -> str:
    """Hash of the modules' source files: the same code gives the same results."""
    return sha256_json([sha256_file(module.__file__) for module in modules if module.__file__])


@contextmanager
def scratch(stage: str, inputs: Any) -> Iterator[Path]:
    """Yield the stage's folder, locked against a second process; it is removed when the body succeeds.

    Args:
        inputs: JSON of all that the result depends on.
    """
    directory = scratch_root() / f"{stage}-{sha256_json(inputs)[:16]}"
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{directory}.lock")
    try:
        # the kernel drops this lock when its holder dies, so that it is never stale
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{directory}: another process is running this very stage; wait for it or stop it, then run again"
        ) from None
    try:
        yield directory
        shutil.rmtree(directory)
    finally:
        lock.release()
        if not directory.exists():
            Path(lock.lock_file).unlink(missing_ok=True)
