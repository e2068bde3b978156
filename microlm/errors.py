"""What a person sees when something is wrong: one line that names the file, the key and the mend."""

import errno
import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake that the person can mend. Its text is complete: what, where, how to mend it."""


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
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        where = error.filename or os.getcwd()
        print(f"error: {where}: {error.strerror}; make room or grant access, then run the same command again", file=sys.stderr)
        sys.exit(1)
