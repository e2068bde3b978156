"""What a person sees when something is wrong: one line that names the file, the key and the mend."""

import errno
import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake that the person can mend. Its text is complete: what, where, how to mend it."""


# of the machine, not of the program: room or access is all that is missing
_MACHINE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


def run_stage(main: Callable[[], None]) -> None:
    """Run a stage's `main`; a mistake of the user's ends in `error: ...` on stderr and exit status 1.

    Anything else is a defect of ours and keeps its traceback.
    """
    try:
        main()
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        reason = _machine_error(error)
        if reason is None:
            raise
        print(f"error: {reason}; make room or grant access, then run the same command again", file=sys.stderr)
        sys.exit(1)


def _machine_error(error: Exception) -> str | None:
    """File and reason of a full, read-only or forbidden disk; None for any other error."""
    if isinstance(error, OSError):
        where = error.filename or os.getcwd()
        return f"{where}: {error.strerror}" if error.errno in _MACHINE_ERRORS else None
    # safetensors raises an exception of its own and leaves the system's number in its text
    for number in _MACHINE_ERRORS:
        if f"code: {number}," in str(error) or f"os error {number})" in str(error):
            return f"{os.getcwd()}: {os.strerror(number)}"
    return None
