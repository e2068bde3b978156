"""What a person sees when something is wrong: one line that names the file, the key and the mend."""

import argparse
import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
_CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+(?=@)|hf_[A-Za-z0-9]{16,}")


class UserError(Exception):
    """A mistake that the person can mend. Its text is complete: what, where, how to mend it."""

    status = 1  # that the program ends with


class ParameterError(UserError):
    """Of a key of a scale, with which each line begins; who holds the whole file says where that is."""


class OneLineParser(argparse.ArgumentParser):
    """A mistake on the command line is one line, as any other is."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help says what there is")


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where Ctrl-C would be: temporary files go and children end, which its default leaves behind."""


@contextmanager
def keeping(what: Callable[[], str]) -> Iterator[None]:
    """Tell who interrupts the body `what` is kept of it, "" for nothing, and so how to go on."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if told := what():
            stop.add_note(told)
        raise


def end_at_once(told: Callable[[], str]) -> None:
    """Have Ctrl-C end this process from now on, also while it waits in C, where no handler of Python's would run.

    A thread reads of it in the pipe into which the interpreter's own handler writes on the spot. For work of which all
    that is finished is on the disk at any moment.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)

    def watch() -> None:
        while came := os.read(read, 64):
            if signal.SIGINT in came:
                os.write(2, f"\n{_interrupted('interrupted', [told()])}\n".encode())
                os._exit(128 + signal.SIGINT)

    signal.signal(signal.SIGINT, lambda number, frame: None)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=watch, name="ends at once", daemon=True).start()


def tell_early_interrupts() -> None:
    """Where `python -m` looks for the program that it will run: have Ctrl-C be one line while that imports, too.

    A handler, and no exception, which some libraries swallow while they import.
    """
    if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _before_the_start)


def begin() -> None:
    """What `tell_early_interrupts` waits for."""
    if signal.getsignal(signal.SIGINT) is _before_the_start:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _before_the_start(_: int, __: FrameType | None) -> None:
    os.write(2, f"\n{_interrupted('interrupted', ['nothing was begun'])}\n".encode())
    os._exit(128 + signal.SIGINT)


def _interrupted(what: str, kept: Sequence[str]) -> str:
    told = "; ".join(filter(None, kept)) or "nothing is left half-written"
    return f"error: {what}; {plain(told)}; run the same command again to go on"


def _terminate(_: int, __: FrameType | None) -> None:
    raise Terminated


# of the machine, not of the program: room or access is all that is missing
_MACHINE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


def run_stage(main: Callable[[], None]) -> None:
    """Run a stage's `main`; a mistake of the user's ends in `error: ...` on stderr and exit status 1.

    Anything else is a defect of ours and keeps its traceback.
    """
    begin()
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        main()
    except BrokenPipeError:  # whoever read our output, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (Exception, KeyboardInterrupt) as error:
        known = explained(error)
        if known is None:
            raise
        print(known[0], file=sys.stderr)
        sys.exit(known[1])
    finally:
        signal.signal(signal.SIGTERM, previous)


def plain(text: str) -> str:
    """`text` as a terminal may show it: what would steer the terminal is written out, secrets are left out.

    File names, model cards and the hub's answers are others' words; an escape sequence among them could repaint what
    a person has read, and an address may hold a password.
    """
    shown = without_secrets(text)
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in shown)


def without_secrets(text: str) -> str:
    """`text` without tokens of the hub and what an address says of user and password."""
    hidden = _CREDENTIALS.sub("[hidden]", text)
    for secret in filter(None, map(os.environ.get, _SECRETS)):
        hidden = hidden.replace(secret, "[hidden]")
    return hidden


def explained(error: BaseException) -> tuple[str, int] | None:
    """What a person is told of `error`, a line each, and the exit status; None for a defect of ours."""
    if isinstance(error, UserError):
        return "\n".join(f"error: {plain(line)}" for line in str(error).split("\n")), error.status
    if isinstance(error, KeyboardInterrupt):
        number = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
        what = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupted"}[number]
        return _interrupted(what, getattr(error, "__notes__", ())), 128 + number
    if isinstance(error, OSError):
        number, where, reason = error.errno, error.filename, error.strerror
    else:  # safetensors raises an exception of its own and leaves the system's number in its text
        told = (n for n in _MACHINE_ERRORS if f"code: {n}," in str(error) or f"os error {n})" in str(error))
        number = next(told, None)
        where, reason = None, number and os.strerror(number)
    if number not in _MACHINE_ERRORS:
        return None
    cause = plain(f"{where or os.getcwd()}: {reason}")
    return f"error: {cause}; make room or grant access, then run the same command again", 1
