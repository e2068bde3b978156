"""Start a stage in as many processes as it has GPUs, through torchrun's own agent, and stop a training when asked.

`python -m stages.pretrain` runs itself again, once for each process. MICROLM_PROCESSES says how many; `auto`, the
default, is one for each CUDA device and one on the CPU, where threads share the work better. It is an environment
variable and no key of params.yaml: the number of processes changes no result, and a key there would make stages stale.
Where torchrun started this process (several nodes), it is one of its processes and starts nothing.
"""

import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path

import torch

from microlm.errors import UserError, begin, explained, run_stage
from microlm.files import write_json
from microlm.runtime import distributed

PROCESSES, REPORTS = "MICROLM_PROCESSES", "MICROLM_REPORTS"
STOPS = (signal.SIGINT, signal.SIGTERM)
SHUTDOWN_S = 120  # from a request to stop to SIGKILL: a step, and the checkpoint after it
# what comes as soon is the same request: a scheduler that stops a job signals every process of it, and the launcher,
# which is one of them, passes the signal on
SAME_REQUEST_S = 2.0


def run_shared_stage(main: Callable[[], None], most: Callable[[], int] | None = None) -> None:
    """`run_stage` of a stage that several processes can share.

    Args:
        most: processes that `auto` may start, where the stage's work has no more parts.
    """
    if not distributed.started_by_torchrun():
        run_stage(lambda: _start(main, most))
    elif REPORTS in os.environ:
        _run_reporting(main, Path(os.environ[REPORTS]))
    else:
        run_stage(distributed.joined()(main))


def processes(most: Callable[[], int] | None = None) -> int:
    """How many processes the stage gets. UserError where MICROLM_PROCESSES is no number or there are too few GPUs."""
    said, devices = os.environ.get(PROCESSES, "auto"), torch.cuda.device_count()
    if said == "auto":
        return min(devices, most() if most and devices > 1 else devices) or 1
    if not said.isascii() or not said.isdigit() or int(said) < 1:
        raise UserError(f"{PROCESSES}: {said!r} is neither auto nor a whole number from 1 on")
    if 0 < devices < int(said):
        raise UserError(f"{PROCESSES}: {said} is more than the {devices} CUDA devices here; lower it")
    return int(said)


def _start(main: Callable[[], None], most: Callable[[], int] | None) -> None:
    count = processes(most)
    if count == 1:
        main()
    else:
        module = sys.modules["__main__"].__spec__  # None where a file was run, not a module
        named = ["-m", module.name] if module else [sys.argv[0]]
        _launch(count, [sys.executable, *named, *sys.argv[1:]])


def _launch(count: int, command: list[str]) -> None:
    """Run `command` in `count` processes; the first mistake or defect of any of them is told once, and ends all."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it reports each process's end at length
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        run_id=f"microlm-{os.getpid()}",
        nproc_per_node=count,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,  # to run the same command again is to go on
        shutdown_timeout=SHUTDOWN_S,
    )
    with tempfile.TemporaryDirectory(prefix="microlm-") as reports:
        os.environ[REPORTS], status = reports, 1
        try:
            elastic_launch(config, command[0])(*command[1:])
            return
        except SignalException as stopped:
            ended, status = f"stopped by {signal.Signals(stopped.sigval).name}", 128 + stopped.sigval
        except ChildFailedError as failed:
            ended = _first_killed(count, {number: failure.exitcode for number, failure in failed.failures.items()})
        told = sorted((json.loads(path.read_text()) for path in Path(reports).glob("*.json")), key=itemgetter("at"))
    # whose peer is gone says so too: that is told only where no cause is known
    cause = next((report for report in told if not report["lost"]), None)
    if cause is None and (ended or not told):
        error = UserError(f"{ended or 'a process ended without a word'}; run the same command again to go on")
        error.status = status
        raise error
    print((cause or told[0])["text"], file=sys.stderr)
    sys.exit((cause or told[0])["status"])


def _first_killed(count: int, statuses: dict[int, int]) -> str:
    """The process that a signal ended, not one of those that the agent then stopped; empty where none was."""
    for number, status in statuses.items():
        if status < 0 and -status not in STOPS:
            why = ", as the kernel does when memory is short" if -status == signal.SIGKILL else ""
            return f"process {number} of {count} was ended by {signal.Signals(-status).name}{why}"
    return ""


def _run_reporting(main: Callable[[], None], reports: Path) -> None:
    """Be one process of `_launch`: say nothing, leave a report."""
    begin()
    _stop_with_the_launcher()
    try:
        with distributed.joined():
            main()
    except BaseException as error:
        known = explained(error)
        text, status = known or (traceback.format_exc().rstrip(), 1)
        report = {"text": text, "status": status, "at": time.time(), "lost": distributed.lost_another(error)}
        write_json(reports / f"{os.environ['RANK']}.json", report)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # an orderly end would wait for processes that are gone


def _stop_with_the_launcher() -> None:
    """Ask this process to stop when the launcher dies without asking: a killed one can forward nothing.

    A launcher that is told to stop a second time ends at once, and this asks a second time for it. Whom it has not
    asked before has as long as under a launcher.
    """
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        while True:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(SHUTDOWN_S)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def stop_requests() -> Iterator[Callable[[], int]]:
    """Turn SIGINT and SIGTERM into a flag, so that a step is finished and saved before the process ends: the number of
    the first that came, else 0.

    Where the step cannot finish, because the process waits for a device or for another process that is gone, a second
    request `SAME_REQUEST_S` after the first ends it with status 128 + signal. Nothing is written half: what reaches
    the disk is renamed into place.
    """
    asked: list[int] = []
    # a handler of Python's runs when the main thread is back from C, which may be never: a thread reads the signals
    # that the interpreter's own handler writes into a pipe on the spot
    read, write = os.pipe()
    os.set_blocking(write, False)
    previous = {s: signal.signal(s, lambda number, _: asked.append(number)) for s in STOPS}
    previous_pipe = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_end_at_second, args=(read,), name="stop requests", daemon=True).start()
    try:
        yield lambda: asked[0] if asked else 0
    finally:
        signal.set_wakeup_fd(previous_pipe)
        os.close(write)  # the thread's pipe ends, and with it the thread
        for number, handler in previous.items():
            signal.signal(number, handler)


def _end_at_second(pipe: int) -> None:
    first_at = None
    while came := os.read(pipe, 64):
        for number in filter(STOPS.__contains__, came):
            if first_at is None:
                first_at = time.monotonic()
            elif time.monotonic() - first_at > SAME_REQUEST_S:
                if REPORTS not in os.environ:  # else the launcher speaks for all its processes
                    name = signal.Signals(number).name
                    said = f"ended at once by a second {name}; run the same command again to go on from the last save"
                    os.write(2, f"\nerror: {said}\n".encode())
                os._exit(128 + number)
    os.close(pipe)
