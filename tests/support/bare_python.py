"""Python on a bare machine with a GPU: what is not installed there is found by nobody, and there is no network.

A tiny run of `python -m bench.gpu` imports torch and transformers in each of its six processes, and does little else.
The `python` that `forking_python` makes hands its program to a fork of one server instead, which has imported them in
the bare environment: in the caller's folder and environment, with its open files, and with the fork's status as its
own. What the program starts by `sys.executable` is such a fork in its turn.
"""

import fcntl
import gc
import importlib
import json
import os
import runpy
import secrets
import select
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import set_executable
from pathlib import Path

from tests.support.clones import ROOT

SITE = """
import socket, sys
class Without:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {lacking} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
connect = socket.socket.connect
def connect_here(self, address):
    if self.family != socket.AF_UNIX:
        raise OSError(f"no network: {{address}}")
    return connect(self, address)
socket.socket.connect = connect_here
"""
# what parts and the tests that they run import, and pytest's plugins; none of the tests, whose assertions it rewrites
AHEAD = ["bench.gpu.command", "transformers.models.llama.modeling_llama", "transformers.models.olmo.modeling_olmo",
    "pytest", "hypothesis", "hydra.extra.pytest_plugin", "anyio.pytest_plugin"]  # fmt: skip

# the client: as little as an interpreter can be
CLIENT = """#!{python} -IS
import json, os, socket, sys
asked = [word for word in sys.argv[1:] if word != "-B"]  # which multiprocessing hands on
if asked[0] not in ("-m", "-c"):
    os.execv({python!r}, [{python!r}, *asked])
def is_open(number):
    try:
        return bool(os.fstat(number))
    except OSError:  # what has listed them
        return False
numbers = [number for number in map(int, os.listdir("/proc/self/fd")) if is_open(number)]
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect({address!r})
socket.send_fds(server, [json.dumps([os.getcwd(), dict(os.environ), asked, numbers]).encode()], numbers)
sys.exit(int(server.recv(16) or 1))
"""


def bare(folder: Path, *lacking: str) -> dict[str, str]:
    """An environment without those packages and a network, for a process and all that it starts."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(SITE.format(lacking=set(lacking)))
    return os.environ | {"PYTHONPATH": os.pathsep.join((str(folder), str(ROOT))), "OMP_NUM_THREADS": "1"}


@contextmanager
def forking_python(folder: Path, environment: dict[str, str]) -> Iterator[Path]:
    """The script, in `folder`, while the body runs; `environment` is that of the server."""
    address, script = secrets.token_hex(16), folder / "python"
    script.write_text(CLIENT.format(python=sys.executable, address=f"\0{address}"))
    script.chmod(0o755)
    command, streams = [sys.executable, "-m", "tests.support.bare_python", address, str(script)], subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdin=streams, stdout=streams) as server:
        try:
            assert server.stdout and server.stdout.readline() == b"ready\n"
            yield script
        finally:
            server.kill()


def serve(address: str, script: str) -> None:
    """Fork for every client, for as long as whoever has started this process lives."""
    for name in AHEAD:
        importlib.import_module(name)
    sys.executable = script
    set_executable(script)
    gc.freeze()  # what is imported is no garbage: no fork need look through it
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"\0{address}")  # no file's, whose path may be longer than an address can be
        listener.listen()
        print("ready", flush=True)
        while listener in select.select([listener, sys.stdin], [], [])[0]:  # the other ends with who holds it
            client, _ = listener.accept()
            if os.fork() == 0:  # who waits for the program, so that the next client need not
                listener.close()
                if pid := os.fork():
                    client.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) % 256).encode())
                    os._exit(0)
                os._exit(_run(client))
            client.close()
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG) != (0, 0):  # who waited, and is done
                    pass


def _run(client: socket.socket) -> int:
    """The program's status. Nothing of the server ends with it: neither its streams nor what it would do at its end."""
    asked, files, _, _ = socket.recv_fds(client, 2**20, 253)
    directory, environment, (how, program, *arguments), numbers = json.loads(asked)
    client.close()
    beyond = [fcntl.fcntl(file, fcntl.F_DUPFD, 512) for file in files]  # where none of the caller's numbers is
    for file in files:
        os.close(file)
    for file, number in zip(beyond, numbers):
        os.dup2(file, number)
        os.close(file)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c" if how == "-c" else program, *arguments]
    try:
        if how == "-c":
            exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        return 0
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    serve(*sys.argv[1:])
