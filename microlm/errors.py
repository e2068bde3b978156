"""What a person sees when something is wrong: one line that names the file, the key and the mend."""

import argparse
import errno
import os
import re
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
_CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+(?=@)|hf_[A-Za-z0-9]{16,}")


class UserError(Exception):
    """A mistake that the person can mend. Its text is complete: what, where, how to mend it."""


class ParameterError(UserError):
    """Of a key of a scale, with which each line begins; who holds the whole file says where that is."""


class OneLineParser(argparse.ArgumentParser):
    """A mistake on the command line is one line, as any other is."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help says what there is")


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where Ctrl-C would be: temporary files go and children end, which its default leaves behind."""


def _terminate(_: int, __: FrameType | None) -> None:
    raise Terminated


# of the machine, not of the program: room or access is all that is missing
_MACHINE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


def run_stage(main: Callable[[], None]) -> None:
    """Run a stage's `main`; a mistake of the user's ends in `error: ...` on stderr and exit status 1.

    Anything else is a defect of ours and keeps its traceback.
    """
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
        return "\n".join(f"error: {plain(line)}" for line in str(error).split("\n")), 1
    if isinstance(error, Terminated):
        return "error: terminated", 128 + signal.SIGTERM
    if isinstance(error, KeyboardInterrupt):
        return "error: interrupted", 130
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
