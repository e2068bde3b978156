"""A `python` for DVC whose stages are forks of one process that has imported torch already.

DVC starts an interpreter for every stage, and most of a tiny stage's seconds go into imports. `python -m stages.x` by
the script that `forking_python` writes is run by a fork of a server instead: in the caller's folder and environment, on
its streams, with the caller's status. Everything else is handed to the real interpreter. The code is this tree's, not
the clone's, which is a copy of it. `make smoke` and `make soak` do without.
"""

import json
import os
import runpy
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.clones import ROOT

# the client: as little as an interpreter can be
CLIENT = """#!{python} -IS
import json, os, socket, sys
if sys.argv[1:2] != ["-m"] or not sys.argv[2].startswith("stages."):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect({address!r})
asked = json.dumps([os.getcwd(), dict(os.environ), sys.argv[2:]]).encode()
socket.send_fds(server, [asked], [0, 1, 2])
sys.exit(int(server.recv(16) or 1))
"""


@contextmanager
def forking_python(folder: Path) -> Iterator[Path]:
    """A folder for the front of PATH, whose `python` is such a one while the body runs."""
    folder.mkdir()
    address, script = str(folder / "server"), folder / "python"
    script.write_text(CLIENT.format(python=sys.executable, address=address))
    script.chmod(0o755)
    command = [sys.executable, "-m", "tests.support.forked_python", address]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout and server.stdout.readline() == b"ready\n"
            yield folder
        finally:
            server.kill()


def serve(address: str) -> None:
    """Fork for every client, for as long as this process lives."""
    for name in ("datasets", "scipy.stats", "transformers.models.auto.modeling_auto"):
        __import__(name)
    for file in sorted((ROOT / "stages").glob("*.py")):
        __import__(f"stages.{file.stem}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while True:
            client, _ = listener.accept()
            if os.fork() == 0:  # who waits for the stage, so that the next client need not
                if pid := os.fork():
                    client.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) % 256).encode())
                    os._exit(0)
                os._exit(_run(client))
            client.close()
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG) != (0, 0):  # who waited, and is done
                    pass


def _run(client: socket.socket) -> int:
    """The stage's status. Nothing of the server ends with it: neither its streams nor what it would do at its end."""
    asked, streams, _, _ = socket.recv_fds(client, 2**20, 3)
    directory, environment, sys.argv = json.loads(asked)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    try:
        sys.modules.pop(sys.argv[0])  # imported ahead, but to run is to import once more
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        return 0
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    serve(sys.argv[1])
