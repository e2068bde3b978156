"""What tests run in real interpreters that need no model: python -m tests.support.bare_ranks refuse | stuck."""

import os
import subprocess
import sys
import time
from pathlib import Path

from microlm.errors import UserError
from microlm.runtime import distributed
from microlm.runtime.launcher import PROCESSES, run_shared_stage, stop_requests

ROOT = Path(__file__).resolve().parents[2]


def environment_of(count: int) -> dict[str, str]:
    """Of a launcher of so many processes."""
    inherited = {name: value for name, value in os.environ.items() if name != "DVC_ROOT"}
    return {**inherited, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", PROCESSES: str(count)}


def start_real(directory: Path, *arguments: str, count: int = 2) -> subprocess.Popen[str]:
    """`python arguments`, in `count` processes if it goes through the launcher."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *arguments], cwd=directory, env=environment_of(count), **pipes)


def refuse() -> None:
    """The last process finds what the others cannot see; they wait for it."""
    if distributed.rank() == distributed.size() - 1:
        raise UserError("window 7: cannot be read; make it again")
    distributed.wait_for_all()


def stuck() -> None:
    """The first process waits for the last one in C, where no handler of Python's runs; the last one never comes."""
    with stop_requests():
        Path(f"waiting-{distributed.rank()}").touch()
        if distributed.is_first():
            distributed.wait_for_all()
        while True:
            time.sleep(1)


if __name__ == "__main__":
    run_shared_stage({"refuse": refuse, "stuck": stuck}[sys.argv[1]])
