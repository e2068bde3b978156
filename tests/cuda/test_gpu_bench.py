"""`python -m bench.gpu`: what one GPU will be asked, rehearsed at a tiny shape, and what a cut or failed run leaves."""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench.gpu import table
from bench.gpu.book import CUT, FAILED, MEASURED, NOT_RUN, STARTED, Book
from bench.gpu.command import run
from bench.gpu.device import Card, refuse_unfit
from bench.gpu.parts import PARTS
from microlm.errors import UserError
from tests.support.bare_python import bare, forking_python
from tests.support.clones import ROOT
from tests.support.workspace import inside

Bench = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """`python -m bench.gpu` with some arguments, without DVC, `datasets` and a network."""
    folder = tmp_path_factory.mktemp("bare")
    environment = bare(folder, "dvc", "datasets")
    with forking_python(folder, environment) as python:

        def ended(*arguments: str) -> subprocess.CompletedProcess[str]:
            command = [python, "-m", "bench.gpu", *arguments]
            return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

        yield ended


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command, in this process, says on stderr before it ends with 1."""
    with inside(ROOT), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bench.gpu", *arguments])
        with pytest.raises(SystemExit) as ended:
            run()
    assert ended.value.code == 1
    return capsys.readouterr().err.strip()


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from numbers(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


@pytest.fixture(scope="module")
def rehearsal(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """A whole one."""
    file = tmp_path_factory.mktemp("rehearsal") / "figures.json"
    return bench("--rehearse", "--file", str(file)), file


def test_the_rehearsal_measures_every_part(rehearsal):
    ended, file = rehearsal
    assert ended.returncode == 0, ended.stdout + ended.stderr
    content = json.loads(file.read_text())
    assert content["rehearsal"] is True
    assert list(content["parts"]) == [part.name for part in PARTS]
    for name, part in content["parts"].items():
        assert part["status"] == MEASURED, (name, part)
        assert part["figures"], name
        found = list(numbers(part["figures"]))
        assert found, name
        assert all(math.isfinite(value) for value in found), name
    assert content["peak_tflops"] > 0
    assert content["utilisation"] > 0


def test_the_rehearsal_ends_with_one_table(rehearsal):
    ended, file = rehearsal
    printed = ended.stdout.split("its figures mean nothing")[1]
    for name, part in json.loads(file.read_text())["parts"].items():
        for key in part["figures"]:
            assert any(line.startswith(name) and key in line for line in printed.splitlines()), (name, key)


def test_steps_do_not_recompile_after_their_warm_up(rehearsal):
    steps = Book(rehearsal[1]).figures("steps")
    assert {figures["recompilations"] for figures in steps.values()} == {0}


def test_the_rehearsal_leaves_nothing_among_the_cards_figures(rehearsal, capsys):
    assert rehearsal[1].is_file()
    told = subprocess.run(["git", "status", "--porcelain", "bench/gpu"], cwd=ROOT, capture_output=True, text=True)
    assert ".json" not in told.stdout
    told = refused(capsys, "--rehearse", "--file", "bench/gpu/rehearsal.json")
    assert told.splitlines()[-1].startswith("error: --file: ")


def test_parts_can_be_run_alone_and_what_others_measured_stays(bench, rehearsal, tmp_path):
    file = tmp_path / "figures.json"
    file.write_bytes(rehearsal[1].read_bytes())
    before = Book(file).content["parts"]
    ended = bench("--rehearse", "--parts", "matrix", "--file", str(file))
    assert ended.returncode == 0, ended.stderr
    after = Book(file).content["parts"]
    assert after["steps"] == before["steps"]
    assert after["matrix"]["figures"] != before["matrix"]["figures"]


def test_a_part_that_does_not_fit_into_the_minutes_is_recorded(bench, tmp_path):
    file = tmp_path / "figures.json"
    ended = bench("--rehearse", "--parts", "matrix", "--file", str(file), "--minutes", "0")
    assert ended.returncode == 1
    part = Book(file).content["parts"]["matrix"]
    assert (part["status"], part["figures"]) == (NOT_RUN, {})


def test_a_killed_run_leaves_what_it_had_measured(tmp_path):
    """Here every process is a real interpreter."""
    file = tmp_path / "figures.json"
    command = [sys.executable, "-m", "bench.gpu", "--rehearse", "--parts", "matrix,steps", "--file", str(file)]
    with tempfile.TemporaryDirectory() as left_behind:
        env = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": left_behind}
        run = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, start_new_session=True)
        while not (file.exists() and len(Book(file).figures("steps")) >= 2):
            assert run.poll() is None, "it ended before it was killed"
            time.sleep(0.01)
        everyone = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
        for process in everyone:  # itself first: it would note how its part ended
            with suppress(psutil.NoSuchProcess):
                process.kill()
        run.wait()
        psutil.wait_procs(everyone)
    left = Book(file)
    assert left.status("matrix") == MEASURED
    assert left.status("steps") == STARTED
    assert len(left.figures("steps")) >= 2
    assert "started" in table.text(left)


def test_a_book_keeps_what_was_measured_before_a_cut(tmp_path):
    book = Book(tmp_path / "figures.json")
    for step_ms in (1.0, 2.0):
        book.start("steps")
        book.note("steps", "first", {"step_ms": step_ms})
        if step_ms == 1.0:
            book.note("steps", "second", {"step_ms": 10.0})
            book.finish("steps", 3.0)
    again = Book(book.path)  # the second run was killed after its first figure
    assert again.figures("steps") == {"first": {"step_ms": 2.0}, "second": {"step_ms": 10.0}}
    again.fail("steps", "killed", CUT)
    assert again.figures("steps")["second"] == {"step_ms": 10.0}
    again.start("steps")
    again.note("steps", "first", {"step_ms": 3.0})
    again.finish("steps", 1.0)
    assert Book(book.path).figures("steps") == {"first": {"step_ms": 3.0}}


def test_what_was_measured_outlives_a_run_without_time(tmp_path):
    book = Book(tmp_path / "figures.json")
    book.start("steps")
    book.note("steps", "first", {"step_ms": 1.0})
    book.finish("steps", 1.0)
    book.not_run("steps", 140)
    assert book.status("steps") == MEASURED
    book.not_run("capture", 20)
    assert (book.status("capture"), book.content["parts"]["capture"]["estimate_s"]) == (NOT_RUN, 20)
    assert "not run: no time left" in table.text(book)


def test_a_figure_that_is_not_finite_is_refused(tmp_path):
    book = Book(tmp_path / "figures.json")
    book.start("steps")
    with pytest.raises(ValueError, match="step_ms is nan"):
        book.note("steps", "first", {"step_ms": math.nan})


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "another"}'])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "figures.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"figures.json: not .* --file"):
        Book(path)


def test_a_failing_part_says_why_and_the_others_go_on(bench, tmp_path):
    """Shares of a rate that was not measured cannot be given; each figure says so, and later parts run all the same."""
    file = tmp_path / "figures.json"
    ended = bench("--rehearse", "--parts", "steps,muon", "--file", str(file))
    assert ended.returncode == 1
    book = Book(file)
    assert (book.status("steps"), book.status("muon")) == (FAILED, MEASURED)
    assert len(book.figures("steps")) > 1
    for figures in book.figures("steps").values():
        assert "run --parts matrix first" in figures["error"]
        assert "\n" not in figures["error"]
    assert str(len(book.figures("steps"))) in book.content["parts"]["steps"]["error"]


def test_no_card_and_an_old_card_are_told_in_one_line():
    for card, said in ((None, "no CUDA device is here"), (Card("Tesla T4", "7.5", 2**34, False, "2.11", "13"), "T4")):
        with pytest.raises(UserError, match=said) as told:
            refuse_unfit(card)
        assert "--rehearse" in str(told.value)
        assert "\n" not in str(told.value)


def test_a_card_names_its_file():
    assert Card("NVIDIA H100 80GB HBM3", "9.0", 2**36, True, "2.11", "13").file_name == "nvidia-h100-80gb-hbm3.json"


def test_unknown_parts_are_told_in_one_line(capsys):
    told = refused(capsys, "--rehearse", "--parts", "matrix,nothing")
    assert told == f"error: --parts: 'nothing' is no part; choose from {', '.join(p.name for p in PARTS)}"


@pytest.mark.parametrize("absent", ["tqdm", "torch", "transformers"])
def test_a_package_that_is_absent_is_told_in_one_line(absent, tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--rehearse", "--parts", "matrix"]
    ended = subprocess.run(command, cwd=ROOT, env=bare(tmp_path / "bare", absent), capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"error: {absent} is not installed") and len(ended.stderr.splitlines()) == 1


def test_what_parts_are_forked_from_has_not_touched_the_driver():
    """A process that has cannot give its children a device."""
    program = (
        "import torch; asked = []; torch.cuda._lazy_init = lambda: asked.append(1); "
        "import bench.gpu.parts, transformers.models.llama.modeling_llama; assert not asked, asked"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_what_a_gpu_runs_imports_without_what_a_bare_machine_lacks(tmp_path):
    modules = (
        "bench.gpu.command",
        "bench.gpu.parts",
        "microlm.pipeline.training_stages",
        "microlm.pipeline.capture",
        "stages.evaluate",
    )
    program = f"import importlib; [importlib.import_module(name) for name in {modules}]"
    env = bare(tmp_path / "bare", "dvc", "datasets", "gguf", "ruamel", "psutil")
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
