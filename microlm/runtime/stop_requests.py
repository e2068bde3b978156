"""Requests to stop a training: the first one lets it finish and save its step, another one ends it at once."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from microlm.runtime.launcher import REPORTS

STOPS = (signal.SIGINT, signal.SIGTERM)
# what comes as soon is the same request: a scheduler that stops a job signals every process of it, and the launcher,
# which is one of them, passes the signal on
SAME_REQUEST_S = 2.0


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Turn SIGINT and SIGTERM into a flag, so that a step is finished and saved before the process ends.

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
        yield lambda: bool(asked)
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
