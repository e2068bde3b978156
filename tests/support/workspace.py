"""A folder in which the teacher's and the ledger's stages can run at scale `smoke`, without DVC and in seconds."""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch

from microlm.config import Config, load_config
from microlm.corpus.tokenizer import Tokenizer
from microlm.errors import run_stage
from microlm.models.model_files import save_student
from microlm.pipeline.capture import capture_teacher
from microlm.pipeline.start import fresh_student
from microlm.runtime.device import Runtime
from stages.verify import main
from tests.support.clones import ROOT
from tests.support.other_tokenizers import first_merges
from tests.support.shared import made_once
from tests.support.tiny_run import tiny_parameters
from tests.support.tiny_teacher import gpt2, write_tiny_teacher
from tests.support.toy_shards import write_shards

WHEELS = ROOT / ".resume" / "wheels"
RUNTIME = Runtime(torch.device("cpu"), torch.float32, False, 1)


@contextmanager
def inside(directory: Path) -> Iterator[None]:
    """Run the body with `directory` as the top folder of a repository."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.delenv("DVC_ROOT", raising=False)
        yield


def config_of(directory: Path) -> Config:
    return load_config(directory / "params.yaml")


@cache
def short_tokenizer(merges: int = 1000) -> Tokenizer:
    """GPT-2's first merges. Under all of them, a tiny model's seconds go into its vocabulary."""
    return first_merges(gpt2(WHEELS), merges)


def write_own_teacher(directory: Path, seed: int = 0) -> None:
    """A teacher with the workspace's tokenizer; the workspace's own has seed 0."""
    write_tiny_teacher(directory, seed, tokenizer=short_tokenizer())


def make_workspace(directory: Path) -> Path:
    """A copy of its own in `directory`, which does not exist yet."""
    shutil.copytree(made_once("workspace", _fill), directory)
    return directory


def _fill(directory: Path) -> None:
    """params.yaml, tiny teacher, shards, a fresh start and control, and the teacher's cache with its metrics."""
    # no text of another kind: to read one costs seconds, and no stage that runs here asks for it
    params = tiny_parameters().replace("\n      - tests/fixtures/outside.jsonl", "")
    (directory / "params.yaml").write_text(params)
    with inside(directory):
        config, tokenizer = load_config(), short_tokenizer()
        write_own_teacher(Path(config.at.teacher.model))
        lines = (ROOT / "tests" / "fixtures" / "documents.jsonl").read_text().splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        write_shards(texts, tokenizer, Path("data/shards"), validation_fraction=0.1, shard_tokens=8192)
        for name in ("start", "control"):
            save_student(fresh_student(config, tokenizer), tokenizer, Path("models") / name)
        capture_teacher(config, RUNTIME)


def verify(directory: Path, *options: str) -> int:
    """Exit status of `python -m stages.verify` there, in this process."""
    with inside(directory), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["stages.verify", *options])
        try:
            run_stage(main)
        except SystemExit as ended:
            return int(ended.code)
    return 0
