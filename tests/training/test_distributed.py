"""Several processes give what one gives: real ones over gloo, started by the launcher as on a machine with two GPUs."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from microlm.corpus.batches import Batches
from microlm.errors import UserError
from microlm.files import sha256_file
from microlm.parameters import BatchConfig
from microlm.pipeline import training_stages
from microlm.runtime.launcher import PROCESSES, processes
from microlm.teacher import cache as cache_module
from microlm.training.loop import Feed
from microlm.training.optimizer import deal_matrices
from tests.support import ranks
from tests.support.bare_ranks import environment_of, start_real
from tests.support.forked_python import Forked
from tests.support.soak import LONG, SOAKING
from tests.support.tiny_run import copied_to, finished, write_questions
from tests.support.toy import toy_shards
from tests.support.workspace import RUNTIME, config_of, inside

MANY = 400


Process = Forked | subprocess.Popen[str]


def start(directory: Path, *command: str, count: int = 2) -> Process:
    """`python -m command` in `count` processes, through the launcher. They and it are forks except in a soak."""
    if SOAKING:
        return start_real(directory, "-m", *command, count=count)
    return Forked(command, directory, environment_of(count))


def finish(directory: Path, *command: str, count: int = 2, status: int = 0) -> str:
    """Run to the end; returns what was said on stderr."""
    return ended(start(directory, *command, count=count), status)


def ended(process: Process, status: int = 0) -> str:
    said, complained = process.communicate()
    assert process.returncode == status, f"{said}\n{complained}"
    return complained


def errors(complained: str) -> list[str]:
    assert "Traceback" not in complained
    return [line for line in complained.splitlines() if line.startswith("error: ")]


def wait_for_a_checkpoint(directory: Path, process: Process) -> None:
    """The first one is written before the evaluation in the middle of the training, which takes longer than a look."""
    while not list(directory.glob(".resume/control-*/state")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, parts: Path) -> Path:
    """Shards, teacher and parts; no models and no cache."""
    directory = copied_to(finished(), tmp_path_factory.mktemp("ranks") / "workspace")
    for made in ("models/control", "models/continued", "models/student", "metrics", "data/teacher", "data/evaluation"):
        shutil.rmtree(directory / made)
    return directory


@pytest.fixture(scope="module")
def alone(workspace: Path) -> Path:
    """The pipeline in one process: this one."""
    directory = copied_to(workspace, workspace.with_name("alone"))
    with inside(directory), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", sys.argv)
        patch.setattr(cache_module, "SMALLEST_BLOCK", cache_module.SMALLEST_BLOCK)
        ranks.pipeline()  # which sets both
    return directory


@pytest.fixture(scope="module")
def together(workspace: Path) -> Path:
    """The pipeline in two processes."""
    directory = copied_to(workspace, workspace.with_name("together"))
    finish(directory, "tests.support.ranks", "pipeline")
    return directory


@pytest.fixture(scope="module")
def slow(workspace: Path) -> Path:
    """The workspace with so many questions that a signal arrives while they are evaluated."""
    return ask(copied_to(workspace, workspace.with_name("slow")), MANY)


def ask(directory: Path, questions: int) -> Path:
    write_questions(directory / "data" / "parts", questions)
    params = directory / "params.yaml"
    params.write_text(re.sub(r"hellaswag_items: \d+", f"hellaswag_items: {questions}", params.read_text()))
    return directory


@pytest.fixture(scope="module")
def undisturbed(slow: Path) -> Path:
    """A control that one process has trained without being stopped."""
    directory = copied_to(slow, slow.with_name("undisturbed"))
    with inside(directory):
        training_stages.pretrain(config_of(directory), RUNTIME)
    return directory


@pytest.fixture
def own(slow: Path, tmp_path: Path) -> Path:
    return copied_to(slow, tmp_path / "own")


def log(directory: Path, name: str) -> tuple[list[str], list[float]]:
    """Steps and kinds of the log's lines, and their values."""
    lines = [line.split() for line in (directory / "metrics" / f"{name}.log").read_text().splitlines()]
    return [" ".join(line[:2]) for line in lines], [float(line[2]) for line in lines]


@pytest.mark.parametrize("name", ["control", "continued", "student", "minillm"])
def test_two_processes_have_the_losses_of_one(alone: Path, together: Path, name: str) -> None:
    (labels, values), (their_labels, their_values) = log(alone, name), log(together, name)
    assert labels == their_labels and len(labels) > 12
    assert their_values == pytest.approx(values, abs=1e-5)
    if name != "minillm":
        ours, theirs = (load_file(each / "models" / name / "model.safetensors") for each in (alone, together))
        for name, weight in ours.items():
            torch.testing.assert_close(theirs[name], weight, rtol=0, atol=1e-5)


def test_two_processes_write_the_cache_of_one(alone: Path, together: Path) -> None:
    ours, theirs = ({p.name: sha256_file(p) for p in (each / "data/teacher").iterdir()} for each in (alone, together))
    assert ours == theirs and len(ours) >= 2 + 2
    assert not list(together.glob(".resume/*"))


@pytest.mark.parametrize("model", ["student", "teacher"])
def test_two_processes_give_the_answers_of_one(alone: Path, together: Path, model: str) -> None:
    for table in (alone / "data" / "evaluation" / model).glob("*.parquet"):  # answers and windows, a row each
        theirs, bits = pd.read_parquet(together / "data" / "evaluation" / model / table.name), model == "teacher"
        # the students' weights differ in their last digits, the teacher is the same
        pd.testing.assert_frame_equal(theirs, pd.read_parquet(table), check_exact=bits, rtol=1e-5, atol=1e-5)
    metrics = [json.loads((each / f"metrics/evaluation/{model}.json").read_text()) for each in (alone, together)]
    for found in metrics:
        del found["elapsed_s"]
    assert metrics[0] == metrics[1]


def test_a_stop_is_agreed_and_one_process_goes_on_where_two_stopped(undisturbed: Path, own: Path) -> None:
    process = start(own, "stages.pretrain")
    wait_for_a_checkpoint(own, process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    _, complained = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    (line,) = errors(complained)
    assert "stopped after step 1" in line and "run the same command again" in line
    assert len(children) >= 2 and not any(child.is_running() for child in children)
    with inside(own):
        training_stages.pretrain(config_of(own), RUNTIME)
    assert log(own, "control")[0] == log(undisturbed, "control")[0]
    assert log(own, "control")[1] == pytest.approx(log(undisturbed, "control")[1], abs=1e-5)


@LONG
def test_two_processes_go_on_where_one_stopped(undisturbed: Path, own: Path) -> None:
    process = start(own, "stages.pretrain", count=1)
    wait_for_a_checkpoint(own, process)
    process.send_signal(signal.SIGTERM)
    assert "stopped after step 1" in process.communicate()[1]
    (kept,) = own.glob(".resume/control-*/state")
    finish(own, "stages.pretrain")
    assert not kept.exists()
    assert log(own, "control")[1] == pytest.approx(log(undisturbed, "control")[1], abs=1e-5)


@LONG
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_launcher_that_ends_takes_its_processes_along_once_they_have_saved(own: Path, number: signal.Signals) -> None:
    # a killed launcher says nothing: its processes look for it once a second, and have to be at work by then
    process = start(ask(own, 4 * MANY), "stages.pretrain")
    wait_for_a_checkpoint(own, process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    assert len(children) >= 2 and not psutil.wait_procs(children, timeout=120)[1]
    assert process.wait() == (128 + number if number == signal.SIGINT else -number)
    (progress,) = own.glob(".resume/control-*/state/progress.json")
    assert json.loads(progress.read_text())["step"] > 10  # the step that ran, after the checkpoint waited for
    process.communicate()


def test_a_killed_process_ends_all_with_one_line(own: Path) -> None:
    process = start(own, "stages.pretrain")
    wait_for_a_checkpoint(own, process)
    launcher = psutil.Process(process.pid)
    children = [child for child in launcher.children(recursive=True) if "stages.pretrain" in child.cmdline()]
    assert len(children) == 2
    children[1].kill()
    _, complained = process.communicate()
    assert process.returncode == 1
    (line,) = errors(complained)
    assert "was ended by SIGKILL" in line
    assert not any(child.is_running() for child in children)
    assert list(own.glob(".resume/control-*/state"))


def test_more_processes_than_parts_of_a_step_are_refused_once(own: Path) -> None:
    (line,) = errors(finish(own, "stages.pretrain", count=3, status=1))
    assert "3 processes cannot share the 2 micro-batches of a step" in line and f"{PROCESSES}=2" in line


def test_what_one_process_refuses_is_told_once_and_ends_all(tmp_path: Path) -> None:
    """In interpreters of their own, as a person starts them."""
    complained = ended(start_real(tmp_path, "-m", "tests.support.bare_ranks", "refuse"), status=1)
    assert errors(complained) == ["error: window 7: cannot be read; make it again"]


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, list[dict]]:
    """What one process and what two tell of `ranks.toy`."""
    directory = tmp_path_factory.mktemp("toy")
    told = []
    for count in (1, 2):
        place = directory / str(count)
        (place / "shards").mkdir(parents=True)
        toy_shards(place / "shards", ranks.N_VOCAB, tokens=900)
        if count == 1:
            with inside(place):
                ranks.toy()
        else:
            finish(place, "tests.support.ranks", "toy", count=count)
        told.append([json.loads((place / f"toy-{rank}.json").read_text()) for rank in range(count)])
    return told[0][0], told[1]


def test_gradients_are_the_sum_over_unevenly_dealt_parts(toys: tuple[dict, list[dict]]) -> None:
    one, both = toys
    for told in both:
        assert told["loss"] == pytest.approx(one["loss"], rel=1e-12)
        for name, gradient in one["gradients"].items():  # the tied embedding, whose head works outside, among them
            assert told["gradients"][name] == pytest.approx(gradient, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_dealt_matrices_move_as_in_one_process(toys: tuple[dict, list[dict]], optimizer: str) -> None:
    one, (first, second) = toys
    # two parts have one sum: not a bit may differ, between the processes or from one of them alone
    assert first[optimizer]["weights"] == second[optimizer]["weights"] == one[optimizer]["weights"]
    assert first[optimizer]["log"] == one[optimizer]["log"]
    assert first[optimizer]["state"] == one[optimizer]["state"]


def test_an_evaluation_shared_by_two_processes_is_that_of_one_to_the_bit_in_both(toys: tuple[dict, list[dict]]) -> None:
    one, both = toys
    losses, hellaswag = one["muon"]["curves"]
    assert len(losses) == len(hellaswag) == 1 + ranks.STEPS // 2
    assert len({row["val_loss"] for row in losses}) > 1 and len({row["gold_bpb"] for row in hellaswag}) > 1
    for told in both:
        assert told["muon"]["curves"] == one["muon"]["curves"]
        assert sum(told["counts"]) == sum(one["counts"]) == 250
    *first, of_second = both[0]["counts"]
    *second, of_first = both[1]["counts"]
    assert sum(first) == of_first > 0 and sum(second) == of_second > 0  # each scores its own, then hears of the rest


@pytest.mark.parametrize(("run", "said"), [("stopped", "stopped after step"), ("broken", "is not finite")])
def test_what_one_process_sees_all_act_on(toys: tuple[dict, list[dict]], run: str, said: str) -> None:
    _, (first, second) = toys
    assert said in first[run]["ended"]
    assert first[run]["ended"] == second[run]["ended"]
    assert first[run]["weights"] == second[run]["weights"]


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 8), st.integers(0, 50))
def test_processes_read_the_windows_of_the_step_each_once(parts: int, rows: int, size: int, step: int) -> None:
    class Shards:
        def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
            return starts[:, None] + np.arange(length)

    batches = Batches(Shards(), BatchConfig(4, 4 * rows * parts, rows), seed=1, windows=np.arange(37))
    dealt = [batches.micro_batches(step, rank, size) for rank in range(size)]
    whole = batches.micro_batches(step)
    assert [dealt[i % size][i // size].windows.tolist() for i in range(parts)] == [b.windows.tolist() for b in whole]
    assert sum(len(mine) for mine in dealt) == parts
    assert np.concatenate([batch.windows for batch in whole]).tolist() == batches.of_step(step).tolist()


def test_batches_read_ahead_are_those_read_when_needed(tmp_path: Path) -> None:
    batches = Batches(toy_shards(tmp_path, 70, tokens=900), BatchConfig(16, 64, 2), seed=1)

    def records(windows: np.ndarray, step: int) -> torch.Tensor:
        return torch.from_numpy((windows[:, None] + step + np.arange(5)).astype(np.uint8))

    loss, cpu = SimpleNamespace(read=records), torch.device("cpu")
    plain, ahead = (Feed(batches, loss, lambda step: step, cpu) for _ in range(2))
    ahead._reader = ThreadPoolExecutor(1)  # as on CUDA
    for step in (3, 4, 5, 9, 10, 0, 31):
        for a, b in zip(plain.micro_batches(step), ahead.micro_batches(step), strict=True):
            assert torch.equal(a.rows, b.rows) and torch.equal(a.records, b.records)
            assert torch.equal(b.records, records(b.windows, step)) and (a.windows == b.windows).all()


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(1, 64)), min_size=1, max_size=40), st.integers(1, 9))
def test_matrices_are_dealt_all_and_evenly(shapes: list[tuple[int, int]], size: int) -> None:
    matrices = {f"m{i}": torch.nn.Parameter(torch.empty(shape)) for i, shape in enumerate(shapes)}
    work = {name: p.numel() * min(p.shape) for name, p in matrices.items()}
    owners = deal_matrices(matrices, size)
    assert owners.keys() == matrices.keys() and set(owners.values()) <= set(range(size))
    loads = [sum(work[name] for name, owner in owners.items() if owner == rank) for rank in range(size)]
    assert max(loads) - min(loads) <= max(work.values())


@pytest.mark.parametrize("said", ["", "0", "-1", "two", "1.5", "²"])
def test_a_wrong_number_of_processes_is_refused(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setenv(PROCESSES, said)
    with pytest.raises(UserError, match=rf"{PROCESSES}: .* neither auto nor a whole number"):
        processes()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are CUDA devices here")
def test_on_the_cpu_auto_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PROCESSES, raising=False)
    assert processes() == 1
