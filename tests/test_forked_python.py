"""The tests' `python` of forks is to its caller what the real one is, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from tests.support.clones import ROOT
from tests.support.forked_python import Forked, _remember_yaml, forked_python
from tests.support.shared import FIRST

WAITS = "tests.support.waits"
PIPES = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
signals = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)


def begun(directory: Path, *arguments: str) -> tuple[subprocess.Popen[str], int, str]:
    """The script's process, the number of its fork and what else that tells first."""
    process = subprocess.Popen([forked_python(), "-m", WAITS, *arguments], cwd=directory, **PIPES)
    pid, told = process.stdout.readline().split(maxsplit=1)
    return process, int(pid), told


@pytest.mark.parametrize("status", [0, 3])
def test_it_has_its_callers_folder_environment_streams_and_status(
    status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAID", "a word")
    process, pid, told = begun(tmp_path, str(status))
    assert process.communicate("heard") == ("", "heard\n")
    assert process.returncode == status and pid != process.pid
    assert told == f"{tmp_path} a word\n"


@signals
def test_what_ends_it_ends_the_fork(number: signal.Signals, tmp_path: Path) -> None:
    process, pid, _ = begun(tmp_path)
    fork = psutil.Process(pid)
    process.send_signal(number)
    process.communicate()
    assert process.returncode in (-number, 1)  # Python's own end at Ctrl-C is a status here
    assert not psutil.wait_procs([fork], timeout=30)[1]


@signals
def test_a_fork_without_the_script_ends_by_its_signal(number: signal.Signals, tmp_path: Path) -> None:
    process = Forked([WAITS], tmp_path, os.environ)
    assert process.poll() is None and psutil.pid_exists(process.pid)
    process.send_signal(number)
    assert process.wait() in (-number, 1) and not psutil.pid_exists(process.pid)


def test_a_fork_whose_holder_is_gone_is_killed(tmp_path: Path) -> None:
    process = Forked([WAITS], tmp_path, os.environ)
    fork = psutil.Process(process.pid)
    process._server.close()
    assert not psutil.wait_procs([fork], timeout=30)[1]


def test_what_it_does_not_serve_the_real_interpreter_runs() -> None:
    command = [forked_python(), "-c", "import sys; print(sys.executable, *sys.argv[1:])", "two", "words"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (ended.stdout, ended.returncode) == (f"{sys.executable} two words\n", 0)


def test_the_server_ends_with_pytests_first_process(tmp_path: Path) -> None:
    first = subprocess.Popen([sys.executable, "-IS", "-c", "input()"], stdin=subprocess.PIPE)
    serving = f"from tests.support.forked_python import serve; serve('microlm-tests-{os.getpid()}', [])"
    environment = {**os.environ, FIRST: str(first.pid)}
    server = subprocess.Popen([sys.executable, "-c", serving], cwd=ROOT, env=environment, **PIPES)
    assert server.stdout.readline() == "ready\n" and server.poll() is None
    first.kill()
    first.communicate()
    assert server.communicate(timeout=60) == ("", "") and server.returncode == 0


def test_yaml_is_remembered_by_its_text_and_given_to_each_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(YAML, "load", YAML.load)  # and back again
    _remember_yaml(tmp_path)
    text = "a: [1, &x {b: 2}]\nc: *x\n"
    for _ in range(2):
        found = YAML(typ="safe").load(text)
        assert found == {"a": [1, {"b": 2}], "c": {"b": 2}}
        found["a"].clear()
    assert YAML(typ="safe").load(text.replace("2", "3"))["c"] == {"b": 3}
    assert len(list(tmp_path.iterdir())) == 2
    for _ in range(2):
        assert YAML(typ="safe").load("{1: 2}") == {1: 2}  # which JSON would change
        with pytest.raises(YAMLError):
            YAML(typ="safe").load("a: [")
    assert YAML().load(text).ca is not None  # with its comments, to be written again: not from memory
