"""A `python` whose programs are forks of one process that has imported torch, transformers and DVC already.

A stage at a tiny scale computes for less long than its interpreter imports, and so does a command of DVC. The first
test of a run of pytest that needs one starts a server (`python -m tests.support.forked_python`), which ends with
pytest's first process. `python -m stages.x` by the script that it serves is run by a fork of it: in the caller's folder
and environment (but for what a library reads of that at its import), on its streams, with its signals and its status;
what it does not serve, the real interpreter runs. The code is this tree's, not a clone's, which is a copy of it. `make
smoke` and `make soak` have DVC and the launcher do without.
"""

import fcntl
import gc
import importlib
import json
import os
import runpy
import secrets
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from multiprocessing import set_executable
from pathlib import Path
from typing import BinaryIO

from microlm.files import atomic_file, sha256_bytes
from tests.support.clones import ROOT
from tests.support.shared import FIRST, made_once

SERVED = ("stages.", "tests.support.", "dvc", "microlm")
# besides all stages: what they and DVC import only when they come to it
AHEAD = """
    datasets matplotlib.backends.backend_agg PIL.JpegImagePlugin pandas.io.formats.csvs ruamel.yaml scipy.stats
    tests.support.ranks torch.distributed.launcher.api transformers.models.auto.modeling_auto
    transformers.models.auto.tokenization_auto transformers.models.llama.modeling_llama
    dvc.cli.parser dvc.data_cloud dvc.repo.experiments.executor.local dvc.repo.experiments.queue.celery
    dvc.repo.experiments.queue.workspace dvc.repo.experiments.run dvc.repo.graph dvc.repo.index dvc.repo.metrics.diff
    dvc.repo.plots dvc.repo.stage dvc.utils.strictyaml dvc_task.proc.manager dulwich.porcelain hydra.compose hydra.main
    networkx pygit2 rich.console scipy.io
""".split()  # noqa: SIM905

# the client: as little as an interpreter can be
CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
command = [word for word in sys.argv[1:] if word != "-B"]  # which multiprocessing hands on
how, program = (*command, "", "")[:2]
if not (how == "-m" and program.startswith({served!r}) or how == "-c" and {code!r}):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])

def is_open(number):
    try:
        return bool(os.fstat(number))
    except OSError:  # what has listed them
        return False

numbers = [number for number in map(int, os.listdir("/proc/self/fd")) if is_open(number)]
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect({address!r})
asked = json.dumps([os.getcwd(), dict(os.environ), os.path.abspath(sys.argv[0]), command, numbers]).encode()
socket.send_fds(server, [asked], numbers)
pid = int(server.recv(16))

def pass_on(number, _):
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass

for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, pass_on)
status = int(server.recv(16) or 1)
if status < 0:  # a signal that ended the fork ends this
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
sys.exit(status)
"""
MOST_FILES = 253  # that a message can pass
BEYOND = 512  # where none of the caller's numbers is
_kept: list[subprocess.Popen[bytes]] = []  # a Popen that nobody holds warns of its process


@cache
def forked_python() -> Path:
    """The script, in a folder that is fit for the front of PATH."""
    return made_once("forked-python", _start_server) / "python"


def _start_server(folder: Path) -> None:
    stages = (f"stages.{file.stem}" for file in sorted((ROOT / "stages").glob("[!_]*.py")))
    _kept.append(start_server(folder, SERVED, [*AHEAD, *stages]))


def start_server(
    folder: Path,
    served: tuple[str, ...],
    ahead: Sequence[str],
    environment: Mapping[str, str] | None = None,
    code: bool = False,
) -> subprocess.Popen[bytes]:
    """Put the script of a new server into `folder`.

    Args:
        served: how the modules begin that `-m` runs in forks.
        ahead: what the server imports.
        environment: the server's, where it is not this process's.
        code: whether `-c` is served too.
    """
    address = f"\0microlm-tests-{secrets.token_hex(8)}"  # no file's, whose path may be longer than an address can be
    (folder / "address").write_text(address)
    (folder / "yaml").mkdir()
    script = folder / "python"
    script.write_text(CLIENT.format(python=sys.executable, served=served, code=code, address=address))
    script.chmod(0o755)
    # a session of its own: Ctrl-C is for pytest, with which it ends
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.support.forked_python", address[1:], *ahead],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    with server.stdout:
        assert server.stdout.readline() == b"ready\n"
    return server


class Forked:
    """`python -m command` in a fork, with the methods of `subprocess.Popen` that tests use; it dies with this process.

    Args:
        streams: where it writes, stdout and stderr; without them `communicate` returns both.
    """

    def __init__(
        self,
        command: Sequence[str],
        directory: Path,
        environment: Mapping[str, str],
        streams: tuple[BinaryIO, BinaryIO] | None = None,
    ) -> None:
        python, self.returncode = forked_python(), None
        self._streams = streams or (tempfile.TemporaryFile(), tempfile.TemporaryFile())
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._server.connect((python.parent / "address").read_text())
        asked = json.dumps([str(directory), dict(environment), str(python), ["-m", *command], [0, 1, 2]]).encode()
        with open(os.devnull, "rb") as nothing:
            socket.send_fds(self._server, [asked], [file.fileno() for file in (nothing, *self._streams)])
        self.pid = int(self._server.recv(16))

    def wait(self) -> int:
        """The status: minus the signal where one ended it."""
        if self.returncode is None:
            self.returncode = int(self._server.recv(16))
            self._server.close()
        return self.returncode

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._server], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self) -> tuple[str, str]:
        self.wait()
        told = []
        for file in self._streams:
            file.seek(0)
            with file:
                told.append(file.read().decode())
        return told[0], told[1]


def serve(address: str, ahead: Iterable[str]) -> None:
    """Import `ahead`, then fork for every client, until pytest's first process is gone."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # what our programs set before these imports
    for name in ahead:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what is there is no garbage of a fork, whose collector would copy every page of it
    first = os.pidfd_open(int(os.environ[FIRST]))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"\0{address}")
        listener.listen()
        print("ready", flush=True)
        while first not in select.select([listener, first], [], [])[0]:
            client, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _attend(client)
                os._exit(0)
            client.close()
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG) != (0, 0):  # who attended to another, and is done
                    pass


def _attend(client: socket.socket) -> None:
    """Run what the client asks for and tell it the status. What runs tells its own number; it dies with the client."""
    asked, files, _, _ = socket.recv_fds(client, 2**20, MOST_FILES)
    pid = os.fork()
    if not pid:
        os.setsid()  # a group of its own, as a terminal gives to a job
        client.send(str(os.getpid()).encode())  # from here: Python drops a signal that comes while it forks
        client.close()
        os._exit(_run(*json.loads(asked), files))
    for file in files:
        os.close(file)
    if client in select.select([os.pidfd_open(pid), client], [], [])[0]:  # it says no more: this is its end
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with suppress(BrokenPipeError):
        client.send(str(status).encode())


def _run(
    directory: str, environment: dict[str, str], python: str, command: list[str], numbers: list[int], files: list[int]
) -> int:
    """The program's status. Nothing of the server ends with it: neither its streams nor what it would do at its end."""
    try:
        beyond = [fcntl.fcntl(file, fcntl.F_DUPFD, BEYOND) for file in files]
        for file in files:
            os.close(file)
        for file, number in zip(beyond, numbers):
            os.dup2(file, number)
            os.close(file)
        os.chdir(directory)
        os.environ.clear()
        os.environ.update(environment)
        how, program, *arguments = command
        sys.argv, sys.executable = [program if how == "-m" else how, *arguments], python
        set_executable(python)  # whatever the program starts is a fork too
        if how == "-c":
            exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
            return 0
        if program == "dvc":
            _remember_yaml(Path(python).parent / "yaml")
        elif not hasattr(sys.modules.get(program), "__path__"):
            sys.modules.pop(program, None)  # imported ahead, but to run is to import once more
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


def _remember_yaml(folder: Path) -> None:
    """Have ruamel, which DVC reads the same files with dozens of times and for most of its seconds, read each once."""
    from ruamel.yaml import YAML

    load = YAML.load

    def remembered(self: YAML, stream: object) -> object:
        if self.typ != ["safe"] or not isinstance(stream, str):
            return load(self, stream)
        path = folder / sha256_bytes(stream.encode())
        if path.exists():
            return json.loads(path.read_text())
        found = load(self, stream)
        with suppress(TypeError):  # a date, say, which JSON does not have
            if json.loads(kept := json.dumps(found)) == found:
                with atomic_file(path, "w") as file:
                    file.write(kept)
        return found

    YAML.load = remembered


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2:])
