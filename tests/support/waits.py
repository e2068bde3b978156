"""A program that tells who and where it is, and waits: python -m tests.support.waits [STATUS]."""

import os
import sys
import time

if __name__ == "__main__":
    print(os.getpid(), os.getcwd(), os.environ.get("SAID"), flush=True)
    if len(sys.argv) > 1:
        print(sys.stdin.read(), file=sys.stderr)
        sys.exit(int(sys.argv[1]))
    time.sleep(600)
