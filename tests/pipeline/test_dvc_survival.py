"""A stage under DVC that is interrupted, killed, doubled or hard-linked: nothing is lost or mixed up."""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.clones import Clone
from tests.support.soak import LONG
from tests.support.tiny_run import PRETRAIN, TEACHER, WHEELS, contents, finished, tiny_parameters

pytestmark = LONG
DEADLINE_S = 600
STEPS = 300


@pytest.fixture(scope="module")
def prepared(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone in which all that `pretrain` needs has been made, at a scale of seconds. Tests take copies."""
    clone = Clone(tmp_path_factory.mktemp("prepared"))
    (clone.directory / "dvc.lock").unlink(missing_ok=True)
    text = re.sub(r"(?m)^      tokens: 10240$", f"      tokens: {STEPS * 512}", tiny_parameters())
    text = text.replace("context: 128", "context: 512")  # all of HellaSwag, byte by byte
    (clone.directory / "params.yaml").write_text(text)
    shutil.copytree(finished() / TEACHER, clone.directory / TEACHER)
    WHEELS.mkdir(parents=True, exist_ok=True)
    (clone.directory / ".resume").mkdir()
    (clone.directory / ".resume" / "wheels").symlink_to(WHEELS)
    clone.dvc("config", "cache.type", "hardlink")
    clone.commit("a tiny scale")
    clone.dvc("repro", "outside")
    clone.commit("what pretrain needs")
    return clone


@pytest.fixture(scope="module")
def expected(prepared: Clone, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What `pretrain` makes when nothing disturbs it."""
    clone = prepared.copied(tmp_path_factory.mktemp("undisturbed") / "clone")
    clone.dvc("repro", "pretrain")
    return contents(clone.directory, PRETRAIN.outputs)


@pytest.fixture
def clone(prepared: Clone, tmp_path: Path) -> Iterator[Clone]:
    clone = prepared.copied(tmp_path / "clone")
    yield clone
    for process in alive_in(clone):
        process.kill()


def begin(clone: Clone, *arguments: str) -> subprocess.Popen[bytes]:
    """`dvc repro pretrain` as the job of a terminal: a process group of its own, its output in repro.log."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with open(clone.directory / "repro.log", "ab") as log:
        command = [sys.executable, "-m", "dvc", "repro", "pretrain", *arguments]
        return subprocess.Popen(
            command, cwd=clone.directory, env=environment, stdout=log, stderr=log, start_new_session=True
        )


def log(clone: Clone) -> str:
    return (clone.directory / "repro.log").read_text()


def alive_in(clone: Clone) -> list[psutil.Process]:
    """Processes that work in the clone."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()).is_relative_to(clone.directory) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def until(condition: object, clone: Clone) -> None:
    limit = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < limit, log(clone)
        time.sleep(0.02)


def training(clone: Clone) -> bool:
    """Whether the training has a checkpoint already."""
    return bool(list(clone.directory.glob(".resume/control-*/state/progress.json")))


def undone(clone: Clone) -> bool:
    """Whether DVC knows that `pretrain` has still to be run."""
    return "pretrain:" not in (clone.directory / "dvc.lock").read_text()


def test_ctrl_c_stops_every_process_and_the_next_repro_goes_on(clone: Clone, expected: dict[str, str]) -> None:
    process = begin(clone)
    until(lambda: training(clone), clone)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait() != 0
    assert alive_in(clone) == []
    assert undone(clone) and "stopped after step" in log(clone) and "Traceback" not in log(clone)
    assert "resumed after step" in clone.dvc("repro", "pretrain")
    assert contents(clone.directory, PRETRAIN.outputs) == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_a_stage_whose_dvc_is_killed_locks_its_state_until_it_ends(
    number: signal.Signals, clone: Clone, expected: dict[str, str]
) -> None:
    process = begin(clone)
    until(lambda: training(clone), clone)
    process.send_signal(number)
    assert process.wait() != 0
    [stage] = [child for child in alive_in(clone) if "stages.pretrain" in child.cmdline()[1:]][-1:]
    stage.suspend()  # so that it cannot end before the second one asks
    assert undone(clone)
    refused = clone.dvc("repro", "pretrain", status=None)
    assert "another process is running this very stage" in refused and undone(clone)
    stage.resume()
    stage.send_signal(signal.SIGTERM)
    until(lambda: not alive_in(clone), clone)
    assert "resumed after step" in clone.dvc("repro", "pretrain")
    assert contents(clone.directory, PRETRAIN.outputs) == expected


def test_all_of_them_killed_the_next_repro_goes_on(clone: Clone, expected: dict[str, str]) -> None:
    process = begin(clone)
    until(lambda: training(clone), clone)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    until(lambda: not alive_in(clone), clone)
    assert undone(clone)
    assert "resumed after step" in clone.dvc("repro", "pretrain")
    assert contents(clone.directory, PRETRAIN.outputs) == expected


def test_two_repros_at_once_do_the_work_once(clone: Clone, expected: dict[str, str]) -> None:
    pair = [begin(clone), begin(clone)]
    statuses = [process.wait() for process in pair]
    assert 0 in statuses
    assert log(clone).count("control: 30,") == 1  # one banner: one training
    clone.dvc("repro", "pretrain")
    assert contents(clone.directory, PRETRAIN.outputs) == expected


def test_no_stage_writes_through_a_hard_link_into_the_cache(clone: Clone, expected: dict[str, str]) -> None:
    clone.dvc("repro", "pretrain")
    weights = clone.directory / "models" / "control" / "model.safetensors"
    assert weights.stat().st_nlink > 1
    params = clone.directory / "params.yaml"
    params.write_text(params.read_text().replace("seed: 1337", "seed: 7"))
    for stage in ("check", "fetch", "tokenize", "outside", "pretrain"):  # by hand, over outputs that DVC did not remove
        clone.run(sys.executable, "-m", f"stages.{stage}")
    assert contents(clone.directory, ["models/control"]) != {k: v for k, v in expected.items() if "models" in k}
    assert weights.stat().st_nlink == 1
    cached = [path for path in (clone.directory / ".dvc" / "cache" / "files").rglob("*") if path.is_file()]
    assert len(cached) > 10
    for path in cached:
        assert hashlib.md5(path.read_bytes()).hexdigest() == path.parent.name + path.name.removesuffix(".dir")


def test_file_times_from_another_century_run_nothing_again(clone: Clone, expected: dict[str, str]) -> None:
    clone.dvc("repro", "pretrain")
    for stamp in (2**32, 0):
        for folder in ("data", "models", "metrics", "plots", "microlm", "stages"):
            for path in (clone.directory / folder).rglob("*"):
                os.utime(path, (stamp, stamp), follow_symlinks=False)
        assert "Running stage" not in clone.dvc("repro", "pretrain")
    assert contents(clone.directory, PRETRAIN.outputs) == expected
