"""A first request to stop is a flag; a second one ends a process that waits in C, where no handler of Python's runs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from microlm.runtime.launcher import SAME_REQUEST_S, stop_requests
from tests.support.bare_ranks import start_real
from tests.support.clones import ROOT

STOPS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
# a store waits for a key that nobody sets
WAIT_IN_C = """
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
from microlm.runtime.launcher import stop_requests
store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
with stop_requests() as stopping:
    Path("waiting-0").touch()
    store.wait(["never"], timedelta(hours=1))
"""


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    time.sleep(0.3)  # from the file to the wait in C


@STOPS
def test_a_process_that_waits_in_c_ends_at_the_second_request(tmp_path: Path, number: signal.Signals) -> None:
    process = start_real(tmp_path, "-c", WAIT_IN_C)
    wait_for(tmp_path / "waiting-0", process)
    for _ in range(2):  # the launcher passes on what a scheduler sends to all: both are one request
        process.send_signal(number)
        time.sleep(0.1)
    time.sleep(SAME_REQUEST_S)
    assert process.poll() is None
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert said.splitlines()[-1].startswith(f"error: ended at once by a second {number.name}; run the same command")
    assert "Traceback" not in said


@STOPS
def test_a_launcher_told_twice_to_stop_leaves_no_process_that_waits_for_another(
    tmp_path: Path, number: signal.Signals
) -> None:
    process = start_real(tmp_path, "-m", "tests.support.bare_ranks", "stuck")
    for rank in range(2):
        wait_for(tmp_path / f"waiting-{rank}", process)
    children = [p for p in psutil.Process(process.pid).children(recursive=True) if "stuck" in p.cmdline()]
    process.send_signal(number)
    time.sleep(SAME_REQUEST_S + 0.5)
    assert len(children) == 2 and all(child.is_running() for child in children)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert f"stopped by {number.name}" in line and "Traceback" not in said
    assert not psutil.wait_procs(children, timeout=30)[1]


@STOPS
def test_requests_of_before_are_handled_as_before(number: signal.Signals) -> None:
    came: list[int] = []
    previous = signal.signal(number, lambda which, _: came.append(which))
    try:
        for _ in range(2):  # the watch ends with the body, and a later one counts anew
            with stop_requests() as stopping:
                assert not stopping()
                os.kill(os.getpid(), number)
                assert stopping()
        assert came == []
        os.kill(os.getpid(), number)
        assert came == [number] and signal.set_wakeup_fd(-1) == -1
    finally:
        signal.signal(number, previous)


def test_ctrl_c_is_a_line_also_while_a_stage_still_imports(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "stages.pretrain"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    while "numpy" not in (line := process.stderr.readline()):
        assert line
    process.send_signal(signal.SIGINT)
    said = [line for line in process.communicate()[1].splitlines() if line and not line.startswith("import time:")]
    assert process.returncode == 128 + signal.SIGINT
    assert said == ["error: interrupted; nothing was begun; run the same command again to go on"]


WAITS_AT_ONCE = """
import os
from microlm.errors import end_at_once
end_at_once(lambda: "much is kept")
os.write(1, b"waiting\\n")
os.read(os.pipe()[0], 1)  # again after the signal, as PEP 475 has it: no exception of Python's ends this
"""


def test_work_that_waits_in_c_can_end_at_once_and_says_what_is_kept(tmp_path: Path) -> None:
    process = start_real(tmp_path, "-c", WAITS_AT_ONCE)
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said.strip() == "error: interrupted; much is kept; run the same command again to go on"
