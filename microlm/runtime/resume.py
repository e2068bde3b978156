"""Where an interrupted stage leaves what it has done: `.resume/<stage>-<digest of its inputs>/` under the DVC root.

DVC deletes a stage's outputs before it runs the stage, and a temporary workspace after it; this folder is neither. A
changed parameter, input or line of code that matters gives another digest, and so never resumes the old state.
"""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from microlm.errors import UserError, keeping
from microlm.files import read_yaml, remove_directory, sha256_file, sha256_json

ROOT = Path(__file__).parents[2]  # of the repository, whose stages' code is hashed; a stage may run elsewhere


def resume_root() -> Path:
    # inside `dvc exp run --temp` DVC_ROOT is the parent repository, which outlives the temporary one
    return Path(os.environ.get("DVC_ROOT", ".")) / ".resume"


def stage_code(stage: str) -> str:
    """Hash of the source files that dvc.yaml names for the stage: the same code gives the same results."""
    stages = read_yaml(ROOT / "dvc.yaml", "take it from Git again: git checkout dvc.yaml", "stages:")["stages"]
    return sha256_json([sha256_file(file) for file in code_files(ROOT, stages[stage]["deps"])])


def code_files(root: Path, deps: Iterable[str]) -> list[Path]:
    """Our source files among a stage's dependencies; a folder stands for all that lie in it."""
    named = [root / dep for dep in deps if dep.startswith(("microlm/", "stages/"))]
    return sorted(file for path in named for file in ([path] if path.suffix == ".py" else path.rglob("*.py")))


@contextmanager
def resumable(stage: str, inputs: Any) -> Iterator[Path]:
    """Yield the stage's folder, locked against a second run; it is removed when the body succeeds.

    Processes that share the stage share the folder: the first one holds the lock and removes it when all are done.

    Args:
        inputs: JSON of all that the result depends on.
    """
    # a stage that never imported it, and torch with it, runs in one process
    distributed = sys.modules.get("microlm.runtime.distributed")
    wait_for_all = distributed.wait_for_all if distributed else lambda: None
    directory = resume_root() / f"{stage}-{sha256_json(inputs)[:16]}"
    if distributed and not distributed.is_first():
        wait_for_all()
        yield directory
        wait_for_all()
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{directory}.lock")
    try:
        # the kernel drops this lock when its holder dies, so that it is never stale
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{directory}: another process is running this very stage; wait for it or stop it, then run again"
        ) from None
    try:
        directory.mkdir(exist_ok=True)
        wait_for_all()
        with keeping(lambda: f"what was finished is kept in {directory}" if any(directory.iterdir()) else ""):
            yield directory
        wait_for_all()
        remove_directory(directory)
    finally:
        if not directory.exists():
            # while it is held: whoever opened it meanwhile sees it unlinked and takes the new one
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
