"""A disk that fills or refuses, and numbers that are not finite: one line, and nothing good is lost."""

import os
import random
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.soak import SURVIVED, times
from tests.support.tiny_run import (
    CONTINUE,
    DISTILL,
    EVALUATIONS,
    LABEL,
    PRETRAIN,
    TOKENIZE,
    Stage,
    complaints,
    contents,
    copied_to,
    copy_of,
    finish,
    remove_outputs,
    run,
)

FILLINGS = times(1, 5, "MICROLM_FILLINGS")
WRITERS = (TOKENIZE, PRETRAIN, LABEL, DISTILL, EVALUATIONS[2])
DISK_BYTES = 64 << 20


def _mount(disk: Path, *options: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", ",".join((f"size={DISK_BYTES}", *options)), "none", disk]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if not _mount(disk):
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def _fill(disk: Path, leave_bytes: int) -> Path:
    free = os.statvfs(disk)
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - leave_bytes)))
    return ballast


@pytest.mark.parametrize("stage", WRITERS, ids=lambda stage: stage.name)
def test_a_disk_that_fills_at_any_write_is_one_line_and_the_next_run_goes_on(
    stage: Stage, whole: Path, disk: Path
) -> None:
    luck = random.Random(stage.name)
    expected, written = contents(whole, stage.outputs), sum(path.stat().st_size for path in _files(whole, stage))
    others = contents(whole, ["params.yaml", "data/parts"])
    filled = 0
    for number in range(FILLINGS):
        directory = copied_to(whole, disk / str(number))
        remove_outputs(stage, directory)
        ballast = _fill(disk, leave_bytes=luck.randrange(written))
        status, said = run(stage, directory)
        if status:
            [line] = complaints(said)
            assert status == 1
            assert "No space left on device" in line and "make room" in line
            filled += 1
        assert contents(directory, ["params.yaml", "data/parts"]) == others
        ballast.unlink()
        remove_outputs(stage, directory)
        finish(stage, directory)
        assert contents(directory, stage.outputs) == expected
        subprocess.run(["rm", "-r", directory], check=True)
    assert filled
    SURVIVED["disks filled"] += filled


def _files(directory: Path, stage: Stage) -> Iterator[Path]:
    for path in (directory / output for output in stage.outputs):
        yield from [path] if path.is_file() else (file for file in path.rglob("*") if file.is_file())


@pytest.mark.parametrize("stage", WRITERS, ids=lambda stage: stage.name)
def test_a_disk_that_only_reads_is_one_line(stage: Stage, whole: Path, disk: Path) -> None:
    directory = copied_to(whole, disk / "whole")
    before = contents(directory, ["."])
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    status, said = run(stage, directory)
    [line] = complaints(said)
    assert status == 1
    assert "Read-only file system" in line
    assert contents(directory, ["."]) == before


def changed(directory: Path, old: str, new: str) -> Path:
    """The parameters of scale `smoke` changed."""
    path = directory / "params.yaml"
    top, smoke = path.read_text().split("\n  smoke:\n")
    path.unlink()  # it is a hard link
    path.write_text(f"{top}\n  smoke:\n{re.sub(old, new, smoke)}")
    return directory


def test_a_loss_that_is_not_finite_names_step_and_windows_and_keeps_the_checkpoint(whole: Path, tmp_path: Path) -> None:
    directory = copy_of(whole, tmp_path / "huge")
    changed(directory, r"(  pretrain:\n(?:.*\n)*?      learning_rate:) .*", r"\1 1.0e+30")
    remove_outputs(PRETRAIN, directory)
    status, said = run(PRETRAIN, directory)
    [line] = complaints(said)
    assert status == 1
    assert re.search(r"control: step \d+ is not finite .*windows \[\d+, .*nothing was updated", line), line
    assert not (directory / "models" / "control").exists()


def test_an_update_that_leaves_infinities_is_never_saved(whole: Path, tmp_path: Path) -> None:
    directory = copy_of(whole, tmp_path / "infinite")
    changed(directory, r"(  pretrain:\n(?:.*\n)*?      learning_rate:) .*", r"\1 1.0e+39")
    changed(directory, r"(  pretrain:\n(?:.*\n)*?      evaluate_every:) .*", r"\1 1")  # before the next loss tells
    remove_outputs(PRETRAIN, directory)
    status, said = run(PRETRAIN, directory)
    [line] = complaints(said)
    assert status == 1
    assert re.search(r"the update of step \d+ left weights that are not finite \(windows \[\d+, ", line), line
    for weights in directory.glob(".resume/control-*/state/model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(weights).values())


@pytest.mark.parametrize("stage", [CONTINUE, DISTILL, EVALUATIONS[0]], ids=lambda stage: stage.name)
def test_weights_that_are_not_finite_are_refused_before_they_are_used(
    stage: Stage, whole: Path, tmp_path: Path
) -> None:
    directory = copy_of(whole, tmp_path / "inf")
    path = directory / "models" / "control" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][0] = torch.inf
    path.unlink()
    save_file(weights, path, metadata={"format": "pt"})
    (directory / "models" / "control" / "SHA256SUMS").unlink()
    remove_outputs(stage, directory)
    status, said = run(stage, directory)
    [line] = complaints(said)
    assert status == 1
    assert "models/control/model.safetensors holds weights that are not finite" in line
